"""What is to become of a graph: nodes that are new, edges that are new or gone, features that are others now.

Held in memory, and kept as arrays in a folder. Node ids are those of the new version: new nodes come after all others.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import scipy.sparse as sp

from rbm_dist import storage
from rbm_dist.graph.shards import ORIG_NAME, PER_ROW, SPARSE_FEAT, sparse_arrays, sparse_matrix
from rbm_dist.graph.store import StoredRows

ARRAYS = (
    rf"(added_edges|dropped_edges|changed_id|(new|changed)_({'|'.join(('feat', ORIG_NAME, *PER_ROW, *SPARSE_FEAT))}))"
)
"""A regular expression of the names of the arrays that changes are kept as."""


@dataclass(frozen=True)
class Changes:
    """All that has changed."""

    new: dict[str, np.ndarray]  # of new nodes: `label`, `split`, `orig_id` and, where ids are bytes, `orig_name`
    new_feat: StoredRows  # [n, F] float32
    added_m2: np.ndarray  # [m, 2] int64: destinations and sources of new edges, each once, ascending
    dropped_m2: np.ndarray  # those of edges that are gone
    changed_c: np.ndarray  # [c] int64: nodes of the graph with other features, ascending
    changed_feat: StoredRows  # [c, F] float32

    @property
    def num_new(self) -> int:
        return len(self.new["label"])

    def write(self, url: str) -> dict[str, storage.FileInfo]:
        """Keep them as arrays below a folder; gives these files."""
        arrays = {f"new_{name}": array for name, array in self.new.items()}
        arrays |= {"added_edges": self.added_m2, "dropped_edges": self.dropped_m2, "changed_id": self.changed_c}
        for prefix, feat in (("new", self.new_feat), ("changed", self.changed_feat)):
            rows = {"feat": feat} if isinstance(feat, np.ndarray) else sparse_arrays(feat)
            arrays |= {f"{prefix}_{name}": array for name, array in rows.items()}
        return {f"{name}.npy": storage.write_array(storage.join(url, f"{name}.npy"), arrays[name]) for name in arrays}

    @classmethod
    def open(cls, url: str, files: dict[str, storage.FileInfo]) -> Self:
        """Those that were kept below a folder, memory-mapped."""

        def array(name: str) -> np.ndarray:
            return storage.open_array(storage.join(url, f"{name}.npy"), files[f"{name}.npy"])

        def feat(prefix: str) -> StoredRows:
            if f"{prefix}_feat.npy" in files:
                return array(f"{prefix}_feat")
            return sparse_matrix(*(array(f"{prefix}_{name}") for name in SPARSE_FEAT))

        names = [name for name in (*PER_ROW, ORIG_NAME) if f"new_{name}.npy" in files]
        new = {name: array(f"new_{name}") for name in names}
        added_m2, dropped_m2 = array("added_edges"), array("dropped_edges")
        return cls(new, feat("new"), added_m2, dropped_m2, array("changed_id"), feat("changed"))


def edge_list(dst_M: np.ndarray, src_M: np.ndarray) -> np.ndarray:
    """Destinations and sources as `[m, 2]` int64, each edge once, ascending; self-loops left out."""
    pairs_M2 = np.stack([dst_M, src_M], axis=1).astype(np.int64, copy=False)
    return _edges(np.unique(_words(pairs_M2[pairs_M2[:, 0] != pairs_M2[:, 1]])))


def both_lists(one_m2: np.ndarray, other_m2: np.ndarray) -> np.ndarray:
    """The edges that two such lists have in common."""
    return _edges(np.intersect1d(_words(one_m2), _words(other_m2), assume_unique=True))


def _words(edges_m2: np.ndarray) -> np.ndarray:
    """Edges as numbers that are ordered as they are: ids stay below 2³¹."""
    return edges_m2[:, 0] << 32 | edges_m2[:, 1]


def _edges(word_m: np.ndarray) -> np.ndarray:
    return np.stack([word_m >> 32, word_m & ((1 << 32) - 1)], axis=1)


def in_range(edges_m2: np.ndarray, low: int, high: int) -> np.ndarray:
    """Of such edges those whose destinations lie in `[low, high)`."""
    first, stop = np.searchsorted(edges_m2[:, 0], [low, high])
    return np.asarray(edges_m2[first:stop])


def no_rows(num_features: int, sparse: bool) -> StoredRows:
    """Features of no node."""
    shape = (0, num_features)
    return sp.csr_array(shape, dtype=np.float32) if sparse else np.empty(shape, np.float32)
