"""A new version of a graph: its parts with other edges and features, and new nodes behind all others.

Nodes keep their ids. Files of parts that do not change are the old version's own (links, where storage has them). New
nodes are a part of their own at the end, to which further versions add, until it is as large as the others.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.graph.changes import Changes, in_range
from rbm_dist.graph.csc import Csc, id_dtype
from rbm_dist.graph.partition_report import count_halo, figures
from rbm_dist.graph.quantised import encode, in_reach
from rbm_dist.graph.shards import ORIG_NAME, PER_ROW, SPARSE_FEAT, part_name, sparse_arrays
from rbm_dist.graph.shuffle import chunk_bounds
from rbm_dist.graph.store import GraphStore

_ROWS = 1 << 16  # of features that are copied at a time
_BYTES = 1 << 25  # of rows that are copied at a time, where some are replaced


@dataclass(frozen=True)
class NewPart:
    """One part of the new version: its files, by path below the graph, and what can be counted of it."""

    files: dict[str, storage.FileInfo]
    edges: int
    added: int  # edges
    dropped: int
    cut: int  # edges from other parts
    halo: int  # distinct sources in these


def new_offsets(store: GraphStore, num_new: int, added_parts: int) -> tuple[np.ndarray, int]:
    """The parts' offsets with so many new nodes at the end, and how many parts are then such as came with updates.

    added_parts: how many of the graph's are. Raises `InputError` if there would be more nodes than ids reach.
    """
    offsets = store.offsets.copy()
    total = int(offsets[-1]) + num_new
    if id_dtype(total) != id_dtype(store.num_nodes):
        raise InputError(
            f"{store.url}: {total:,} nodes are more than its 32-bit ids reach; make a run of the new graph"
        )
    if not num_new:
        return offsets, added_parts
    sizes = np.diff(offsets)
    if added_parts and sizes[-1] + num_new <= sizes[: len(sizes) - added_parts].mean():
        offsets[-1] = total
        return offsets, added_parts
    return np.append(offsets, total), added_parts + 1


def write_part(
    url: str, store: GraphStore, part: int, offsets: np.ndarray, changes: Changes, name_bytes: int
) -> NewPart:
    """Write one part of the new version below `url`; `store` is the old one. name_bytes: of the longest `orig_name`."""
    folder, files = part_name(part), {}
    low, high = offsets[part : part + 2].tolist()
    is_old = part < store.num_parts
    appended = slice(max(low, store.num_nodes) - store.num_nodes, max(high, store.num_nodes) - store.num_nodes)
    grows = appended.start < appended.stop

    def put(name: str, array: np.ndarray) -> None:
        files[f"{folder}/{name}.npy"] = storage.write_array(storage.join(url, folder, f"{name}.npy"), array)

    def keep(name: str) -> None:
        files[f"{folder}/{name}.npy"] = link(store, f"{folder}/{name}.npy", url)

    def old(name: str, none: np.ndarray) -> np.ndarray:
        return store.array(name, part) if is_old else none

    indices_dtype = id_dtype(int(offsets[-1]))
    csc = Csc(old("indptr", np.zeros(1, np.int64)), old("indices", np.empty(0, indices_dtype)))
    added_m2, dropped_m2 = (in_range(edges, low, high) for edges in (changes.added_m2, changes.dropped_m2))
    edited = edit(csc, appended.stop - appended.start, low, added_m2, dropped_m2)
    if grows or edited.added or edited.dropped:
        put("indptr", edited.indptr)
        path = storage.join(url, folder, "indices.npy")
        num_edges = int(edited.indptr[-1])
        files[f"{folder}/indices.npy"] = storage.write_chunks(path, indices_dtype, (num_edges,), edited.indices())
    else:
        keep("indptr")
        keep("indices")
    names = [*PER_ROW, *[ORIG_NAME] * store.named]
    for name in names:
        new = changes.new[name][appended]
        wanted = np.dtype(f"S{name_bytes}") if name == ORIG_NAME else new.dtype
        if grows or (is_old and store.array(name, part).dtype != wanted):
            put(name, np.concatenate([old(name, new[:0]), new]).astype(wanted))
        else:
            keep(name)
    first, stop = np.searchsorted(changes.changed_c, [low, min(high, store.num_nodes)])
    feat_names = SPARSE_FEAT if store.sparse_features else ("feat",)
    if not (grows or first < stop):
        for name in feat_names:
            keep(name)
    elif store.sparse_features:
        for name, array in sparse_arrays(_sparse_feat(store, part, low, changes, slice(first, stop), appended)).items():
            put(name, array)
    else:
        path, shape = storage.join(url, folder, "feat.npy"), (high - low, store.num_features)
        chunks = _dense_feat(store, part, low, changes, slice(first, stop), appended)
        files[f"{folder}/feat.npy"] = storage.write_chunks(path, store.stored_feat_dtype, shape, chunks)
    mapped = storage.open_array(storage.join(url, folder, "indices.npy"), files[f"{folder}/indices.npy"])
    cut, halo = count_halo(mapped, low, high, int(offsets[-1]))
    return NewPart(files, len(mapped), edited.added, edited.dropped, cut, halo)


def write_index(
    url: str, store: GraphStore, index: dict[str, Any], offsets: np.ndarray, added_parts: int, parts: list[NewPart],
    name_bytes: int,
) -> dict[str, storage.FileInfo]:  # fmt: skip
    """Write `graph.json` of the new version; `index` is the old one's. Gives all files, by their path below `url`."""
    files = {name: link(store, name, url) for name in index["files"] if "/" not in name}
    for part in parts:
        files |= part.files
    report = figures(
        sum(part.cut for part in parts), np.diff(offsets), np.array([part.edges for part in parts]),
        np.array([part.halo for part in parts]),
    )  # fmt: skip
    dtypes = index["dtypes"] | ({ORIG_NAME: f"|S{name_bytes}"} if store.named else {})
    new = {
        "num_nodes": int(offsets[-1]), "num_edges": sum(part.edges for part in parts), "offsets": offsets.tolist(),
        "added_parts": added_parts, "partition": report, "dtypes": dtypes, "files": files,
        "update": {name: sum(getattr(part, name) for part in parts) for name in ("added", "dropped")},
    }  # fmt: skip
    return {**files, "graph.json": storage.write_json(storage.join(url, "graph.json"), {**index, **new})}


