"""From a source to partitioned shards, for a graph of the size of ogbn-products and one of a quarter of it.

    python -m benchmarks.shards [--quick] [--json FILE]

One process does the stages source and partition (streaming, 8 parts), reading included: the synthetic source is drawn,
not read. The floor of either stage's time is one sequential write of the finished shards, on the same disk and with the
same checksums. Memory is what the process holds of its own at its peak (RssAnon), over that before; the
pages of mapped files come on top while there is room for them, and are given back.
"""

import re
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from benchmarks.report import Row, main
from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.stages.partition import write_graph
from rbm_dist.stages.source import below, over_here, stage_source

MEMORY = 2 << 30  # bytes that may be held
FLOOR_SHARE = 0.05  # sorting, spills and their checksums, and the draw of the graph take the rest


@dataclass(frozen=True)
class Cost:
    edges: int  # in the shards, both directions counted
    bytes: int
    source_s: float
    partition_s: float
    floor_s: float
    memory: int


class Peak:
    """The highest RssAnon of this process while the block runs, over that before."""

    def __enter__(self) -> "Peak":
        self._before, self.bytes, self._done = anonymous(), 0, threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.bytes = max(self.bytes, anonymous() - self._before)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()


def anonymous() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1]) if found else 0


def cost(num_nodes: int) -> Cost:
    """Make the shards of a synthetic graph, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        make(f"{folder}/warm", 5000)  # imports and compilation
        with Peak() as peak:
            source_s, partition_s = make(f"{folder}/run", num_nodes)
        index = storage.read_json(f"{folder}/run/graph/graph.json")
        size = sum(info["bytes"] for info in index["files"].values())
        start = time.perf_counter()
        rows = np.zeros((1 << 16, 1 << 8), np.float32)
        storage.write_chunks(
            f"{folder}/floor.npy", np.float32, (size // (1 << 10), 1 << 8),
            (rows[: min(1 << 16, size // (1 << 10) - at)] for at in range(0, size // (1 << 10), 1 << 16)),
        )  # fmt: skip
        floor_s = time.perf_counter() - start
    return Cost(index["num_edges"], size, source_s, partition_s, floor_s, peak.bytes)


def make(url: str, num_nodes: int) -> tuple[float, float]:
    """Seconds of the two stages."""
    source = {"kind": "synthetic", "num_nodes": num_nodes, "degree": 50, "num_communities": max(num_nodes // 2500, 47)}
    if num_nodes < 10_000:
        source |= {"num_communities": 8, "num_classes": 8}
    config = Config.model_validate(
        {"run_dir": url, "source": source, "partition": {"method": "streaming", "num_parts": 8}}
    )
    start = time.perf_counter()
    files = below(stage_source(config, f"{url}/source", over_here), "source")
    staged = time.perf_counter()
    write_graph(config, f"{url}/source", files, f"{url}/graph", over_here)
    return staged - start, time.perf_counter() - staged


def cost_of_its_own(num_nodes: int) -> Cost:
    """The same in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(cost, num_nodes).result()


def measure(quick: bool) -> list[Row]:
    nodes = (30_000, 120_000) if quick else (600_000, 2_400_000)
    small, large = (cost_of_its_own(num_nodes) for num_nodes in nodes)
    took = {each: each.source_s + each.partition_s for each in (small, large)}
    rows = []
    for num_nodes, each in zip(nodes, (small, large), strict=True):
        name = f"{num_nodes:,} nodes, {each.edges / 1e6:.1f} M edges"
        for stage, stage_s in (("source", each.source_s), ("partition", each.partition_s)):
            speed, share = each.edges / stage_s / 1e6, each.floor_s / stage_s
            rows.append(Row(f"{name}: {stage}", speed, "M edges/s", share, FLOOR_SHARE))
        rows.append(Row(f"{name}: memory held", each.memory / 1e6, "MB", MEMORY / each.memory, 1.0))
    per_edge = (took[small] / small.edges) / (took[large] / large.edges)
    rows.append(Row("4 times the graph: time per edge", took[large] / large.edges * 1e9, "ns", per_edge, 0.8))
    rows.append(Row("4 times the graph: memory", large.memory / 1e6, "MB", small.memory / large.memory, 0.25))
    return rows


if __name__ == "__main__":
    main("source to shards", measure)
