"""Partitioners in 8 parts: CPU time, memory and cut of KaMinPar's presets and of streaming, against METIS where pymetis
is installed; and the edges they cut on real graphs, where there are any.

    python -m benchmarks.partitioning [--quick] [--json FILE]

Time and memory are those of a process of its own and of its children, from the graph on disk to the parts; memory is
the largest resident set over the one before, mapped pages included. There are two synthetic graphs. `planted` has 8
groups that hold 75 % of the edges at random: its floor is a cut of 25 %, and a multilevel method takes the most memory,
for there is nothing to coarsen. `communities` is the source `synthetic`: communities of some 2,500 nodes, degrees by a
power law. Judge quality on the real graphs (RBM_DIST_DATA, or beside the repository), by the mean of 5 seeds.
"""

import importlib.util
import os
import re
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import psutil

from benchmarks.report import Row, main
from rbm_dist.config.run import Config, PartitionConfig
from rbm_dist.graph.csc import Csc, build, destinations
from rbm_dist.graph.partition import memory_needed, partition
from rbm_dist.graph.partition_report import partition_report
from rbm_dist.stages.source import over_here, stage_source

PARTS = 8
SEEDS = 5  # of the cuts on real graphs, which differ by several per cent from seed to seed
CONFIGS = {
    "kaminpar fast": PartitionConfig(num_parts=PARTS, preset="fast"),
    "kaminpar default": PartitionConfig(num_parts=PARTS, preset="default"),
    "kaminpar terapart": PartitionConfig(num_parts=PARTS, preset="terapart"),
    "streaming": PartitionConfig(num_parts=PARTS, method="streaming"),
    "random": PartitionConfig(num_parts=PARTS, method="random"),
}
CPU_TARGET = {"kaminpar fast": 2.0, "kaminpar default": 1.0, "kaminpar terapart": 1.0, "streaming": 4.0}
MEMORY_TARGET = 2.5


@dataclass(frozen=True)
class Cost:
    cpu_s: float
    memory: int  # bytes
    cut: float  # share of the edges


def assign(method: str, csc: Csc, seed: int = 0) -> np.ndarray:
    if method != "METIS":
        return partition(csc, CONFIGS[method], seed, symmetric=True)
    import pymetis

    # METIS has 64-bit ids here; anything else would be copied once more. Left to itself it bisects up to 8 parts, with
    # an imbalance of 0.001; KaMinPar is a k-way method with 0.03.
    adjacency = pymetis.CSRAdjacency(np.asarray(csc.indptr), csc.indices.astype(np.int64))
    options = pymetis.Options(ufactor=round(1000 * CONFIGS["kaminpar fast"].imbalance), seed=seed)
    return np.asarray(pymetis.part_graph(PARTS, adjacency, recursive=False, options=options)[1], np.int32)


def open_graph(folder: Path) -> Csc:
    return Csc(*(np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("indptr", "indices")))


def resident(process: psutil.Process, name: str) -> int:
    """Bytes that the system reports as `VmRSS` (now) or `VmHWM` (at the peak) of a process."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
    return 1024 * int(found[1]) if found else 0


def peak(call: Callable[[], object]) -> int:
    """Bytes by which a call raises this process's memory at its peak, and the peaks of the processes that it starts."""
    me, peaks, done = psutil.Process(), dict[int, int](), threading.Event()
    own = me.cmdline()

    def watch() -> None:
        while not done.wait(0.002):
            for child in me.children():
                with suppress(OSError, psutil.Error):  # it has just ended
                    if child.cmdline() not in (own, []):  # until it runs its own program, it shows our memory as its
                        peaks[child.pid] = max(peaks.get(child.pid, 0), resident(child, "VmHWM"))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident(me, "VmRSS")
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        call()
    finally:
        done.set()
        watcher.join()
    return resident(me, "VmHWM") - before + sum(peaks.values())


def cpu_s() -> float:
    """CPU seconds of this process and of those that it started and that ended."""
    return sum(os.times()[:4])


def cost(method: str, folder: Path) -> Cost:
    """Partition the graph below `folder`, in this process."""
    assign(method, open_graph(folder / "small"))  # imports and compilation are not counted
    csc = open_graph(folder)
    parts: list[np.ndarray] = []
    memory = peak(lambda: parts.append(assign(method, csc)))
    start = cpu_s()  # apart, as the watcher takes time too
    assign(method, open_graph(folder))
    return Cost(cpu_s() - start, memory, partition_report(csc, parts[0], PARTS)["cut_share"])


