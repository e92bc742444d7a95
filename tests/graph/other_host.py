"""Parts that another host holds, in this process: answers come in pieces, and not in order."""

from collections.abc import Iterator

import numpy as np

from rbm_dist.graph.store import GraphStore, StoredRows


class OtherHost:
    """A store that answers for parts that another store does not hold."""

    def __init__(self, url: str):
        self._store = GraphStore.open(url)
        self.asked: list[np.ndarray] = []

    def gather(self, name: str, ids: np.ndarray) -> Iterator[tuple[np.ndarray, StoredRows]]:
        self.asked.append(ids)
        return ((at, self._store.stored_rows(name, ids[at])) for at in self._pieces(len(ids)))

    def in_edges(self, ids: np.ndarray, width: int, key: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        self.asked.append(ids)
        return ((at, *self._store.in_edges(ids[at], width, key)) for at in self._pieces(len(ids)))

    def _pieces(self, count: int) -> list[np.ndarray]:
        return [np.arange(first, count, 3) for first in (2, 0, 1) if first < count]
