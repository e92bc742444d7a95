"""The shuffle: from a source's node order to parts, in bounded memory, in tasks that can each be done again.

Chunks of rows are grouped by part and spilled; each part is then its slices of all chunks, end to end.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rbm_dist import storage
from rbm_dist.graph.csc import Csc, id_dtype
from rbm_dist.graph.partition_report import partition_report
from rbm_dist.graph.shards import ORIG_NAME, PER_ROW, SPARSE_FEAT, VERSION, part_name
from rbm_dist.graph.staged import Rows, StagedSource

SPILL = "spill"
"""The folder of the spilled chunks, below the graph's; removed at the end."""
_CHUNK_ROWS = 1 << 16
_CHUNK_EDGES = 1 << 22


@dataclass(frozen=True)
class Numbering:
    """The renumbering that makes each part's nodes contiguous, in the order of the source within a part."""

    part: np.ndarray  # [N] the part of each of the source's ids
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
    """One chunk of the source's rows, grouped by part: its files, and where in them each part's rows begin."""

    files: dict[str, storage.FileInfo]
    starts: dict[str, list[int]]  # by file: P + 1 offsets


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
    return Spill(
        **storage.once(f"{folder}.json", lambda: asdict(_spill(folder, slice(first, stop), source, numbering)))
    )


def _spill(folder: str, at: slice, source: StagedSource, numbering: Numbering) -> Spill:
    first, stop = at.start, at.stop
    part_n = numbering.part[first:stop]
    order = np.argsort(part_n, kind="stable")
    num_parts = len(numbering.offsets) - 1
    row_starts = np.searchsorted(part_n[order], np.arange(num_parts + 1))
    low = source.csc.indptr[first]
    rows = Csc(source.csc.indptr[first : stop + 1] - low, source.csc.indices[low : source.csc.indptr[stop]])
    degree, sources = _in_edges(rows, order, numbering.new_id)
    arrays = {"degree": degree, "indices": sources}
    starts = {"indices": np.concatenate([[0], np.cumsum(degree)])[row_starts]}
    if isinstance(source.feat, Rows):
        arrays["feat"] = source.feat[first:stop][order]
    else:
        feat = source.feat[first:stop][order]
        arrays |= {"feat_counts": np.diff(feat.indptr), "feat_indices": feat.indices, "feat_values": feat.data}
        starts |= dict.fromkeys(("feat_indices", "feat_values"), feat.indptr[row_starts])
    arrays |= {name: array[first:stop][order] for name, array in source.per_row.items()}
    files = {
        f"{folder}/{name}.npy": storage.write_array(f"{folder}/{name}.npy", array) for name, array in arrays.items()
    }
    return Spill(files, {name: starts.get(name, row_starts).tolist() for name in arrays})


def write_part(url: str, part: int, spill_url: str, spills: list[Spill], width: int) -> dict[str, storage.FileInfo]:
    """Write all arrays of one part from the spilled chunks; gives the checksum of each file, by its path below `url`.

    width: the number of features. A part that was written before is kept.
    """
    done = storage.join(spill_url, f"{part_name(part)}.json")
    return storage.once(done, lambda: _merge(url, part, spills, width))


def _merge(url: str, part: int, spills: list[Spill], width: int) -> dict[str, storage.FileInfo]:
    def pieces(name: str) -> Iterator[np.ndarray]:
        for spill in spills:
            file = next(file for file in spill.files if file.endswith(f"/{name}.npy"))
            first, stop = spill.starts[name][part : part + 2]
            yield storage.open_array(file, spill.files[file])[first:stop]

    files = {}

    def write(name: str, dtype: np.dtype, shape: tuple[int, ...], chunks: Iterable[np.ndarray]) -> None:
        path = f"{part_name(part)}/{name}.npy"
        files[path] = storage.write_chunks(storage.join(url, path), dtype, shape, chunks)

    def total(name: str) -> int:
        return sum(spill.starts[name][part + 1] - spill.starts[name][part] for spill in spills)

    def offsets(name: str, dtype: np.dtype) -> np.ndarray:
        counts = np.concatenate(list(pieces(name)))
        return np.concatenate([np.zeros(1, dtype), np.cumsum(counts, dtype=dtype)])

    def copy(name: str, dtype: np.dtype) -> None:
        row = next(pieces(name)).shape[1:]
        write(name, dtype, (total(name), *row), pieces(name))

    rows = total("label")
    write("indptr", np.dtype(np.int64), (rows + 1,), [offsets("degree", np.dtype(np.int64))])
    copy("indices", next(pieces("indices")).dtype)
    if "feat" in spills[0].starts:
        copy("feat", np.dtype(np.float32))
    else:
        dtype = id_dtype(max(total("feat_indices"), rows, width))
        write("feat_indptr", dtype, (rows + 1,), [offsets("feat_counts", dtype)])
        copy("feat_indices", dtype)
        copy("feat_values", np.dtype(np.float32))
        write("feat_shape", np.dtype(np.int64), (2,), [np.array([rows, width])])
    for name in (name for name in (*PER_ROW, ORIG_NAME) if name in spills[0].starts):
        copy(name, next(pieces(name)).dtype)
    return files


def write_index(
    url: str,
    offsets: list[int],
    source: StagedSource,
    num_classes: int,
    files: dict[str, storage.FileInfo],
    report: dict[str, Any],
) -> None:
    """Write `graph.json`: from here on the graph is there."""
    sparse = not isinstance(source.feat, Rows)
    if isinstance(source.feat, Rows):
        feat_dtypes = {"feat": "float32"}
    else:
        index = str(id_dtype(max(source.feat.nnz, *source.feat.shape)))
        feat_dtypes = dict(zip(SPARSE_FEAT, (index, index, "float32", "int64"), strict=True))
    storage.write_json(
        storage.join(url, "graph.json"),
        {
            "version": VERSION,
            "num_nodes": source.csc.num_nodes,
            "num_edges": source.csc.num_edges,
            "num_features": source.feat.shape[1],
            "sparse_features": sparse,
            "num_classes": num_classes,
            "offsets": offsets,
            "partition": report,
            "dtypes": {name: str(array.dtype) for name, array in source.per_row.items()}
            | {"indptr": "int64", "indices": str(source.csc.indices.dtype)}
            | feat_dtypes,
            "files": files,
        },
    )


def write(url: str, source: StagedSource, part_N: np.ndarray, num_parts: int, num_classes: int) -> None:
    """Write a staged source as a graph of parts, in this process."""
    numbering, spill_url = Numbering.of(part_N, num_parts), storage.join(url, SPILL)
    report = partition_report(source.csc, part_N, num_parts)
    spills = [
        spill_chunk(spill_url, chunk, int(first), int(stop), source, numbering)
        for chunk, (first, stop) in enumerate(itertools.pairwise(chunk_bounds(source.csc.indptr)))
    ]
    files: dict[str, storage.FileInfo] = {}
    for part in range(num_parts):
        files |= write_part(url, part, spill_url, spills, source.feat.shape[1])
    write_index(url, numbering.offsets.tolist(), source, num_classes, files, report)
    storage.remove(spill_url)


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
