"""Hot nodes: of the nodes that other hosts hold, the rows of those that mini-batches need most often are kept here.

Which these are is found by sampling a few batches beforehand and counting (pre-sampling: Yang et al., GNNLab, EuroSys
2022): that is the sampling probability, whatever the degrees, the fan-out and the seeds.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rbm_dist.graph.store import GraphStore

_SLICE = 1 << 22  # nodes looked at together, when all are


class HotRows:
    """Rows of one array for some nodes, `[k, F]`, and how often they were asked for."""

    def __init__(self, name: str, ids_k: np.ndarray, rows_kF: np.ndarray):
        """ids_k: ascending."""
        self.name = name
        self._ids_k, self._rows_kF = ids_k, rows_kF
        self._asked = self._hits = 0

    def __len__(self) -> int:
        return len(self._ids_k)

    def find(self, ids_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which nodes have their row here, `[n]` bool, and these nodes' rows."""
        at_n = np.searchsorted(self._ids_k, ids_n)
        at_n[at_n == len(self._ids_k)] = 0
        found_n = self._ids_k[at_n] == ids_n if len(self._ids_k) else np.zeros(len(ids_n), bool)
        self._asked += len(ids_n)
        self._hits += int(found_n.sum())
        return found_n, self._rows_kF[at_n[found_n]]

    def take_counts(self) -> tuple[int, int]:
        """How many rows of other hosts were needed since the last call, and how many of them were here."""
        counts, self._asked, self._hits = (self._asked, self._hits), 0, 0
        return counts


def fill_hot(
    store: "GraphStore", name: str, budget: int, batches: Iterable[tuple[np.ndarray, int]], fanout: tuple[int, ...]
) -> None:
    """Fill the store's cache of a dense array with up to `budget` bytes of other hosts' rows.

    batches: seeds, and the key of their sample. Samples these batches; holds two bytes per node of the graph meanwhile.
    """
    row = store.stored_rows(name, np.empty(0, np.int64))
    count = budget // max(1, row.dtype.itemsize * int(np.prod(row.shape[1:])))
    ids_k = _most_sampled(store, batches, fanout, count)
    store.hot = HotRows(name, ids_k, store.stored_rows(name, ids_k))


def _most_sampled(
    store: "GraphStore", batches: Iterable[tuple[np.ndarray, int]], fanout: tuple[int, ...], count: int
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
