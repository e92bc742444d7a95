"""The streaming partitioner: passes over the memory-mapped CSC in node order, each node to its best part at once.

Linear deterministic greedy (LDG; Stanton & Kliot, Streaming Graph Partitioning for Large Distributed Graphs, 2012),
streamed again with what the pass before decided (Nishimura & Ugander, Restreaming Graph Partitioning, 2013). The order
is that of the ids: the disk is read from end to end, and ids often have locality that a random order would lose.
"""

import math

import numpy as np
from numba import njit

from rbm_dist.graph.csc import Csc
from rbm_dist.randomness.bits import mix


def stream(
    csc: Csc, num_parts: int, imbalance: float, passes: int, seed: int, per_node: int = 1, per_edge: int = 0
) -> np.ndarray:
    """The part of every node, `[N]` int32, after one pass and `passes` further ones.

    A node of d in-edges weighs `per_node + per_edge · d` (integers; at least 1). A part takes a node while it stays
    within `1 + imbalance` times the mean weight, rounded up; a node that fits nowhere goes to the lightest part, which
    happens only if weights differ. Only in-neighbours attract a node: of a directed graph, those at its out-edges do
    not. Ties are broken by a hash of (seed, node, part). Memory: 4 bytes per node, 24 per part.
    """
    part_N = np.full(csc.num_nodes, -1, np.int32)
    total = per_node * csc.num_nodes + per_edge * csc.num_edges
    capacity = math.floor((1 + imbalance) * -(-total // num_parts))
    for _ in range(passes + 1):
        if not _pass(csc.indptr, csc.indices, part_N, num_parts, capacity, np.uint64(seed), per_node, per_edge):
            break  # nothing changed, nor would it in another pass
    return part_N


@njit(cache=True, nogil=True)
def _pass(indptr, indices, part_N, num_parts, capacity, seed, per_node, per_edge):  # type: ignore[no-untyped-def]
    """Assign every node anew; -1: not yet assigned. Gives how many changed their part."""
    load_P = np.zeros(num_parts, np.int64)  # weights of this pass alone: a part is filled anew
    count_P = np.zeros(num_parts, np.int64)  # neighbours of the node at hand in each part
    near_P = np.empty(num_parts, np.int64)  # the parts in which it has any
    changed = 0
    for v in range(len(part_N)):
        num_near = 0
        for e in range(indptr[v], indptr[v + 1]):
            p = part_N[indices[e]]
            if p >= 0:
                if count_P[p] == 0:
                    near_P[num_near] = p
                    num_near += 1
                count_P[p] += 1
        weight = per_node + per_edge * (indptr[v + 1] - indptr[v])
        best, best_score = -1, 0.0
        for p in near_P[:num_near]:
            if load_P[p] + weight <= capacity:
                score = count_P[p] * (1.0 - load_P[p] / capacity)
                if best < 0 or score > best_score or (score == best_score and _hash(seed, v, p) > _hash(seed, v, best)):
                    best, best_score = p, score
            count_P[p] = 0
        if best < 0:
            best = _lightest(load_P, seed, v)
        load_P[best] += weight
        changed += part_N[v] != best
        part_N[v] = best
    return changed


@njit(cache=True, nogil=True)
def _lightest(load_P, seed, v):  # type: ignore[no-untyped-def]
    best = 0
    for p in range(1, len(load_P)):
        if load_P[p] < load_P[best] or (load_P[p] == load_P[best] and _hash(seed, v, p) > _hash(seed, v, best)):
            best = p
    return best


@njit(inline="always")
def _hash(seed, v, p):  # type: ignore[no-untyped-def]
    return mix(mix(seed, np.uint64(v)), np.uint64(p))
