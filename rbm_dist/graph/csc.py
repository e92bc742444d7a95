"""A graph as the CSC of its in-edges: building it from any edge list, and checking one that came from outside."""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp


@dataclass(frozen=True)
class Csc:
    """In-edges of N nodes: the sources of node v are `indices[indptr[v]:indptr[v + 1]]`, ascending."""

    indptr: np.ndarray  # [N + 1] int64
    indices: np.ndarray  # [M] int32 while ids fit, else int64

    @property
    def num_nodes(self) -> int:
        return len(self.indptr) - 1

    @property
    def num_edges(self) -> int:
        return len(self.indices)


def id_dtype(num_nodes: int) -> np.dtype:
    """The dtype of node ids: 32-bit while they fit."""
    return np.dtype(np.int32 if num_nodes <= np.iinfo(np.int32).max else np.int64)


def build(src_M: np.ndarray, dst_M: np.ndarray, num_nodes: int, undirected: bool) -> Csc:
    """The CSC of an edge list, without self-loops and duplicates, with every edge's reverse if `undirected`.

    A model adds a node's own features itself, so a self-loop would count it twice.
    """
    keep = src_M != dst_M
    src_M, dst_M = src_M[keep], dst_M[keep]
    if undirected:
        src_M, dst_M = np.concatenate([src_M, dst_M]), np.concatenate([dst_M, src_M])
    matrix = sp.csc_array((np.ones(len(src_M), bool), (src_M, dst_M)), shape=(num_nodes, num_nodes))
    matrix.sum_duplicates()
    matrix.sort_indices()
    return Csc(matrix.indptr.astype(np.int64), matrix.indices.astype(id_dtype(num_nodes)))


def destinations(csc: Csc) -> np.ndarray:
    """The destination of every edge, `[M]`."""
    return np.repeat(np.arange(csc.num_nodes, dtype=csc.indices.dtype), np.diff(csc.indptr))


def problem(indptr: np.ndarray, indices: np.ndarray, num_nodes: int, num_sources: int) -> str | None:
    """What is wrong with a compressed sparse matrix of `num_nodes` rows over `num_sources` columns; None if nothing."""
    if not (np.issubdtype(indptr.dtype, np.integer) and np.issubdtype(indices.dtype, np.integer)):
        return f"indptr and indices must be integers, found {indptr.dtype} and {indices.dtype}"
    if indptr.ndim != 1 or indices.ndim != 1:
        return "indptr and indices must be one-dimensional"
    if len(indptr) != num_nodes + 1:
        return f"indptr has {len(indptr):,} entries, {num_nodes:,} rows need {num_nodes + 1:,}"
    if indptr[0] != 0 or indptr[-1] != len(indices):
        return f"indptr runs from {indptr[0]} to {indptr[-1]}, but there are {len(indices):,} indices"
    falls = np.flatnonzero(indptr[1:] < indptr[:-1])  # a difference of unsigned integers would never be negative
    if len(falls):
        return f"indptr decreases after row {falls[0]}"
    if len(indices) and (indices.min() < 0 or indices.max() >= num_sources):
        outside = np.flatnonzero((indices < 0) | (indices >= num_sources))
        return f"{len(outside):,} indices are out of range, first {indices[outside[0]]} (valid: 0 to {num_sources - 1})"
    return None
