"""The graph store: named per-node arrays and neighbour samples over all parts, by node id.

Parts on a local (or shared) file system are memory-mapped; parts on an object store come through the local cache;
parts that other hosts hold are asked for there (`RemoteParts`), all of them at once, while this host's are read.
Everything a node has is a named array: the base ones of `graph.json`, and those that stages add, each with an index
file `<name>.json` written when the array is complete in all parts.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Protocol, Self, TypeAlias

import numpy as np
import scipy.sparse as sp
from numba import njit

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.graph import csc as csc_
from rbm_dist.graph import soft_rows
from rbm_dist.graph.csc import Csc
from rbm_dist.graph.hot_rows import HotRows
from rbm_dist.graph.quantised import decode
from rbm_dist.graph.sampler import NumbaSampler, RemoteEdges, Sample, Sampler
from rbm_dist.graph.shards import (
    FEAT_SCALE,
    ORIG_NAME,
    QUANTISED,
    SPARSE_FEAT,
    VERSION,
    IdType,
    part_name,
    sparse_matrix,
)

# Checked when they are used: arrays that have not one row per node.
_NOT_BY_NODE = ("indptr", "indices", *SPARSE_FEAT)

SOFT = "soft"
"""The teacher's class distributions, which may be stored in fewer bytes; see `soft_rows.py`."""

StoredRows: TypeAlias = np.ndarray | sp.csr_array
"""Rows of an array, as they are stored: sparse features are a CSR matrix."""


class RemoteParts(RemoteEdges, Protocol):
    """The parts that other hosts hold."""

    def gather(self, name: str, ids: np.ndarray) -> Iterator[tuple[np.ndarray, StoredRows]]:
        """Ask for the stored rows of some nodes, at once; gives positions in `ids` and their rows, piece by piece."""
        ...


