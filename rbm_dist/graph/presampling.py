"""Which nodes of other hosts mini-batches need most often: found by sampling a few batches beforehand and counting.

Pre-sampling (Yang et al., GNNLab, EuroSys 2022) gives the sampling probability, whatever the degrees, the fan-out and
the seeds.
"""

from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from rbm_dist.graph.hot_rows import HotRows
from rbm_dist.graph.store import GraphStore

_SLICE = 1 << 22  # nodes looked at together, when all are


def fill_hot(
    store: GraphStore, name: str, budget: int, batches: Iterable[tuple[np.ndarray, int]], fanout: tuple[int, ...]
) -> None:
    """Fill the store's cache of a dense array with up to `budget` bytes of other hosts' rows.

    batches: seeds, and the key of their sample. Samples these batches; holds two bytes per node of the graph meanwhile.
    """
    row = store.stored_rows(name, np.empty(0, np.int64))
    count = budget // max(1, row.dtype.itemsize * int(np.prod(row.shape[1:])))
    ids_k = _most_sampled(store, batches, fanout, count)
    store.hot = HotRows(name, ids_k, store.stored_rows(name, ids_k))


def _most_sampled(
    store: GraphStore, batches: Iterable[tuple[np.ndarray, int]], fanout: tuple[int, ...], count: int
) -> np.ndarray:
    """The `count` nodes of other hosts that occur in most of the batches, ascending; none that occurs in none."""
    times_N = np.zeros(store.num_nodes, np.uint16)
    for seeds, key in batches:
        times_N[store.sample(seeds, fanout, key).nodes] += 1
    for part in store.held_parts:
        times_N[store.offsets[part] : store.offsets[part + 1]] = 0
    slices = [*range(0, store.num_nodes, _SLICE), store.num_nodes]
    nodes_by_times = np.zeros(np.iinfo(np.uint16).max + 1, np.int64)
    for first, stop in pairwise(slices):  # a histogram of all nodes at once would copy them as int64
        nodes_by_times += np.bincount(times_N[first:stop], minlength=len(nodes_by_times))
    at_least = np.cumsum(nodes_by_times[::-1])[::-1]
    times = max(1, int(np.argmax(at_least <= count)))  # whoever occurs so often fits, and some that occur once less
    often = np.flatnonzero(times_N >= times)
    if times == 1:
        return often
    return np.union1d(often, np.flatnonzero(times_N == times - 1)[: count - len(often)])
