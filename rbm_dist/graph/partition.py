"""Partitioners: graph → part of every node. All take a `Csc`, mapped from disk or not; all repeat for the same seed.

KaMinPar works in memory, which is estimated before it starts; the streaming partitioner needs little beyond the mapped
graph. METIS is not offered: it cuts no better than KaMinPar and takes several times its memory.
"""

import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Protocol

import numpy as np

from rbm_dist.config.run import PartitionConfig
from rbm_dist.errors import InputError, RunError, disk_full
from rbm_dist.graph import streaming
from rbm_dist.graph.csc import Csc, build, destinations
from rbm_dist.randomness.bits import generator

_CHUNK = 1 << 22
# Bytes per node and per edge (both directions counted) that KaMinPar's process holds at its peak, fitted to graphs with
# communities (`sources/synthetic.py`) of 2 to 57 M edges, mean degree 4 to 50. A graph without any structure does not
# shrink as it is coarsened and takes up to three times that. `fast` splits a large graph where parts are many.
_KAMINPAR_BYTES = {"fast": (150, 9.3), "default": (50, 15.0), "terapart": (50, 11.5)}
_MANY_PARTS_BYTES = 7  # per edge, of `fast`: none of it for 8 parts, all of it for 64
_KAMINPAR_BASE = 20_000_000
_MARGIN = 1.6  # the most that was measured on such graphs, over the estimate
_REVERSE_BYTES = 24  # per edge, of adding the reverse of every edge


# What the process of KaMinPar runs. It ends with its parent (prctl 1: PR_SET_PDEATHSIG, 9: SIGKILL).
_SOLVE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)
import kaminpar, numpy
path, result, preset, num_parts, imbalance, seed = sys.argv[1:]
graph = kaminpar.load_graph(path, kaminpar.GraphFileFormat.PARHIP, preset == "terapart")
os.truncate(path, 0)
kaminpar.reseed(int(seed))
solver = kaminpar.KaMinPar(1, kaminpar.context_by_name(preset))
part = numpy.asarray(solver.compute_partition(graph, int(num_parts), float(imbalance)), numpy.int32)
with open(result, "wb") as stream:
    numpy.save(stream, part)
"""


class Partitioner(Protocol):
    def __call__(self, csc: Csc, config: PartitionConfig, seed: int, symmetric: bool) -> np.ndarray:
        """The part of every node, `[N]` int32 in `[0, num_parts)`. symmetric: every edge's reverse is an edge too."""
        ...


def partition(csc: Csc, config: PartitionConfig, seed: int, symmetric: bool = False) -> np.ndarray:
    """Assign every node to a part by the configured method, `[N]` int32.

    symmetric: every edge's reverse is an edge too, so that KaMinPar, which wants that, need not add it.
    Raises `InputError` if there are more parts than nodes, or if the machine has not the memory that it takes.
    """
    if config.num_parts > csc.num_nodes:
        raise InputError(f"partition.num_parts: {config.num_parts} parts for a graph of {csc.num_nodes} node(s)")
    if config.num_parts == 1:
        return np.zeros(csc.num_nodes, np.int32)
    _check_memory(config, csc.num_nodes, csc.num_edges, symmetric)
    return PARTITIONERS[config.method](csc, config, seed, symmetric)


def random_parts(csc: Csc, config: PartitionConfig, seed: int, symmetric: bool) -> np.ndarray:
    """A seeded shuffle dealt out evenly: parts differ by at most one node."""
    part_N = np.arange(csc.num_nodes, dtype=np.int32) % config.num_parts
    return generator(seed, config.num_parts).permutation(part_N)


def streaming_parts(csc: Csc, config: PartitionConfig, seed: int, symmetric: bool) -> np.ndarray:
    """Greedy, in passes over the graph (`streaming.stream`). If not symmetric, only in-edges attract a node."""
    weight = _weight(config.balance, csc)
    return streaming.stream(csc, config.num_parts, config.imbalance, config.passes, seed, *weight)


def kaminpar_parts(csc: Csc, config: PartitionConfig, seed: int, symmetric: bool) -> np.ndarray:
    """KaMinPar on the undirected graph (Gottesbüren et al., Deep Multilevel Graph Partitioning, 2021).

    Preset `terapart` compresses the graph (Salwasser et al., Tera-Scale Multilevel Graph Partitioning, 2025).
    One thread: with more, its result depends on their timing, and a run that was killed could not be repeated. A
    process of its own: where KaMinPar was used before, the same seed at times gives other parts (default, terapart).
    The graph passes through a temporary file of 4 bytes per edge and 8 per node (twice that if nodes are weighted),
    which has no name, so that nothing is left of it whoever is killed.
    Raises `InputError` if the disk is full, `RunError` if KaMinPar does not end well, such as when memory runs out.
    """
    if csc.num_edges == 0:
        return random_parts(csc, config, seed, symmetric)
    with tempfile.TemporaryFile(buffering=0) as graph, tempfile.TemporaryFile(buffering=0) as result:
        try:
            _write_parhip(graph, csc, config.balance, symmetric)
        except OSError as error:
            raise disk_full(error, tempfile.gettempdir()) or error from None
        handles = (graph.fileno(), result.fileno())
        paths = [f"/proc/self/fd/{handle}" for handle in handles]
        arguments = [*paths, config.preset, config.num_parts, config.imbalance, seed]
        command = [sys.executable, "-P", "-c", _SOLVE, *map(str, arguments)]
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, pass_fds=handles
        )
        if done.returncode:
            reason = "killed, as when memory runs out" if done.returncode == -9 else done.stderr.strip()[-500:]
            raise RunError(f"partition: KaMinPar ended with code {done.returncode}: {reason}")
        result.seek(0)
        return np.load(result)