class GraphStore:
    """An opened graph. `open` it; the arrays are mapped when first asked for."""

    hot: HotRows | None = None
    """Rows of other hosts' nodes that are kept here; see `presampling.fill_hot`."""

    def __init__(
        self, url: str, index: dict, sampler: str, parts: Iterable[int] | None, remote: RemoteParts | None
    ):  # fmt: skip
        self.url = url
        self.offsets = np.asarray(index["offsets"], np.int64)
        self.num_nodes: int = index["num_nodes"]
        self.num_edges: int = index["num_edges"]
        self.num_features: int = index["num_features"]
        self.num_classes: int = index["num_classes"]
        self.num_parts = len(self.offsets) - 1
        self.sparse_features: bool = index["sparse_features"]
        self.class_names: list[str] | None = index.get("class_names")  # None: classes are numbers
        self.stored_feat_dtype: str = index["dtypes"].get("feat", "float32")  # of dense ones
        self.named = ORIG_NAME in index["dtypes"]  # whether the caller's ids are kept as bytes
        known = {"kind": "text" if self.named else "integer", "arrow": "string" if self.named else "int64"}
        self.id_type = IdType(**index.get("id_type", known))
        self._held = np.full(self.num_parts, parts is None)
        self._remote = remote
        self._sparse: dict[int, sp.csr_array] = {}
        self._checked: dict[int, Csc] = {}
        self._files: dict[str, storage.FileInfo] = index["files"]
        self._arrays: dict[tuple[str, int], np.ndarray] = {}
        self._sampler_name = sampler
        self._sampler: Sampler | None = None
        self.hold(parts or ())

    @classmethod
    def open(
        cls, url: str, sampler: str = "numba", verify: bool = False,
        parts: Iterable[int] | None = None, remote: RemoteParts | None = None,
    ) -> Self:  # fmt: skip
        """Open the graph at `url`. parts: those to read here (default: all); the others are asked of `remote`.

        Raises `InputError` if it is not there, of another version, or (with `verify`) if a file is damaged.
        """
        index = storage.read_json(storage.join(url, "graph.json"))
        if not isinstance(index, dict) or index.get("version") not in (VERSION, QUANTISED):
            raise InputError(
                f"{url}/graph.json: not a graph of layout version {VERSION} or {QUANTISED}; partition the source again"
            )
        if verify:
            storage.verify(url, index["files"])
        return cls(url, index, sampler, parts, remote)

    def hold(self, parts: Iterable[int]) -> None:
        """From now on read these parts here too."""
        new = [part for part in parts if not self._held[part]]
        if new:
            self._held[new] = True
            self._sampler = None

    @cached_property
    def feat_scale(self) -> np.ndarray | None:
        """The scale of each column, `[F]` float32, of features that are stored as int8."""
        info = self._files.get(FEAT_SCALE)
        return None if info is None else storage.open_array(storage.join(self.url, FEAT_SCALE), info)[:]

    def file_info(self, file: str) -> storage.FileInfo:
        """Size and checksum of a file of the graph, by its path below it. Raises `InputError` if there is none."""
        if file not in self._files:
            self._files |= self._added(file.rsplit("/", 1)[-1].removesuffix(".npy"))
        return self._files[file]

    def digest(self, part: int, names: Iterable[str]) -> str:
        """A checksum of a part's rows of some arrays, `feat` in whatever form it is stored."""
        stored = [SPARSE_FEAT if name == "feat" and self.sparse_features else (name,) for name in names]
        files = [f"{part_name(part)}/{name}.npy" for name in itertools.chain(*stored)]
        files += [FEAT_SCALE] * (self.feat_scale is not None)
        found = [self.file_info(file)["sha256"] for file in files]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    @property
    def held_parts(self) -> list[int]:
        """The parts that are read here."""
        return np.flatnonzero(self._held).tolist()

    @property
    def _some_part(self) -> int:
        """A part that is cheap to look at."""
        return int(self._held.argmax())

    def owner(self, ids: np.ndarray) -> np.ndarray:
        """The part of each node, `[len(ids)]`."""
        return np.searchsorted(self.offsets, ids, side="right") - 1

    def ids(self, part: int) -> np.ndarray:
        """The node ids that a part owns, ascending."""
        return np.arange(self.offsets[part], self.offsets[part + 1])

    def array(self, name: str, part: int) -> np.ndarray:
        """The rows of a named array that a part owns, memory-mapped, in the order of `ids(part)`; `feat` as stored.

        Read from storage, whoever holds the part.
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
        """Rows of a named array for any nodes of any parts, `[len(ids), ...]`, as a copy in memory.

        Real numbers are float32, however they are stored.

        Raises `ValueError` if an id is out of range.
        """
        rows = self.stored_rows(name, ids)
        if not isinstance(rows, np.ndarray):
            return rows.toarray()
        if name == SOFT:
            return soft_rows.decode(rows, self.num_classes)
        if name == "feat":
            return decode(rows, self.feat_scale)
        return rows.astype(np.float32) if rows.dtype == np.float16 else rows

    def stored_rows(self, name: str, ids: np.ndarray) -> StoredRows:
        """The rows that `gather` gives, as they are stored."""
        if len(ids) and (ids.min() < 0 or ids.max() >= self.num_nodes):
            raise ValueError(f"ids must lie in [0, {self.num_nodes})")
        if not len(ids) or (self.num_parts == 1 and self._held[0]):
            return self._part_rows(name, self._some_part)[ids]
        pieces = self._pieces(name, ids)
        if name == "feat" and self.sparse_features:
            return _in_order([(at, rows[which]) for at, rows, which in pieces], len(ids))
        first = next(pieces)
        gathered = np.empty((len(ids), *first[1].shape[1:]), first[1].dtype)
        for at, rows, which in itertools.chain([first], pieces):
            _copy_rows(_as_bytes(gathered), at, _as_bytes(rows), which)
        return gathered

    def inputs(self, ids: np.ndarray, names: tuple[str, ...] = ("feat",)) -> StoredRows:
        """The rows of some arrays side by side, `[len(ids), Σ widths]`; sparse if sparse features are among them."""
        if "feat" in names and self.sparse_features:
            arrays = [self.stored_rows(name, ids) if name == "feat" else self.gather(name, ids) for name in names]
            return arrays[0] if len(names) == 1 else sp.hstack(arrays, format="csr")
        rows = [self.gather(name, ids) for name in names]
        return rows[0] if len(names) == 1 else np.concatenate(rows, axis=1)

    def width(self, names: tuple[str, ...]) -> int:
        """The number of columns of `inputs`."""
        return sum(self._width(name) for name in names)

    def _width(self, name: str) -> int:
        known = {"feat": self.num_features, SOFT: self.num_classes}  # whose files need not be opened
        return known.get(name) or self.array(name, self._some_part).shape[1]

    def sample(self, seeds: np.ndarray, fanout: tuple[int, ...], key: int) -> Sample:
        """Sample the neighbourhood of some nodes over all parts; see `Sampler.sample`."""
        return self._opened_sampler().sample(seeds, fanout, key)

    def in_edges(self, ids: np.ndarray, width: int, key: int) -> tuple[np.ndarray, np.ndarray]:
        """One hop of the built-in kernel; see `NumbaSampler.in_edges`. May be called by several threads."""
        sampler = self._opened_sampler()
        if not isinstance(sampler, NumbaSampler):
            raise ValueError(f"{self._sampler_name} does not sample hop by hop")
        return sampler.in_edges(ids, width, key)

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

    def remove(self, name: str) -> None:
        """Delete an added array, of all parts, finished or not."""
        storage.remove(storage.join(self.url, f"{name}.json"))
        for part in range(self.num_parts):
            storage.remove(storage.join(self.url, part_name(part), f"{name}.npy"))
        self.forget(name)

    def remove_matching(self, pattern: str) -> None:
        """`remove` all arrays whose whole names match a regular expression; what else lies there stays."""
        folders = [self.url, *(storage.join(self.url, part_name(part)) for part in range(self.num_parts))]
        stems = {name.rsplit(".", 1)[0] for folder in folders for name in storage.listdir(folder)}
        for stem in stems:
            if re.fullmatch(pattern, stem):
                self.remove(stem)

    def forget(self, name: str) -> None:
        """Unmap an array whose files changed."""
        self._arrays = {key: value for key, value in self._arrays.items() if key[0] != name}
        self._files = {file: info for file, info in self._files.items() if not file.endswith(f"/{name}.npy")}

    def _opened_sampler(self) -> Sampler:
        if self._sampler is None:
            from rbm_dist.graph.sampler_backends import make_sampler  # needs torch, which rows alone do not

            parts = {part: self._csc(part) for part in self.held_parts}
            self._sampler = make_sampler(self._sampler_name, parts, self.offsets, self._remote)
        return self._sampler

    def _pieces(self, name: str, ids: np.ndarray) -> Iterator[tuple[np.ndarray, StoredRows, np.ndarray]]:
        """Positions in `ids`, an array, and which of its rows are theirs: kept ones, ones read here, answers."""
        owner = self.owner(ids)
        away = np.flatnonzero(~self._held[owner])
        kept: list[tuple[np.ndarray, StoredRows, np.ndarray]] = []
        if self.hot is not None and self.hot.name == name:
            found, hot_rows = self.hot.find(ids[away])
            kept, away = [(away[found], hot_rows, np.arange(found.sum()))], away[~found]
        answers: Iterator[tuple[np.ndarray, StoredRows]] = iter(())
        if len(away):
            if self._remote is None:
                raise ValueError(f"{self.url}: part {owner[away[0]]} is not held here")
            answers = self._remote.gather(name, ids[away])
        yield from kept
        for part in np.unique(owner):
            if self._held[part]:
                at = np.flatnonzero(owner == part)
                yield at, self._part_rows(name, part), ids[at] - self.offsets[part]
        for at, rows in answers:
            yield away[at], rows, np.arange(len(at))

    def _part_rows(self, name: str, part: int) -> StoredRows:
        return self._sparse_part(part) if name == "feat" and self.sparse_features else self.array(name, part)

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
        if part not in self._checked:  # the check reads every edge
            csc = Csc(self.array("indptr", part), self.array("indices", part))
            wrong = csc_.problem(csc.indptr, csc.indices, csc.num_nodes, self.num_nodes)
            if wrong:
                raise InputError(f"{self.url}/{part_name(part)}: {wrong}")
            self._checked[part] = csc
        return self._checked[part]


def _as_bytes(rows: np.ndarray) -> np.ndarray:
    """Rows of any dtype as rows of bytes, `[n, bytes]`."""
    rows = np.ascontiguousarray(rows)
    return rows.reshape(len(rows), math.prod(rows.shape[1:])).view(np.uint8)


@njit(cache=True, nogil=True)
def _copy_rows(into, at, rows, which):  # type: ignore[no-untyped-def]
    """`into[at] = rows[which]`, without the array in between that numpy would make."""
    for i in range(len(at)):
        to, row = at[i], which[i]
        for j in range(rows.shape[1]):
            into[to, j] = rows[row, j]


def _in_order(pieces: list[tuple[np.ndarray, sp.csr_array]], count: int) -> sp.csr_array:
    """Sparse rows that came in pieces, by position."""
    rows = sp.vstack([piece for _, piece in pieces], format="csr")
    came = np.concatenate([at for at, _ in pieces])
    if np.array_equal(came, np.arange(count)):  # batches come part by part
        return rows
    order = np.empty_like(came)
    order[came] = np.arange(count)
    return rows[order]
