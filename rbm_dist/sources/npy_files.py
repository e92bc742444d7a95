"""Tables as `.npy` arrays: rows that are read in slices, on any fsspec URL, without mapping the file."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.sources import pieces
from rbm_dist.sources.pieces import Piece, TableFile, file_name, folder_of, in_threads


class NpyArray:
    """A table's array in a `.npy` file, of numbers or text, one- or two-dimensional, read in slices of rows.

    `axis`: along which rows follow each other. `scalar`: the type of its values. `type`: of a column of its rows.
    Raises `InputError`.
    """

    def __init__(self, url: str, axis: int = 0):
        self.url = url
        self._file = storage.ArrayFile(url)
        self.shape, dtype = self._file.shape, self._file.dtype
        if dtype.kind not in "biufSU":
            raise InputError(f"{url}: cannot be read: numbers or text expected, found dtype {dtype}")
        self._native = dtype.newbyteorder("=")
        self.scalar = pa.from_numpy_dtype(self._native)
        if len(self.shape) not in (1, 2):
            raise InputError(f"{url}: an array of rows expected, found shape {self.shape}")
        self.rows = self.shape[axis]
        self.width = self.shape[1 - axis] if len(self.shape) == 2 else 1
        # Whether a row's values lie together, or those of a column.
        self._by_rows = (axis == 0) != self._file.fortran or len(self.shape) == 1
        self.type = self.scalar if self.width == 1 else pa.list_(self.scalar, self.width)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `[stop - start, width]`."""
        if self._by_rows:
            return self._values(start * self.width, (stop - start) * self.width).reshape(-1, self.width)
        return np.stack([self._values(k * self.rows + start, stop - start) for k in range(self.width)], axis=1)

    def _values(self, start: int, count: int) -> np.ndarray:
        return self._file.values(start, count).astype(self._native, copy=False)


def scan_edges(files: list[str], src: str, dst: str) -> list[TableFile]:
    """Edge lists `[2, m]`, or all of them `[m, 2]`, as tables of two columns."""
    arrays = in_threads(NpyArray, files)
    # What [2, 2] means is for the others to tell.
    axis = next((1 - array.shape.index(2) for array in arrays if 2 in array.shape and array.shape != (2, 2)), 1)
    tables = []
    for array in arrays:
        if len(array.shape) != 2 or array.shape[1 - axis] != 2:
            one = "[2, m] or [m, 2], and the same in all files" if len(arrays) > 1 else "[2, m] or [m, 2]"
            raise InputError(f"{array.url}: an edge list has shape {one}, found {array.shape}")
        size = array.shape[axis]
        found = [
            Piece(
                array.url, start, min(pieces.PIECE_ROWS, size - start), arrays=(((src, dst), array.url, axis, start),)
            )
            for start in range(0, size, pieces.PIECE_ROWS)
        ]
        tables.append(TableFile(array.url, {src: array.scalar, dst: array.scalar}, found))
    return tables


def scan_nodes(files: list[str], prefix: str, names: list[str]) -> list[TableFile]:
    """A folder of arrays as a table: `<prefix>*.npy` one below the other, and `<name>.npy`, each for all rows."""
    others = {file_name(file)[:-4]: NpyArray(file) for file in files if file_name(file)[:-4] in names}
    feats = [file for file in files if file_name(file).startswith(prefix) and file_name(file)[:-4] not in names]
    if not feats:
        raise InputError(f"{folder_of(files[0])}: no {prefix}*.npy; found {', '.join(map(file_name, files))}")
    tables, offset = [], 0
    for file, array in zip(feats, in_threads(NpyArray, feats), strict=True):
        columns = {prefix: array.type} | {name: other.type for name, other in others.items()}
        found = []
        for start in range(0, array.rows, pieces.PIECE_ROWS):
            row = offset + start
            arrays = (((prefix,), file, 0, start), *(((name,), other.url, 0, row) for name, other in others.items()))
            found.append(Piece(file, start, min(pieces.PIECE_ROWS, array.rows - start), arrays=arrays))
        tables.append(TableFile(file, columns, found))
        offset += array.rows
    for other in others.values():
        if other.rows != offset:
            raise InputError(f"{other.url}: {other.rows:,} rows, but {prefix}*.npy have {offset:,}")
    return tables


def batches(piece: Piece, names: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    """Some columns of a piece, in batches of `rows` rows."""
    wanted = [entry for entry in piece.arrays if set(entry[0]) & set(names)]
    arrays = [NpyArray(url, axis) for _, url, axis, _ in wanted]
    for start in range(0, piece.rows, rows):
        count = min(rows, piece.rows - start)
        found = {}
        for (columns, _, _, first), array in zip(wanted, arrays, strict=True):
            block = array.read(first + start, first + start + count)
            if len(columns) == 1 and array.width != 1:
                found[columns[0]] = pa.FixedSizeListArray.from_arrays(pa.array(block.reshape(-1)), array.width)
            else:
                found |= {name: pa.array(np.ascontiguousarray(block[:, k])) for k, name in enumerate(columns)}
        yield pa.RecordBatch.from_pydict(found)
