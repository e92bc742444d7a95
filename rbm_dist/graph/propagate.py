"""Propagation: for some nodes, the mean of their in-neighbours' rows of any array of the store.

Memory is bounded whatever the degrees: rows are gathered for so many edges at a time, and a node with more in-edges
than that is summed in several slices. Label propagation and positional encodings are made of this one step, and so are
those of nodes that arrive later, whose edges are not the store's.
"""

from collections.abc import Iterator

import numpy as np
from numba import njit

from rbm_dist.graph.splits import UNSEEN
from rbm_dist.graph.store import GraphStore

_BYTES = 1 << 25  # of rows gathered, or computed, at a time


def mean_of_neighbours(store: GraphStore, name: str, ids: np.ndarray, observed_only: bool = False) -> np.ndarray:
    """The mean over all in-neighbours of their rows of the array `name` (`[N, D]` float32), `[n, D]` float32.

    Zeros for a node without in-neighbours. observed_only: in-neighbours of the split UNSEEN do not count.
    """
    mean_nD = np.empty((len(ids), store.width((name,))), np.float32)
    for part, at, rows in _by_part(store, ids):
        indptr, indices = store.array("indptr", part), store.array("indices", part)
        mean_nD[at] = mean_of_sources(store, name, indptr, indices, rows, observed_only)
    return mean_nD


def in_degree(store: GraphStore, ids: np.ndarray, observed_only: bool = False) -> np.ndarray:
    """The number of in-neighbours, `[n]` int64. observed_only: those of the split UNSEEN do not count."""
    count_n = np.zeros(len(ids), np.int64)
    for part, at, rows in _by_part(store, ids):
        indptr = store.array("indptr", part)
        if not observed_only:
            count_n[at] = indptr[rows + 1] - indptr[rows]
            continue
        for nodes, sources, ends in _edge_slices(indptr, store.array("indices", part), rows, _rows_at_a_time(1)):
            count_n[at[nodes]] += np.diff(_observed(store, sources, ends)[1])
    return count_n


def _by_part(store: GraphStore, ids: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The parts that own some of the nodes, with the positions of these in `ids`, and their rows in the part."""
    owner = store.owner(ids)
    for part in np.unique(owner).tolist():
        at = np.flatnonzero(owner == part)
        yield part, at, ids[at] - store.offsets[part]


def _observed(store: GraphStore, sources: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the edges of `_edge_slices` those whose sources are not of the split UNSEEN."""
    seen = store.gather("split", sources) != UNSEEN
    return sources[seen], np.concatenate([[0], np.cumsum(seen)])[ends]


def mean_of_sources(
    store: GraphStore, name: str, indptr: np.ndarray, indices: np.ndarray, rows: np.ndarray, observed_only: bool
) -> np.ndarray:
    """As `mean_of_neighbours`, of some rows of a CSC whose sources (`indices`) are nodes of the store."""
    width = store.width((name,))
    sum_nD, count_n = np.zeros((len(rows), width), np.float32), np.zeros(len(rows), np.float32)
    for nodes, sources, ends in _edge_slices(indptr, indices, rows, _rows_at_a_time(width)):
        if observed_only:
            sources, ends = _observed(store, sources, ends)
        distinct, position = np.unique(sources, return_inverse=True)
        _add_rows(ends, position, store.gather(name, distinct), sum_nD[nodes])
        count_n[nodes] += np.diff(ends)
    return sum_nD / np.maximum(count_n, 1)[:, None]


@njit(cache=True, nogil=True)
def _add_rows(ends, position, rows, sum_nD):  # type: ignore[no-untyped-def]
    """Add to each node its sources' rows; twice as fast as a sparse product, which multiplies by ones."""
    for n in range(len(sum_nD)):
        sum_D = sum_nD[n]
        for i in range(ends[n], ends[n + 1]):
            row_D = rows[position[i]]
            for d in range(len(sum_D)):
                sum_D[d] += row_D[d]


def unit_length(x_nD: np.ndarray) -> np.ndarray:
    """Rows of length one; those of zeros stay as they are."""
    return _divide(x_nD, np.linalg.norm(x_nD, axis=1, keepdims=True))


def unit_sum(x_nC: np.ndarray) -> np.ndarray:
    """Rows that sum to one; those of zeros stay as they are."""
    return _divide(x_nC, x_nC.sum(1, keepdims=True))


SCALES = {"pos": unit_length, "prop": unit_sum}
"""How the rows of each encoding are scaled."""


def _divide(x_nD: np.ndarray, size_n1: np.ndarray) -> np.ndarray:
    return x_nD / np.where(size_n1 > 0, size_n1, 1)


def batches(ids: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """Nodes in batches whose rows of `width` float32 fit the same bound."""
    size = _rows_at_a_time(width)
    return (ids[start : start + size] for start in range(0, len(ids), size))


def _rows_at_a_time(width: int) -> int:
    return max(1, _BYTES // (4 * width))


def _edge_slices(
    indptr: np.ndarray, indices: np.ndarray, rows: np.ndarray, size: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """The in-edges of some rows of a CSC, `size` at a time.

    Gives the nodes that the slice touches, as positions in `rows`; the edges' sources; and where each node's begin
    and end, one entry more than nodes.
    """
    starts = indptr[rows]
    bounds = np.concatenate([[0], np.cumsum(indptr[rows + 1] - starts)])  # if the edges of `rows` were laid end to end
    for low in range(0, int(bounds[-1]), size):
        high = min(low + size, int(bounds[-1]))
        first, last = np.searchsorted(bounds, low, side="right") - 1, np.searchsorted(bounds, high)
        ends = np.clip(bounds[first : last + 1], low, high) - low
        edges = np.repeat(starts[first:last] - bounds[first:last], np.diff(ends)) + np.arange(low, high)
        yield slice(first, last), indices[edges], ends
