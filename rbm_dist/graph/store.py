"""The graph store: named per-node arrays and neighbour samples over all parts, by node id.

Parts on a local (or shared) file system are memory-mapped; parts on an object store come through the local cache.
Everything a node has is a named array: the base ones of `graph.json`, and those that stages add, each with an index
file `<name>.json` written when the array is complete in all parts.
"""

from collections.abc import Iterable
from functools import cached_property

import numpy as np
import scipy.sparse as sp

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.graph import csc as csc_
from rbm_dist.graph.csc import Csc
from rbm_dist.graph.quantised import decode
from rbm_dist.graph.sampler import Sample, Sampler
from rbm_dist.graph.sampler_backends import make_sampler
from rbm_dist.graph.shards import FEAT_SCALE, ORIG_NAME, QUANTISED, SPARSE_FEAT, VERSION, part_name, sparse_matrix

# Checked when they are used: arrays that have not one row per node.
_NOT_BY_NODE = ("indptr", "indices", *SPARSE_FEAT)


class GraphStore:
    """An opened graph. `open` it; the arrays are mapped when first asked for."""

    def __init__(self, url: str, index: dict, sampler: str):
        self.url = url
        self.offsets = np.asarray(index["offsets"], np.int64)
        self.num_nodes: int = index["num_nodes"]
        self.num_edges: int = index["num_edges"]
        self.num_features: int = index["num_features"]
        self.num_classes: int = index["num_classes"]
        self.num_parts = len(self.offsets) - 1
        self.sparse_features: bool = index["sparse_features"]
        self.named = ORIG_NAME in index["dtypes"]  # whether the caller's ids are strings
        self._sparse: dict[int, sp.csr_array] = {}
        self._files: dict[str, storage.FileInfo] = index["files"]
        self._arrays: dict[tuple[str, int], np.ndarray] = {}
        self._sampler_name = sampler
        self._sampler: Sampler | None = None

    @classmethod
    def open(cls, url: str, sampler: str = "numba", verify: bool = False) -> "GraphStore":
        """Open the graph at `url`.

        Raises `InputError` if it is not there, of another version, or (with `verify`) if a file is damaged.
        """
        index = storage.read_json(storage.join(url, "graph.json"))
        if not isinstance(index, dict) or index.get("version") not in (VERSION, QUANTISED):
            raise InputError(
                f"{url}/graph.json: not a graph of layout version {VERSION} or {QUANTISED}; partition the source again"
            )
        if verify:
            storage.verify(url, index["files"])
        return cls(url, index, sampler)

    def ids(self, part: int) -> np.ndarray:
        """The node ids that a part owns, ascending."""
        return np.arange(self.offsets[part], self.offsets[part + 1])

    def array(self, name: str, part: int) -> np.ndarray:
        """The rows of a named array that a part owns, memory-mapped, in the order of `ids(part)`; `feat` as stored.

        Raises `InputError` if the array is missing, truncated, or has not one row per node.
        """
        if (name, part) not in self._arrays:
            file = f"{part_name(part)}/{name}.npy"
            if file not in self._files:
                self._files |= self._added(name)
            url = storage.join(self.url, file)
            array = storage.open_array(url, self._files.get(file))
            rows = int(self.offsets[part + 1] - self.offsets[part])
            if name not in _NOT_BY_NODE and len(array) != rows:
                raise InputError(f"{url}: {len(array):,} rows, part {part} has {rows:,}")
            self._arrays[name, part] = array
        return self._arrays[name, part]

    def gather(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Rows of a named array for any nodes of any parts, `[len(ids), ...]`, as a copy in memory; `feat` as float32.

        Raises `ValueError` if an id is out of range.
        """
        if name == "feat" and self.sparse_features:
            return self._gather_sparse(ids).toarray()
        rows = self._gather_stored(name, ids)
        return decode(rows, self._feat_scale) if name == "feat" else rows

    def _gather_stored(self, name: str, ids: np.ndarray) -> np.ndarray:
        self._check(ids)
        first = self.array(name, 0)
        if self.num_parts == 1:
            return first[ids]
        rows = np.empty((len(ids), *first.shape[1:]), first.dtype)
        owner = np.searchsorted(self.offsets, ids, side="right") - 1
        for part in np.unique(owner):
            at = np.flatnonzero(owner == part)
            rows[at] = self.array(name, part)[ids[at] - self.offsets[part]]
        return rows

    @cached_property
    def _feat_scale(self) -> np.ndarray | None:
        info = self._files.get(FEAT_SCALE)
        return None if info is None else storage.open_array(storage.join(self.url, FEAT_SCALE), info)[:]

    def inputs(self, ids: np.ndarray, names: tuple[str, ...] = ("feat",)) -> np.ndarray | sp.csr_array:
        """The rows of some arrays side by side, `[len(ids), Σ widths]`; sparse if sparse features are among them."""
        if "feat" in names and self.sparse_features:
            arrays = [self._gather_sparse(ids) if name == "feat" else self.gather(name, ids) for name in names]
            return arrays[0] if len(names) == 1 else sp.hstack(arrays, format="csr")
        rows = [self.gather(name, ids) for name in names]
        return rows[0] if len(names) == 1 else np.concatenate(rows, axis=1)

    def width(self, names: tuple[str, ...]) -> int:
        """The number of columns of `inputs`."""
        return sum(self.num_features if name == "feat" else self.array(name, 0).shape[1] for name in names)

    def sample(self, seeds: np.ndarray, fanout: tuple[int, ...], key: int) -> Sample:
        """Sample the neighbourhood of some nodes over all parts; see `Sampler.sample`."""
        if self._sampler is None:
            parts = [self._csc(part) for part in range(self.num_parts)]
            self._sampler = make_sampler(self._sampler_name, parts, self.offsets)
        return self._sampler.sample(seeds, fanout, key)

    def write_part(
        self, name: str, part: int, dtype: np.dtype, row: tuple[int, ...], chunks: Iterable[np.ndarray]
    ) -> storage.FileInfo:
        """Write one part's rows of a new array, given in chunks in the order of `ids(part)`."""
        rows = int(self.offsets[part + 1] - self.offsets[part])
        return storage.write_chunks(storage.join(self.url, part_name(part), f"{name}.npy"), dtype, (rows, *row), chunks)

    def publish(self, name: str, files: list[storage.FileInfo]) -> None:
        """Declare an added array complete; `files` holds `write_part`'s result for every part, in order."""
        index = {f"{part_name(part)}/{name}.npy": info for part, info in enumerate(files)}
        storage.write_json(storage.join(self.url, f"{name}.json"), {"version": VERSION, "files": index})
        self.forget(name)

    def forget(self, name: str) -> None:
        """Unmap an array whose files changed."""
        self._arrays = {key: value for key, value in self._arrays.items() if key[0] != name}
        self._files = {file: info for file, info in self._files.items() if not file.endswith(f"/{name}.npy")}

    def _check(self, ids: np.ndarray) -> None:
        if len(ids) and (ids.min() < 0 or ids.max() >= self.num_nodes):
            raise ValueError(f"ids must lie in [0, {self.num_nodes})")

    def _gather_sparse(self, ids: np.ndarray) -> sp.csr_array:
        self._check(ids)
        if self.num_parts == 1:
            return self._sparse_part(0)[ids]
        owner = np.searchsorted(self.offsets, ids, side="right") - 1
        order = np.argsort(owner, kind="stable")
        parts = [self._sparse_part(part)[ids[owner == part] - self.offsets[part]] for part in np.unique(owner)]
        rows = sp.vstack(parts, format="csr") if parts else self._sparse_part(0)[ids]
        if np.array_equal(order, np.arange(len(ids))):  # batches come part by part
            return rows
        back = np.empty_like(order)
        back[order] = np.arange(len(ids))
        return rows[back]

    def _sparse_part(self, part: int) -> sp.csr_array:
        if part not in self._sparse:
            indptr, indices, values, shape = (self.array(name, part) for name in SPARSE_FEAT)
            expected = (len(self.ids(part)), self.num_features)
            wrong = csc_.problem(indptr, indices, *expected)
            if not wrong and (values.shape != indices.shape or tuple(shape.tolist()) != expected):
                wrong = (
                    f"{len(values):,} values of a matrix {shape.tolist()}, expected {len(indices):,} of {[*expected]}"
                )
            if wrong:
                raise InputError(f"{self.url}/{part_name(part)}: feat: {wrong}")
            self._sparse[part] = sparse_matrix(indptr, indices, values, shape)
        return self._sparse[part]

    def _added(self, name: str) -> dict[str, storage.FileInfo]:
        url = storage.join(self.url, f"{name}.json")
        if not storage.exists(url):
            raise InputError(f"{self.url}: nodes have no array '{name}'; has the stage that makes it been run?")
        return storage.read_json(url)["files"]

    def _csc(self, part: int) -> Csc:
        csc = Csc(self.array("indptr", part), self.array("indices", part))
        wrong = csc_.problem(csc.indptr, csc.indices, csc.num_nodes, self.num_nodes)
        if wrong:
            raise InputError(f"{self.url}/{part_name(part)}: {wrong}")
        return csc