def memory_needed(config: PartitionConfig, num_nodes: int, num_edges: int, symmetric: bool = False) -> int:
    """Bytes that `partition` holds at its peak, mapped files not counted: about, for a graph with communities.

    num_edges: of the `Csc`, so both directions of an undirected edge; if not symmetric, KaMinPar may see twice as many.
    """
    if config.method == "streaming":
        return 4 * num_nodes + 24 * config.num_parts  # the mapped graph is read once a pass, and need not stay
    if config.method == "random":
        return 16 * num_nodes
    per_node, per_edge = _KAMINPAR_BYTES[config.preset]
    if config.preset == "fast":
        per_edge += _MANY_PARTS_BYTES * min(max(math.log2(config.num_parts / 8) / 3, 0), 1)
    if config.balance != "nodes":
        per_node += 16
    if config.num_parts > 256:  # the result is a list, and Python shares the integers up to 256 only
        per_node += 32
    edges = num_edges if symmetric else 2 * num_edges
    reverse = 0 if symmetric else _REVERSE_BYTES * num_edges
    return _KAMINPAR_BASE + per_node * num_nodes + round(max(per_edge * edges, reverse))


def most_memory_needed(config: PartitionConfig, num_nodes: int, num_edges: int, symmetric: bool = False) -> int:
    """Bytes without which `partition` refuses to begin: what a graph whose communities are few and large takes."""
    needed = memory_needed(config, num_nodes, num_edges, symmetric)
    return round(_MARGIN * needed) if config.method == "kaminpar" else needed


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: what Linux calls available, and what its control groups (v2) leave it.

    root: where `proc` and `sys` are.
    """
    meminfo = (root / "proc/meminfo").read_text()
    available = 1024 * int(meminfo.partition("MemAvailable:")[2].split()[0])
    groups = (root / "proc/self/cgroup").read_text().splitlines()
    own = next((line.removeprefix("0::/") for line in groups if line.startswith("0::/")), "")
    top = root / "sys/fs/cgroup"
    for folder in [top / own, *(top / own).parents]:
        limit = folder / "memory.max"
        if limit.is_file() and limit.read_text().strip() != "max":
            used = int((folder / "memory.current").read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cache = int(stat["active_file"]) + int(stat["inactive_file"])  # given back when memory is short
            available = min(available, int(limit.read_text()) - used + cache)
    return max(available, 0)


def _check_memory(config: PartitionConfig, num_nodes: int, num_edges: int, symmetric: bool) -> None:
    def needed(**changes: str) -> int:
        return most_memory_needed(config.model_copy(update=changes), num_nodes, num_edges, symmetric)

    available = available_memory()
    if needed() <= available:
        return
    method = f"kaminpar, preset {config.preset}," if config.method == "kaminpar" else config.method
    others = {
        "partition.preset: terapart": needed(preset="terapart"),
        "partition.method: streaming": needed(method="streaming"),
    }
    advice = [
        f"{name} (at most {_gigabytes(size)})" for name, size in others.items() if size <= min(available, needed() - 1)
    ]
    raise InputError(
        f"partition.method: {method} may need {_gigabytes(needed())} of memory for {num_nodes:,} nodes and "
        f"{num_edges:,} edges, but {_gigabytes(available)} are available; "
        + (f"set {' or '.join(advice)}" if advice else "use a machine with more memory")
    )


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"


def _weight(balance: str, csc: Csc) -> tuple[int, int]:
    """What a node weighs, and what each of its in-edges: integers, as KaMinPar wants them."""
    mean_degree = max(1, round(csc.num_edges / csc.num_nodes))
    # edges: 1 for the node itself, or isolated nodes would all end up in one part. both: ∝ 1 + degree / mean degree.
    return {"nodes": (1, 0), "edges": (1, 1), "both": (mean_degree, 1)}[balance]


def _write_parhip(stream: IO[bytes], csc: Csc, balance: str, symmetric: bool) -> None:
    # ParHIP binary: version (bit 0: edges have no weights, bit 1: nodes have none, bit 3: 32-bit ids), n, m, then
    # n + 1 offsets in bytes, the targets, and the weights of the nodes.
    graph = csc if symmetric else build(csc.indices, destinations(csc), csc.num_nodes, undirected=True)
    wide = graph.indices.itemsize == 8
    version = 1 | (balance == "nodes") << 1 | (not wide) << 3
    header = np.array([version, graph.num_nodes, graph.num_edges], np.uint64)
    first = header.nbytes + 8 * (graph.num_nodes + 1)
    header.tofile(stream)
    for indptr in _chunks(graph.indptr):
        (first + indptr * graph.indices.itemsize).astype(np.uint64).tofile(stream)
    for indices in _chunks(graph.indices):
        indices.tofile(stream)
    if balance != "nodes":
        per_node, per_edge = _weight(balance, csc)
        for start in range(0, csc.num_nodes, _CHUNK):
            degree = np.diff(csc.indptr[start : start + _CHUNK + 1])
            (per_node + per_edge * degree).astype(np.int64).tofile(stream)


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(array), _CHUNK):
        yield array[start : start + _CHUNK]


PARTITIONERS: dict[str, Partitioner] = {
    "kaminpar": kaminpar_parts,
    "streaming": streaming_parts,
    "random": random_parts,
}
