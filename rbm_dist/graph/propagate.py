"""Propagation: for some nodes, the mean of their in-neighbours' rows of any array of the store.

Memory is bounded whatever the degrees: rows are gathered for so many edges at a time, and a node with more in-edges
than that is summed in several slices. Label propagation and positional encodings are made of this one step.
"""

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from rbm_dist.graph.splits import UNSEEN
from rbm_dist.graph.store import GraphStore

_BYTES = 1 << 25  # of rows gathered, or computed, at a time


def mean_of_neighbours(store: GraphStore, name: str, ids: np.ndarray, observed_only: bool = False) -> np.ndarray:
    """The mean over all in-neighbours of their rows of the array `name` (`[N, D]` float32), `[n, D]` float32.

    Zeros for a node without in-neighbours. observed_only: in-neighbours of the split UNSEEN do not count.
    """
    width = store.array(name, 0).shape[1]
    sum_nD, count_n = torch.zeros(len(ids), width), torch.zeros(len(ids))
    owner = np.searchsorted(store.offsets, ids, side="right") - 1
    for part in np.unique(owner):
        at = np.flatnonzero(owner == part)
        for nodes, sources, ends in _edge_slices(store, part, ids[at], _rows_at_a_time(width)):
            if observed_only:
                seen = store.gather("split", sources) != UNSEEN
                sources, ends = sources[seen], np.concatenate([[0], np.cumsum(seen)])[ends]
            distinct, position = np.unique(sources, return_inverse=True)
            rows = torch.from_numpy(store.gather(name, distinct))
            into = torch.from_numpy(at[nodes])
            sum_nD[into] += F.embedding_bag(
                torch.from_numpy(position), rows, torch.from_numpy(ends), mode="sum", include_last_offset=True
            )
            count_n[into] += torch.from_numpy(np.diff(ends))
    return (sum_nD / count_n.clamp(min=1)[:, None]).numpy()


def batches(ids: np.ndarray, width: int) -> Iterator[np.ndarray]:
    """Nodes in batches whose rows of `width` float32 fit the same bound."""
    size = _rows_at_a_time(width)
    return (ids[start : start + size] for start in range(0, len(ids), size))


def _rows_at_a_time(width: int) -> int:
    return max(1, _BYTES // (4 * width))


def _edge_slices(
    store: GraphStore, part: int, ids: np.ndarray, size: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """The in-edges of nodes of one part, `size` at a time.

    Gives the nodes that the slice touches, as positions in `ids`; the edges' sources; and where each node's begin
    and end, one entry more than nodes.
    """
    indptr, indices = store.array("indptr", part), store.array("indices", part)
    rows = ids - store.offsets[part]
    starts = indptr[rows]
    bounds = np.concatenate([[0], np.cumsum(indptr[rows + 1] - starts)])  # if the edges of `ids` were laid end to end
    for low in range(0, int(bounds[-1]), size):
        high = min(low + size, int(bounds[-1]))
        first, last = np.searchsorted(bounds, low, side="right") - 1, np.searchsorted(bounds, high)
        ends = np.clip(bounds[first : last + 1], low, high) - low
        edges = np.repeat(starts[first:last] - bounds[first:last], np.diff(ends)) + np.arange(low, high)
        yield slice(first, last), indices[edges], ends
