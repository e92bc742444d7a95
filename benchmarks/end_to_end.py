"""From a source to mini-batches, all larger than what is held: 10 M nodes and 150 M undirected edges of the source
`synthetic` (drawn, not read) are staged, cut into 8 parts by the streaming partitioner, shuffled to shards, and sampled
and gathered over the mapped parts: fan-out [15, 10, 5], batches of 1,024 training nodes.

    python -m benchmarks.end_to_end [--quick] [--json FILE]

Rates are per second of CPU time, so that other work on the machine matters little; times on the clock are printed. The
floor of a stage is one sequential write of the finished shards with their checksums; that of batches, the edges of all
parts and the features of one copied into memory. Of tasks that run alone the ratio is how much faster more hosts can
make their stage at most. Memory is what the process holds of its own (RssAnon). Takes 20 GB of disk.
"""

import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from benchmarks.report import Row, main
from benchmarks.sampling import FANOUT, SEEDS
from benchmarks.shards import FLOOR_SHARE, MEMORY, Peak
from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.graph.csc import Csc
from rbm_dist.graph.sampler import NumbaSampler, Sample
from rbm_dist.graph.splits import TRAIN
from rbm_dist.graph.store import GraphStore
from rbm_dist.stages.partition import write_graph
from rbm_dist.stages.source import below, over_here, stage_source

PARTS = 8
DEGREE = 30
ALONE = {"node tables": "source", "joins": "source", "assignment": "partition"}
KEPT = 0.05  # of all nodes: those whose rows a worker keeps, in the estimate of a cache

T = TypeVar("T")


def timed(name: str, work: Callable[[], T]) -> tuple[T, float]:
    """What `work` gives, and its CPU seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    cpu_s = time.process_time() - cpu
    print(f"{name}: {time.perf_counter() - start:,.1f} s on the clock, {cpu_s:,.1f} s of CPU", flush=True)
    return result, cpu_s


def rows_of(num_nodes: int, batches: int) -> list[Row]:
    """Everything, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        make(f"{folder}/warm", 5000)  # imports and compilation
        rows = make(f"{folder}/run", num_nodes)
        return rows + batch_rows(GraphStore.open(f"{folder}/run/graph"), batches)