def link(store: GraphStore, file: str, url: str) -> storage.FileInfo:
    """Let the new version below `url` have a file of the old one."""
    storage.link(storage.join(store.url, file), storage.join(url, file))
    return store.file_info(file)


def replaced(old: np.ndarray, at_n: np.ndarray, rows: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """An array of `size` rows in chunks: `old`, with rows in place of those at `at_n`, ascending, or behind them all.

    rows: chunks of these, in order.
    """
    held = next(rows, old[:0])
    per_chunk = max(1, _BYTES // max(1, held[:1].nbytes))
    for start in range(0, size, per_chunk):
        stop = min(start + per_chunk, size)
        first, last = np.searchsorted(at_n, [start, stop])
        pieces = [held]
        while sum(map(len, pieces)) < last - first:
            pieces.append(next(rows))
        held = np.concatenate(pieces)
        chunk = np.empty((stop - start, *held.shape[1:]), held.dtype)
        kept = old[start:stop]
        chunk[: len(kept)] = kept
        chunk[at_n[first:last] - start] = held[: last - first]
        yield chunk
        held = held[last - first :]


@dataclass(frozen=True)
class Edited:
    """A part's edges after a change."""

    indptr: np.ndarray
    added: int
    dropped: int
    _csc: Csc
    _rows: np.ndarray  # nodes of the part whose in-edges may differ, ascending
    _sources: np.ndarray  # all in-edges of these, one node after the other

    def indices(self) -> Iterator[np.ndarray]:
        """The sources, in chunks."""
        before = self._csc.indptr
        starts = np.concatenate([[0], np.cumsum(np.diff(self.indptr)[self._rows])])
        for first, stop in pairwise(chunk_bounds(self.indptr)):
            kept = slice(int(before[min(first, len(before) - 1)]), int(before[min(stop, len(before) - 1)]))
            own = self._csc.indices[kept]
            low, high = np.searchsorted(self._rows, [first, stop])
            if low == high:
                yield own
                continue
            edited = np.zeros(stop - first, bool)
            edited[self._rows[low:high] - first] = True
            out = np.empty(int(self.indptr[stop] - self.indptr[first]), own.dtype)
            is_edited = np.repeat(edited, np.diff(self.indptr[first : stop + 1]))
            known = before[first : stop + 1]
            out[~is_edited] = own[~np.repeat(edited[: max(len(known) - 1, 0)], np.diff(known))]
            out[is_edited] = self._sources[starts[low] : starts[high]]
            yield out


def edit(csc: Csc, num_new: int, low: int, added_m2: np.ndarray, dropped_m2: np.ndarray) -> Edited:
    """A part's in-edges with some more and some less, and so many more nodes at its end. low: its first node.

    Edges that are there already are not added, and ones that are not there not dropped.
    """
    degree = np.concatenate([np.diff(csc.indptr), np.zeros(num_new, np.int64)])
    rows = np.unique(np.concatenate([added_m2[:, 0], dropped_m2[:, 0]])) - low
    starts = np.concatenate([csc.indptr[:-1], np.full(num_new, csc.indptr[-1])])[rows]
    ends = np.cumsum(degree[rows])
    edges = np.repeat(starts - (ends - degree[rows]), degree[rows]) + np.arange(ends[-1] if len(ends) else 0)
    words = np.repeat(np.arange(len(rows)), degree[rows]) << 32 | csc.indices[edges].astype(np.int64)
    to_add, to_drop = (np.searchsorted(rows, m2[:, 0] - low) << 32 | m2[:, 1] for m2 in (added_m2, dropped_m2))
    more = np.union1d(words, to_add)
    left = np.setdiff1d(more, to_drop, assume_unique=True)
    degree[rows] = np.bincount(left >> 32, minlength=len(rows))
    indptr = np.concatenate([[0], np.cumsum(degree)]).astype(np.int64)
    sources = (left & ((1 << 32) - 1)).astype(csc.indices.dtype)
    return Edited(indptr, len(more) - len(words), len(more) - len(left), csc, rows, sources)


def _dense_feat(
    store: GraphStore, part: int, low: int, changes: Changes, changed: slice, appended: slice
) -> Iterator[np.ndarray]:
    """Features of a part as they are stored, in chunks: the old ones, some replaced, and the new ones."""
    scale, dtype = store.feat_scale, store.stored_feat_dtype
    old = store.array("feat", part) if part < store.num_parts else np.empty((0, store.num_features), dtype)
    at_n = np.concatenate([changes.changed_c[changed] - low, len(old) + np.arange(appended.stop - appended.start)])

    def rows() -> Iterator[np.ndarray]:
        for feat, some in ((changes.changed_feat, changed), (changes.new_feat, appended)):
            for start in range(some.start, some.stop, _ROWS):
                read = feat[start : min(start + _ROWS, some.stop)]
                yield encode(in_reach(read, dtype, scale), dtype, scale)

    return replaced(old, at_n, rows(), len(old) + appended.stop - appended.start)


def _sparse_feat(
    store: GraphStore, part: int, low: int, changes: Changes, changed: slice, appended: slice
) -> sp.csr_array:
    """Features of a part, the old ones, some replaced, and the new ones."""
    new = sp.csr_array(changes.new_feat[appended])
    if part >= store.num_parts:
        return new
    ids = store.ids(part)
    old = store.stored_rows("feat", ids)
    order = np.arange(len(ids))
    order[changes.changed_c[changed] - low] = len(ids) + np.arange(changed.stop - changed.start)
    both = sp.vstack([old, changes.changed_feat[changed]], format="csr")
    return sp.vstack([both[order], new], format="csr")
