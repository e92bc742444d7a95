"""Partitioners: graph → part of every node. All take a `Csc`, all are deterministic in their seed."""

import tempfile
from pathlib import Path
from typing import Protocol

import numpy as np

from rbm_dist.config import PartitionConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.csc import Csc, build, destinations
from rbm_dist.graph.random_bits import generator


class Partitioner(Protocol):
    def __call__(self, csc: Csc, num_parts: int, imbalance: float, seed: int) -> np.ndarray:
        """The part of every node, `[N]` int32 in `[0, num_parts)`."""
        ...


def partition(csc: Csc, config: PartitionConfig, seed: int) -> np.ndarray:
    """Assign every node to a part by the configured method. Raises `InputError` if there are more parts than nodes."""
    if config.num_parts > csc.num_nodes:
        raise InputError(f"partition.num_parts: {config.num_parts} parts for a graph of {csc.num_nodes} node(s)")
    return PARTITIONERS[config.method](csc, config.num_parts, config.imbalance, seed)


def random_parts(csc: Csc, num_parts: int, imbalance: float, seed: int) -> np.ndarray:
    """A seeded shuffle dealt out evenly: parts differ by at most one node."""
    part_N = np.arange(csc.num_nodes, dtype=np.int32) % num_parts
    return generator(seed, num_parts).permutation(part_N)


def kaminpar_parts(csc: Csc, num_parts: int, imbalance: float, seed: int) -> np.ndarray:
    """KaMinPar's `fast` preset on the undirected graph (Gottesbüren et al., Deep Multilevel Graph Partitioning, 2021).

    One thread: with more, its result depends on their timing, and a run that was killed could not be repeated.
    """
    import kaminpar

    if num_parts == 1:
        return np.zeros(csc.num_nodes, np.int32)
    if csc.num_edges == 0:
        return random_parts(csc, num_parts, imbalance, seed)
    graph = build(csc.indices, destinations(csc), csc.num_nodes, undirected=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.parhip"
        _write_parhip(path, graph)
        loaded = kaminpar.load_graph(str(path), kaminpar.GraphFileFormat.PARHIP)
    kaminpar.reseed(seed)
    solver = kaminpar.KaMinPar(1, kaminpar.fast_context())
    return np.asarray(solver.compute_partition(loaded, num_parts, imbalance), np.int32)


def edge_cut(csc: Csc, part_N: np.ndarray) -> int:
    """Edges whose ends lie in different parts."""
    return int(np.sum(part_N[csc.indices] != part_N[destinations(csc)]))


def _write_parhip(path: Path, graph: Csc) -> None:
    # ParHIP binary: version (3: unweighted, 64 bit), n, m, then n + 1 offsets in bytes, then the targets.
    header = np.array([3, graph.num_nodes, graph.num_edges], np.uint64)
    offsets = np.uint64(header.nbytes + 8 * (graph.num_nodes + 1)) + graph.indptr.astype(np.uint64) * np.uint64(8)
    with open(path, "wb") as stream:
        header.tofile(stream)
        offsets.tofile(stream)
        for start in range(0, graph.num_edges, 1 << 22):
            graph.indices[start : start + (1 << 22)].astype(np.uint64).tofile(stream)


PARTITIONERS: dict[str, Partitioner] = {"kaminpar": kaminpar_parts, "random": random_parts}