def make(url: str, num_nodes: int) -> list[Row]:
    """Make the graph below `url`; what its stages took."""
    source = {"kind": "synthetic", "num_nodes": num_nodes, "degree": DEGREE}
    source |= {"num_communities": max(num_nodes // 2500, 47)} if num_nodes > 5000 else {"num_communities": 47}
    partition = {"method": "streaming", "num_parts": PARTS}
    config = Config.model_validate({"run_dir": url, "source": source, "partition": partition})
    alone = {"source": 0.0, "partition": 0.0}  # CPU seconds of tasks that no other runs beside

    def over(unit: str, function: Callable[..., Any], arguments: list[tuple]) -> list[Any]:
        done, cpu_s = timed(f"  {unit}", lambda: over_here(unit, function, arguments))
        if unit in ALONE:
            alone[ALONE[unit]] += cpu_s
        return done

    with Peak() as source_peak:
        files, source_s = timed("source", lambda: stage_source(config, f"{url}/source", over))
    with Peak() as partition_peak:
        arguments = (config, f"{url}/source", below(files, "source"), f"{url}/graph", over)
        _, partition_s = timed("partition", lambda: write_graph(*arguments))
    index = storage.read_json(f"{url}/graph/graph.json")
    edges, size = index["num_edges"], sum(info["bytes"] for info in index["files"].values())
    staged = sum(file.stat().st_size for file in Path(url, "source").iterdir())
    feat_NF = np.zeros((1 << 16, index["num_features"]), np.float32)
    pieces = size // feat_NF.nbytes + 1
    floor = (f"{url}/floor.npy", np.float32, (pieces * len(feat_NF), feat_NF.shape[1]))
    _, floor_s = timed("one sequential write", lambda: storage.write_chunks(*floor, (feat_NF for _ in range(pieces))))
    storage.remove(floor[0])
    name = f"{num_nodes:,} nodes, {edges / 1e6:.1f} M edges"
    cut = index["partition"]["cut_share"]
    minimum = 4 * edges + num_nodes * (8 + 8 + 1 + 8 + 4 * index["num_features"])  # indptr, label, split, orig_id, feat
    return [
        Row(f"{name}: source", edges / source_s / 1e6, "M edges per CPU s", floor_s / source_s, FLOOR_SHARE),
        Row(f"{name}: partition", edges / partition_s / 1e6, "M edges per CPU s", floor_s / partition_s, FLOOR_SHARE),
        *(
            Row(f"{stage}: tasks that run alone", edges / alone_s / 1e6, "M edges per CPU s", of_s / alone_s, 3.0)
            for (stage, alone_s), of_s in zip(alone.items(), (source_s, partition_s), strict=True)
        ),
        Row("source: memory held", source_peak.bytes / 1e6, "MB", MEMORY / source_peak.bytes, 1.0),
        Row("partition: memory held", partition_peak.bytes / 1e6, "MB", MEMORY / partition_peak.bytes, 1.0),
        Row("staged source on disk, to shards", staged / 1e6, "MB", size / staged, 0.9),
        Row("shards on disk, to their least", size / 1e6, "MB", minimum / size, 0.9),
        Row("cut, to chance", 100 * cut, "% of edges", (1 - 1 / PARTS) / cut, 1.5),
    ]


@dataclass
class Cost:
    """What some batches took; CPU seconds."""

    nodes: int = 0
    edges: int = 0
    sample_s: float = 0.0
    gather_s: float = 0.0


def each_batch(
    seeds: list[np.ndarray], sample: Callable[..., Sample], gather: Callable[[np.ndarray], object], cost: Cost
) -> Iterator[np.ndarray]:
    """Sample and gather batch by batch; gives each one's nodes, and adds to the cost."""
    for key, each in enumerate(seeds):
        start = time.process_time()
        found = sample(each, FANOUT, key)
        sampled = time.process_time()
        gather(found.nodes)
        cost.gather_s += time.process_time() - sampled
        cost.sample_s += sampled - start
        cost.nodes += len(found.nodes)
        cost.edges += len(found.src)
        yield found.nodes


def batch_rows(store: GraphStore, batches: int) -> list[Row]:
    """Batches whose seeds are of one part, as a worker's are that holds only this part."""
    rng = np.random.default_rng(0)
    train = store.ids(0)[store.array("split", 0) == TRAIN]
    seeds = [rng.choice(train, min(SEEDS, len(train)), replace=False) for _ in range(2 * batches)]
    store.sample(seeds[0], FANOUT, 0)  # maps the parts and checks them
    count_N, mapped, held = np.zeros(store.num_nodes, np.int32), Cost(), Cost()
    with Peak() as peak:
        for nodes in each_batch(seeds[:batches], store.sample, len, Cost()):
            count_N[nodes] += 1
        is_remote_N = np.arange(store.num_nodes) >= store.offsets[1]
        # The rows of other hosts that these batches needed most often are kept: what must the others still fetch?
        fetched_N = is_remote_N.copy()
        fetched_N[np.argsort(count_N * is_remote_N)[-int(KEPT * store.num_nodes) :]] = False
        remote = fetched = 0
        for nodes in each_batch(seeds[batches:], store.sample, lambda ids: store.gather("feat", ids), mapped):
            remote += int(is_remote_N[nodes].sum())
            fetched += int(fetched_N[nodes].sum())
    parts = {p: Csc(*(np.array(store.array(name, p)) for name in ("indptr", "indices"))) for p in range(PARTS)}
    feat_nF = np.array(store.array("feat", 0))
    sampler = NumbaSampler(parts, store.offsets)
    deque(each_batch(seeds[batches:], sampler.sample, lambda ids: feat_nF[ids % len(feat_nF)], held), 0)
    share = remote / mapped.nodes
    sample_speed, gather_speed = mapped.edges / mapped.sample_s / 1e6, mapped.nodes / mapped.gather_s / 1e6
    return [
        Row("samples of mapped parts", sample_speed, "M edges per CPU s", held.sample_s / mapped.sample_s, 0.8),
        Row("gathers of mapped parts", gather_speed, "M rows per CPU s", held.gather_s / mapped.gather_s, 0.5),
        Row("batches: memory held", peak.bytes / 1e6, "MB", MEMORY / peak.bytes, 1.0),
        Row(
            "nodes of a batch, to its edges", mapped.nodes / batches / 1e3, "thousand", mapped.edges / mapped.nodes, 1.0
        ),
        Row("of these in other parts, to chance", 100 * share, "%", (1 - 1 / PARTS) / share, 1.0),
        Row(f"and not of the {KEPT:.0%} kept", 100 * fetched / mapped.nodes, "%", remote / fetched, 1.0),
    ]


def measure(quick: bool) -> list[Row]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(rows_of, *((200_000, 20) if quick else (10_000_000, 150))).result()


if __name__ == "__main__":
    main("end to end", measure)
