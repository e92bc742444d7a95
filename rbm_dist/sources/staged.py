"""A staged source: the arrays of a checked graph in the source's own node order, read by partitioners and shuffle.

indptr.npy indices.npy label.npy split.npy orig_id.npy
feat-00000.npy …           dense features as they were read, in pieces; or the four arrays of sparse ones
feat_scaling.npy …         how they are scaled when they go to the shards (`scaling.py`)

Of one on remote storage, the rows that are asked for are read, and the partitioner's edges come through the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from rbm_dist import storage
from rbm_dist.graph.csc import Csc
from rbm_dist.graph.shards import ORIG_NAME, PER_ROW, SPARSE_FEAT, sparse_arrays, sparse_matrix
from rbm_dist.sources.scaling import SCALING, Moments, Scaling
from rbm_dist.sources.source import SourceGraph


def write_source(url: str, graph: SourceGraph) -> dict[str, storage.FileInfo]:
    """Stage a source's arrays in its own node order, for the partitioner and the shards to read."""
    num_nodes = graph.csc.num_nodes
    orig_id = np.arange(num_nodes) if graph.orig_id is None else graph.orig_id
    whole = {
        "indptr": graph.csc.indptr, "indices": graph.csc.indices, "label": graph.label, "split": graph.split,
        "orig_id": orig_id.astype(np.int64),
    }  # fmt: skip
    if graph.sparse_feat:
        whole |= sparse_arrays(sp.vstack(list(graph.feat_chunks()), format="csr"))
    files = {
        f"{name}.npy": storage.write_array(storage.join(url, f"{name}.npy"), array) for name, array in whole.items()
    }
    if not graph.sparse_feat:
        shape = (num_nodes, graph.num_features)
        files[feat_piece(0)] = storage.write_chunks(
            storage.join(url, feat_piece(0)), np.float32, shape, graph.feat_chunks()
        )
    return files


def feat_piece(piece: int) -> str:
    """The file of a staged source that holds a piece of its dense features."""
    return f"feat-{piece:05d}.npy"


class RowPieces:
    """Rows that lie end to end in several arrays.

    ends: the rows up to each array's end, so that none need be looked at for it.
    """

    def __init__(self, pieces: Sequence[storage.Rows], ends: Sequence[int] | None = None):
        self._pieces = pieces
        self._ends = np.cumsum([len(piece) for piece in pieces]) if ends is None else np.asarray(ends)
        self.shape = (int(self._ends[-1]), *pieces[0].shape[1:])

    def __getitem__(self, rows: slice) -> np.ndarray:
        starts = np.concatenate([[0], self._ends[:-1]])
        overlapping = (starts < rows.stop) & (self._ends > rows.start)
        found = [
            self._pieces[at][max(rows.start - starts[at], 0) : rows.stop - starts[at]]
            for at in np.flatnonzero(overlapping).tolist()
        ]
        return found[0] if len(found) == 1 else np.concatenate([self._pieces[0][0:0], *found])


class SparseRows:
    """The rows of a CSR matrix over the four arrays of `sparse_arrays`."""

    def __init__(self, indptr: storage.Rows, indices: storage.Rows, values: storage.Rows, shape: storage.Rows):
        self._indptr, self._indices, self._values = indptr, indices, values
        self.shape = tuple(shape[0:2].tolist())

    @property
    def nnz(self) -> int:
        """How many values are stored."""
        return len(self._values)

    def __getitem__(self, rows: slice) -> sp.csr_array:
        indptr = self._indptr[rows.start : rows.stop + 1]
        stored = slice(int(indptr[0]), int(indptr[-1]))
        shape = np.array([len(indptr) - 1, self.shape[1]])
        return sparse_matrix(indptr - indptr[0], self._indices[stored], self._values[stored], shape)


def write_scaling(url: str, scaling: Scaling, moments: Moments) -> dict[str, storage.FileInfo]:
    """How the staged features are scaled on the way to the shards, and the columns' statistics."""
    arrays = scaling.as_arrays() | {"feat_moments": moments.as_array()}
    return {f"{name}.npy": storage.write_array(storage.join(url, f"{name}.npy"), each) for name, each in arrays.items()}


@dataclass(frozen=True)
class StagedSource:
    """A staged source, of which rows are read."""

    indptr: storage.Rows  # [N + 1] int64, with `indices` the in-edges, as those of a `Csc`
    indices: storage.Rows  # [M]
    feat: RowPieces | SparseRows  # [N, F] float32, as it was read: NaN where a value is missing
    per_row: dict[str, storage.Rows]  # [N] each: label int64, split int8, orig_id int64, and orig_name if ids are bytes
    scaling: Scaling | None = None  # None: features are what was read

    @property
    def num_features(self) -> int:
        return self.feat.shape[1] if self.scaling is None else self.scaling.num_features

    @property
    def num_nodes(self) -> int:
        return len(self.indptr) - 1

    @property
    def num_edges(self) -> int:
        return len(self.indices)

    def edges(self, rows: slice) -> Csc:
        """The in-edges of some rows."""
        indptr = self.indptr[rows.start : rows.stop + 1]
        return Csc(indptr - indptr[0], self.indices[int(indptr[0]) : int(indptr[-1])])

    def features(self, rows: slice) -> np.ndarray | sp.csr_array:
        """The features that are learned from, `[n, num_features]` float32."""
        feat = self.feat[rows]
        return feat if self.scaling is None else self.scaling.apply(feat)

    @classmethod
    def open(
        cls, url: str, files: dict[str, storage.FileInfo], feat_ends: Sequence[int] | None = None
    ) -> "StagedSource":
        """feat_ends: as `source.json` has it; without it, every piece of features is looked at."""

        def array(name: str) -> storage.Rows:
            return storage.open_rows(storage.join(url, name), files[name])

        if f"{SPARSE_FEAT[0]}.npy" in files:
            feat: RowPieces | SparseRows = SparseRows(*(array(f"{name}.npy") for name in SPARSE_FEAT))
        else:
            feat = RowPieces([array(name) for name in sorted(files) if name.startswith("feat-")], feat_ends)
        scaling = None
        if f"{SCALING[0]}.npy" in files:
            scaling = Scaling.from_arrays({name: array(f"{name}.npy")[:] for name in SCALING})
        names = [name for name in (*PER_ROW, ORIG_NAME) if f"{name}.npy" in files]
        per_row = {name: array(f"{name}.npy") for name in names}
        return cls(array("indptr.npy"), array("indices.npy"), feat, per_row, scaling)


def open_edges(url: str, files: dict[str, storage.FileInfo]) -> Csc:
    """All edges of a staged source, memory-mapped."""
    names = ("indptr.npy", "indices.npy")
    return Csc(*(storage.open_array(storage.join(url, name), files[name]) for name in names))
