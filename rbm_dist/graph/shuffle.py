"""The shuffle: from a source's node order to parts, in bounded memory, in tasks that can each be done again.

Chunks of rows are grouped by part and spilled; each part is then its slices of all chunks, end to end.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from rbm_dist import storage
from rbm_dist.graph.csc import Csc, id_dtype
from rbm_dist.graph.quantised import encode, scales
from rbm_dist.graph.shards import FEAT_SCALE, ORIG_NAME, PER_ROW, QUANTISED, SPARSE_FEAT, VERSION, part_name
from rbm_dist.sources.staged import RowPieces, StagedSource

SPILL = "spill"
"""The folder of the spilled chunks, below the graph's; removed at the end."""
_CHUNK_ROWS = 1 << 16
_CHUNK_EDGES = 1 << 22


@dataclass(frozen=True)
class Numbering:
    """The renumbering that makes each part's nodes contiguous, in the order of the source within a part."""

    part: storage.Rows  # [N] the part of each of the source's ids
    new_id: np.ndarray  # [N] the new id of each of the source's ids
    offsets: np.ndarray  # [P + 1] part p owns the new ids offsets[p] to offsets[p + 1]

    @classmethod
    def of(cls, part_N: np.ndarray, num_parts: int) -> "Numbering":
        offsets = np.zeros(num_parts + 1, np.int64)
        np.cumsum(np.bincount(part_N, minlength=num_parts), out=offsets[1:])
        new_id = np.empty(len(part_N), id_dtype(len(part_N)))
        for part in range(num_parts):  # a sort of all nodes at once would take several times the memory
            new_id[part_N == part] = np.arange(offsets[part], offsets[part + 1])
        return cls(part_N, new_id, offsets)


@dataclass(frozen=True)
class Spill:
    """One chunk of the source's rows, grouped by part: its files, and where in them each part's entries begin."""

    files: dict[str, tuple[str, storage.FileInfo]]  # by array: URL and checksum
    starts: dict[str, np.ndarray]  # by array: [P + 1]
    feat_max: np.ndarray  # [F] float32, the largest magnitude in each column; [0] of sparse features


Slices = dict[str, list[tuple[str, storage.FileInfo, int, int]]]
"""By array, the slices `(url, info, first, stop)` of spilled chunks that are, end to end, one part's."""


@dataclass(frozen=True)
class Layout:
    """How the arrays of every part are stored."""

    dtypes: dict[str, str]  # by array
    num_features: int
    feat_scale: np.ndarray | None  # [F] float32, if dense features are stored as int8

    @classmethod
    def of(cls, source: StagedSource, features: str, feat_max_F: np.ndarray) -> "Layout":
        """features: the dtype of dense ones, whose largest magnitudes are `feat_max_F`.

        Raises `InputError` if they do not fit it.
        """
        dtypes = {"indptr": "int64", "indices": str(source.indices.dtype)}
        dtypes |= {name: str(array.dtype) for name, array in source.per_row.items()}
        if isinstance(source.feat, RowPieces):
            dtypes["feat"] = features
        else:
            index = str(id_dtype(max(source.feat.nnz, *source.feat.shape)))
            dtypes |= dict(zip(SPARSE_FEAT, (index, index, "float32", "int64"), strict=True))
        return cls(dtypes, source.num_features, scales(features, feat_max_F))


def chunk_bounds(indptr: np.ndarray) -> np.ndarray:
    """Bounds of the chunks that are shuffled at a time: few rows and few edges each, but at least a row."""
    bounds = [0]
    while bounds[-1] < len(indptr) - 1:
        first = bounds[-1]
        fits = int(np.searchsorted(indptr[first : first + _CHUNK_ROWS + 1], indptr[first] + _CHUNK_EDGES, side="right"))
        bounds.append(min(first + max(fits - 1, 1), len(indptr) - 1))
    return np.array(bounds)


def spill_chunk(url: str, chunk: int, first: int, stop: int, source: StagedSource, numbering: Numbering) -> Spill:
    """Group the rows `first` to `stop` of all arrays by part and write them below `url`; what is there is kept."""
    folder = storage.join(url, f"chunk-{chunk:05d}")
    done = storage.once(f"{folder}.json", lambda: _spill(folder, slice(first, stop), source, numbering))
    by_row = np.array(done["starts"]["rows"])
    starts = {name: np.array(done["starts"][name]) if name in done["starts"] else by_row for name in done["files"]}
    files = {name: (f"{folder}/{name}.npy", info) for name, info in done["files"].items()}
    return Spill(files, starts, np.array(done["feat_max"], np.float32))