def cost_of_its_own(method: str, folder: Path) -> Cost:
    """The same in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(cost, method, folder).result()


def write_communities(folder: Path, num_nodes: int, num_edges: int) -> None:
    """Write a graph of the source `synthetic`, about `num_edges` edges (both directions counted)."""
    source = {"kind": "synthetic", "num_nodes": num_nodes, "degree": num_edges / num_nodes, "num_features": 1}
    source |= {"num_communities": max(num_nodes // 2500, 47)}
    stage_source(Config.model_validate({"run_dir": str(folder), "source": source}), str(folder), over_here)


def write_planted(folder: Path, num_nodes: int, num_edges: int) -> None:
    """Write a graph of 8 equal groups over shuffled ids, about `num_edges` edges (both directions counted)."""
    rng, size, pairs = np.random.default_rng(0), num_nodes // PARTS, num_edges // 2
    order = rng.permutation(num_nodes).astype(np.int32)
    src = rng.integers(0, num_nodes, pairs, np.int32)
    step = np.where(rng.random(pairs) < 0.75, 0, rng.integers(1, PARTS, pairs, np.int32))
    dst = (src // size + step) % PARTS * size + rng.integers(0, size, pairs, np.int32)
    csc = build(order[src], order[dst], num_nodes, undirected=True)
    folder.mkdir(exist_ok=True)
    np.save(folder / "indptr.npy", csc.indptr)
    np.save(folder / "indices.npy", csc.indices)


def measure(quick: bool) -> list[Row]:
    methods = list(CONFIGS)
    if importlib.util.find_spec("pymetis"):
        methods.append("METIS")
    else:
        print("METIS is left out, and what is compared with it: pymetis is not installed")
    size = (100_000, 3_000_000) if quick else (2_400_000, 57_000_000)
    rows = [
        row
        for name, write in (("planted", write_planted), ("communities", write_communities))
        for row in synthetic_rows(methods, name, write, *size)
    ]
    return rows + real_rows(methods)


def synthetic_rows(
    methods: list[str], graph: str, write: Callable[[Path, int, int], None], num_nodes: int, num_edges: int
) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, num_nodes, num_edges)
        write_planted(folder / "small", 800, 8_000)
        num_edges = open_graph(folder).num_edges
        costs = {method: cost_of_its_own(method, folder) for method in methods}
    rows = []
    metis = costs.get("METIS")
    for method in CPU_TARGET:
        own = costs[method]
        name = f"{graph}, {method}"
        if metis:
            cpu, memory = metis.cpu_s / own.cpu_s, metis.memory / own.memory
            rows.append(Row(f"{name} vs METIS: time", own.cpu_s, "CPU s", cpu, CPU_TARGET[method]))
            rows.append(Row(f"{name} vs METIS: memory", own.memory / 1e6, "MB", memory, MEMORY_TARGET))
        if method != "streaming":  # whose estimate leaves out the mapped graph
            needed = memory_needed(CONFIGS[method], num_nodes, num_edges, symmetric=True)
            # The estimate is for graphs whose memory matters; of a small one most is the process.
            target = 0.75 if num_nodes > 1_000_000 else None  # docs/plan.md: good to 20 %
            rows.append(Row(f"{name}: memory, estimate vs peak", needed / 1e6, "MB", needed / own.memory, target))
    cut = {method: found.cut for method, found in costs.items()}
    return rows + cut_rows(graph, cut, of_random=3.0 if num_nodes > 1_000_000 else None)


def real_rows(methods: list[str]) -> list[Row]:
    folder = Path(os.environ.get("RBM_DIST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    files = sorted(folder.glob("*.npz"))
    if not files:
        print(f"real graphs are left out: there are none in {folder}; set RBM_DIST_DATA")
    rows = []
    for path in files:
        with np.load(path, allow_pickle=False) as arrays:
            given = Csc(arrays["adj_indptr"], arrays["adj_indices"])
        csc = build(given.indices, destinations(given), given.num_nodes, undirected=True)
        cuts = {
            m: [partition_report(csc, assign(m, csc, seed), PARTS)["cut_share"] for seed in range(SEEDS)]
            for m in methods
        }
        rows += cut_rows(path.stem, {m: float(np.mean(cut)) for m, cut in cuts.items()})
    return rows


def cut_rows(graph: str, cut: dict[str, float], of_random: float | None = 3.0) -> list[Row]:
    """KaMinPar is to cut as little as METIS, and all a third of chance; random parts are to be chance.

    of_random: that third, which depends on the graph: small ones have no communities to speak of.
    """
    target: float | None
    rows = []
    for method, share in cut.items():
        if method == "random":
            peer, ratio, target = "chance", (1 - 1 / PARTS) / share, 0.95
        elif method.startswith("kaminpar") and "METIS" in cut:
            peer, ratio, target = "METIS", cut["METIS"] / share, 0.95  # a tie: seeds differ by more
        else:
            # Streaming trades the cut for its memory; what it reaches is in docs/scaling.md.
            peer, ratio, target = "random", cut["random"] / share, None if method == "streaming" else of_random
        rows.append(Row(f"{graph}, {method} vs {peer}: cut", 100 * share, "% of edges", ratio, target))
    return rows


if __name__ == "__main__":
    main(f"Partitioning, {PARTS} parts, one thread", measure)
