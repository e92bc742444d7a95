"""What a partition costs: the edges it cuts, how even its parts are, and the remote nodes that each part must read."""

from typing import Any

import numpy as np
from numba import njit

from rbm_dist.graph.csc import Csc

_GROUP = 64  # parts whose halos are marked at once, in the bits of one word per node


def partition_report(csc: Csc, part_N: np.ndarray, num_parts: int) -> dict[str, Any]:
    """The figures of a partition, `part_N` `[N]` integers in `[0, num_parts)`. An edge is its destination's part's.

    `edge_cut`: edges whose ends lie in different parts, and `cut_share` of all edges; `node_balance`, `edge_balance`:
    the largest part over the mean; `replication`: nodes that the parts own or read, over N; `parts`: for each its
    `nodes`, `edges` and `halo`, the distinct remote sources of its edges. Memory: 8 bytes per node; one pass over the
    edges for every 64 parts.
    """
    cut, halo_P = 0, np.zeros(num_parts, np.int64)
    nodes_P, edges_P = np.zeros((2, num_parts), np.int64)
    for first in range(0, num_parts, _GROUP):
        readers_N = np.zeros(csc.num_nodes, np.uint64)
        cut += _mark(csc.indptr, csc.indices, part_N, first, readers_N, nodes_P, edges_P)
        _count_bits(readers_N, halo_P[first : first + _GROUP])
    return figures(cut, nodes_P, edges_P, halo_P)


def figures(cut: int, nodes_P: np.ndarray, edges_P: np.ndarray, halo_P: np.ndarray) -> dict[str, Any]:
    """The figures of a partition from what was counted of each part."""
    return {
        "edge_cut": int(cut),
        "cut_share": float(cut / max(edges_P.sum(), 1)),
        "node_balance": _balance(nodes_P),
        "edge_balance": _balance(edges_P),
        "replication": float(nodes_P.sum() + halo_P.sum()) / max(nodes_P.sum(), 1),
        "parts": [
            {"nodes": int(nodes), "edges": int(edges), "halo": int(halo)}
            for nodes, edges, halo in zip(nodes_P, edges_P, halo_P, strict=True)
        ],
    }


def count_halo(indices: np.ndarray, low: int, high: int, num_nodes: int) -> tuple[int, int]:
    """How many of a part's edges come from other parts, and from how many nodes. The part's are `[low, high)`."""
    read_N = np.zeros(num_nodes, np.bool_)
    return _mark_read(indices, low, high, read_N), int(read_N.sum())


@njit(cache=True, nogil=True)
def _mark_read(indices, low, high, read_N):  # type: ignore[no-untyped-def]
    cut = 0
    for u in indices:
        if u < low or u >= high:
            cut += 1
            read_N[u] = True
    return cut


def _balance(size_P: np.ndarray) -> float:
    return float(size_P.max() / size_P.mean()) if size_P.any() else 1.0


@njit(cache=True, nogil=True)
def _mark(indptr, indices, part_N, first, readers_N, nodes_P, edges_P):  # type: ignore[no-untyped-def]
    """Count nodes and edges of the parts from `first` on; set bit i of a node that part `first + i` reads remotely."""
    cut = 0
    for v in range(len(part_N)):
        part = part_N[v]
        if first <= part < first + _GROUP:
            bit = np.uint64(1) << np.uint64(part - first)
            nodes_P[part] += 1
            edges_P[part] += indptr[v + 1] - indptr[v]
            for e in range(indptr[v], indptr[v + 1]):
                u = indices[e]
                if part_N[u] != part:
                    cut += 1
                    readers_N[u] |= bit
    return cut


@njit(cache=True, nogil=True)
def _count_bits(words_N, count_P):  # type: ignore[no-untyped-def]
    for word in words_N:
        p = 0
        while word:
            count_P[p] += np.int64(word & np.uint64(1))
            word >>= np.uint64(1)
            p += 1