def _spill(folder: str, at: slice, source: StagedSource, numbering: Numbering) -> dict[str, Any]:
    first, stop = at.start, at.stop
    part_n = numbering.part[first:stop]
    order = np.argsort(part_n, kind="stable")
    num_parts = len(numbering.offsets) - 1
    row_starts = np.searchsorted(part_n[order], np.arange(num_parts + 1))
    degree, sources = _in_edges(source.edges(at), order, numbering.new_id)
    arrays = {"degree": degree, "indices": sources}
    starts = {"rows": row_starts, "indices": np.concatenate([[0], np.cumsum(degree)])[row_starts]}
    feat = source.features(at)[order]
    if isinstance(feat, np.ndarray):
        arrays["feat"] = feat_nF = feat
        feat_max = np.maximum(feat_nF.max(axis=0), -feat_nF.min(axis=0))
    else:
        feat_max = np.empty(0)
        arrays |= {"feat_counts": np.diff(feat.indptr), "feat_indices": feat.indices, "feat_values": feat.data}
        starts |= dict.fromkeys(("feat_indices", "feat_values"), feat.indptr[row_starts])
    arrays |= {name: array[first:stop][order] for name, array in source.per_row.items()}
    return {
        "files": {name: storage.write_array(f"{folder}/{name}.npy", array) for name, array in arrays.items()},
        "starts": {name: array.tolist() for name, array in starts.items()},
        "feat_max": feat_max.tolist(),
    }


def plan_part(spills: list[Spill], part: int) -> Slices:
    """What one part takes of all chunks, in their order."""
    slices: Slices = {name: [] for name in spills[0].files}
    for spill in spills:
        for name, (url, info) in spill.files.items():
            first, stop = spill.starts[name][part : part + 2].tolist()
            if first < stop:
                slices[name].append((url, info, first, stop))
    return slices


def write_part(url: str, part: int, spill_url: str, slices: Slices, layout: Layout) -> dict[str, storage.FileInfo]:
    """Write all arrays of one part from its slices; gives the checksum of each file, by its path below `url`.

    A part that was written before is kept.
    """
    return storage.once(storage.join(spill_url, f"{part_name(part)}.json"), lambda: _merge(url, part, slices, layout))


def _merge(url: str, part: int, slices: Slices, layout: Layout) -> dict[str, storage.FileInfo]:
    files = {}

    def write(name: str, shape: tuple[int, ...], chunks: Iterable[np.ndarray]) -> None:
        path = f"{part_name(part)}/{name}.npy"
        files[path] = storage.write_chunks(storage.join(url, path), layout.dtypes[name], shape, chunks)

    def pieces(name: str) -> Iterator[np.ndarray]:
        for file, info, first, stop in slices[name]:
            yield storage.open_rows(file, info)[first:stop]

    def total(name: str) -> int:
        return sum(stop - first for _, _, first, stop in slices[name])

    def copy(name: str, *row: int) -> None:
        write(name, (total(name), *row), pieces(name))

    def offsets(name: str, counts: str) -> None:
        write(name, (rows + 1,), [np.cumsum(np.concatenate([np.zeros(1, np.int64), *pieces(counts)]))])

    rows = total("label")
    offsets("indptr", "degree")
    copy("indices")
    if "feat" in slices:
        shape = (rows, layout.num_features)
        write("feat", shape, (encode(piece, layout.dtypes["feat"], layout.feat_scale) for piece in pieces("feat")))
    else:
        offsets("feat_indptr", "feat_counts")
        copy("feat_indices")
        copy("feat_values")
        write("feat_shape", (2,), [np.array([rows, layout.num_features])])
    for name in (name for name in (*PER_ROW, ORIG_NAME) if name in slices):
        copy(name)
    return files


def write_index(
    url: str,
    offsets: list[int],
    source: StagedSource,
    about: dict[str, Any],
    files: dict[str, storage.FileInfo],
    report: dict[str, Any],
    layout: Layout,
) -> dict[str, storage.FileInfo]:
    """Write `graph.json`: from here on the graph is there. Gives all files, by their path below `url`.

    about: further entries: `num_classes`, and what is to go back to the input's owner or to be done to new rows.
    """
    if source.scaling is not None:
        arrays = source.scaling.as_arrays()
        files = files | {
            f"{name}.npy": storage.write_array(storage.join(url, f"{name}.npy"), arrays[name]) for name in arrays
        }
    if layout.feat_scale is not None:
        files = {**files, FEAT_SCALE: storage.write_array(storage.join(url, FEAT_SCALE), layout.feat_scale)}
    index = storage.write_json(
        storage.join(url, "graph.json"),
        {
            "version": VERSION if layout.dtypes.get("feat", "float32") == "float32" else QUANTISED,
            "num_nodes": source.num_nodes,
            "num_edges": source.num_edges,
            "num_features": layout.num_features,
            "sparse_features": "feat" not in layout.dtypes,
            **about,
            "offsets": offsets,
            "partition": report,
            "dtypes": layout.dtypes,
            "files": files,
        },
    )
    return {**files, "graph.json": index}


def _in_edges(rows: Csc, order: np.ndarray, new_id: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many in-edges some rows have, in this order, and their renumbered sources, ascending per row."""
    degree = np.diff(rows.indptr)[order]
    ends = np.cumsum(degree)
    edges = np.repeat(rows.indptr[order] - (ends - degree), degree) + np.arange(len(rows.indices))
    sources = new_id[rows.indices[edges]]
    # One sort of words is several times faster than a lexsort of two arrays; a chunk's rows leave room for 47 bits.
    words = np.repeat(np.arange(len(order)) << 47, degree) | sources
    words.sort()
    return degree, (words & ((1 << 47) - 1)).astype(new_id.dtype)
