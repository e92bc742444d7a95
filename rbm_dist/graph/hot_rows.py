"""Hot nodes: of the nodes that other hosts hold, the rows of those that mini-batches need most often are kept here."""

import numpy as np


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
