"""Tables as files on any fsspec URL (Parquet, CSV, npy), read front to back in record batches of bounded size.

Besides a batch, a reader holds one row group of Parquet as it is stored, or a few megabytes of text.
"""

import io
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from rbm_dist import storage
from rbm_dist.errors import InputError

PIECE_ROWS = 1 << 22
"""Rows of a Parquet or npy file after which another piece begins."""
_FORMATS = {".parquet": "Parquet", ".pq": "Parquet", ".csv": "CSV", ".csv.gz": "CSV", ".npy": "npy"}
_CSV_BYTES = 1 << 22  # of text that are parsed at once; a line has to fit
_NPY_HEADER = 1 << 14  # bytes in which an array's header ends
_NUMBER = re.compile(r"(\d+)")

Columns = dict[str, pa.DataType]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Piece:
    """Rows that one task reads."""

    file: str
    start: int  # the row of the file that it begins with
    rows: int  # -1: not known before it is read (CSV)
    groups: tuple[int, int] | None = None  # Parquet: the first row group, and the first that is no longer its own
    # npy: the columns that an array gives (one, or two of an edge list), the array, its axis of rows, its first row.
    arrays: tuple[tuple[tuple[str, ...], str, int, int], ...] = ()

    def at(self, before: int, row: int) -> str:
        """For messages: where a row of a batch is, of which so many rows of the piece are before."""
        return f"{self.file}: row {self.start + before + row}"


def num_rows(pieces: Iterable[Piece]) -> int | None:
    """How many rows some pieces have; None where that is not known before they are read (CSV)."""
    rows = [piece.rows for piece in pieces]
    return None if -1 in rows else sum(rows)


@dataclass(frozen=True)
class TableFile:
    """What can be said of a file from its header or footer; for CSV, from its first lines."""

    url: str
    columns: Columns
    pieces: list[Piece]


def find(url: str, key: str) -> list[tuple[str, int, str]]:
    """The files of a file, folder or glob URL: their `storage.stamp`s; hidden ones are left out.

    Sorted by name, numbers in names by value. `key`: the configuration's, for messages. Raises `InputError` where
    there are none, or some of an unknown or another format.
    """
    fs, path = storage.filesystem(url)
    with reading(url):
        if fs.isfile(path):
            found = [fs.info(path)]
        else:
            found = fs.ls(path, detail=True) if fs.isdir(path) else list(fs.glob(path, detail=True).values())
            found = [info for info in found if _name(info["name"])[0] not in "._"]
    files = []
    for info in found:
        if info["type"] == "file":
            file = info["name"] if storage.is_local(url) else fs.unstrip_protocol(info["name"])
            files.append(storage.stamp(file, info))
    if not files:
        raise InputError(f"{url}: no such file ({key})")
    files.sort(key=lambda file: [(int(word), "") if word.isdigit() else (-1, word) for word in _NUMBER.split(file[0])])
    for file, _, _ in files:
        if format_of(file) != format_of(files[0][0]):
            raise InputError(
                f"{url}: {format_of(files[0][0])} and {format_of(file)} files are mixed ({_name(files[0][0])}, "
                f"{_name(file)}); choose one with a pattern, such as *.parquet ({key})"
            )
    return files


def format_of(file: str) -> str:
    """The format that a file's name tells. Raises `InputError` for an unknown one."""
    for suffix, name in _FORMATS.items():
        if file.lower().endswith(suffix):
            return name
    raise InputError(f"{file}: unknown format; files end in {', '.join(_FORMATS)}")


def scan(files: list[str]) -> list[TableFile]:
    """Columns and pieces of some Parquet or CSV files."""
    if format_of(files[0]) == "Parquet":
        return _in_threads(_scan_parquet, files)
    tables = _in_threads(_scan_csv, files)
    types: dict[str, set[pa.DataType]] = {}
    for table in tables:  # a column has one type in all files, one that their first lines agree with
        for name, kind in table.columns.items():
            types.setdefault(name, set()).add(kind)
    merged = {name: _merged(kinds - {pa.null()}) for name, kinds in types.items()}
    return [replace(table, columns={name: merged[name] for name in table.columns}) for table in tables]


def scan_npy_edges(files: list[str], src: str, dst: str) -> list[TableFile]:
    """Edge lists `[2, m]`, or all of them `[m, 2]`, as tables of two columns."""
    arrays = _in_threads(NpyArray, files)
    # What [2, 2] means is for the others to tell.
    axis = next((1 - array.shape.index(2) for array in arrays if 2 in array.shape and array.shape != (2, 2)), 1)
    tables = []
    for array in arrays:
        if len(array.shape) != 2 or array.shape[1 - axis] != 2:
            one = "[2, m] or [m, 2], and the same in all files" if len(arrays) > 1 else "[2, m] or [m, 2]"
            raise InputError(f"{array.url}: an edge list has shape {one}, found {array.shape}")
        size = array.shape[axis]
        pieces = [
            Piece(array.url, start, min(PIECE_ROWS, size - start), arrays=(((src, dst), array.url, axis, start),))
            for start in range(0, size, PIECE_ROWS)
        ]
        tables.append(TableFile(array.url, {src: array.scalar, dst: array.scalar}, pieces))
    return tables


def scan_npy_nodes(files: list[str], prefix: str, names: list[str]) -> list[TableFile]:
    """A folder of arrays as a table: `<prefix>*.npy` one below the other, and `<name>.npy`, each for all rows."""
    others = {_name(file)[:-4]: NpyArray(file) for file in files if _name(file)[:-4] in names}
    feats = [file for file in files if _name(file).startswith(prefix) and _name(file)[:-4] not in names]
    if not feats:
        raise InputError(f"{_folder(files[0])}: no {prefix}*.npy; found {', '.join(map(_name, files))}")
    tables, offset = [], 0
    for file, array in zip(feats, _in_threads(NpyArray, feats), strict=True):
        columns = {prefix: array.type} | {name: other.type for name, other in others.items()}
        pieces = []
        for start in range(0, array.rows, PIECE_ROWS):
            row = offset + start
            arrays = (((prefix,), file, 0, start), *(((name,), other.url, 0, row) for name, other in others.items()))
            pieces.append(Piece(file, start, min(PIECE_ROWS, array.rows - start), arrays=arrays))
        tables.append(TableFile(file, columns, pieces))
        offset += array.rows
    for other in others.values():
        if other.rows != offset:
            raise InputError(f"{other.url}: {other.rows:,} rows, but {prefix}*.npy have {offset:,}")
    return tables


def batches(piece: Piece, types: Columns, rows: int) -> Iterator[pa.RecordBatch]:
    """Some columns of a piece, in order, in batches of `rows` rows or fewer; of CSV, of some megabytes of text.

    `types`: what text is converted to; other formats have types of their own. Raises `InputError`.
    """
    fs, path = storage.filesystem(piece.file)
    names = list(types)
    with reading(piece.file):
        if piece.groups is not None:
            with fs.open(path, "rb", cache_type="none") as stream:
                file = pq.ParquetFile(stream, pre_buffer=True)
                # One group at a time: a reader of several would fetch and keep them all.
                for group in range(*piece.groups):
                    yield from file.iter_batches(rows, row_groups=[group], columns=names, use_threads=False)
        elif piece.arrays:
            yield from _npy_batches(piece, names, rows)
        else:
            with fs.open(path, "rb", compression="infer") as stream:
                options = pa.csv.ConvertOptions(column_types=types, include_columns=names)
                yield from pa.csv.open_csv(stream, _csv_options(), convert_options=options)


@contextmanager
def reading(file: str) -> Iterator[None]:
    """Turn what a missing or damaged file makes its readers raise into an `InputError` that names it."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, EOFError, ValueError, zlib.error, pa.ArrowException) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise InputError(f"{file}: cannot be read: {' '.join(str(reason).split())}") from None


class NpyArray:
    """An array in a `.npy` file whose rows are read in slices: without mapping it, so that it may be remote.

    `axis`: along which rows follow each other. `scalar`: the type of its values. `type`: of a column of its rows.
    Raises `InputError`.
    """

    def __init__(self, url: str, axis: int = 0):
        self.url = url
        with reading(url):
            stream = io.BytesIO(self._bytes(0, _NPY_HEADER))
            version = np.lib.format.read_magic(stream)
            read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            if version not in read_header:
                raise ValueError("not a plain array")
            self.shape, fortran, self._dtype = read_header[version](stream)
            self._start = stream.tell()
            if self._dtype.kind not in "biufSU":
                raise ValueError(f"numbers or text expected, found dtype {self._dtype}")
            self.scalar = pa.from_numpy_dtype(self._dtype.newbyteorder("="))
        if len(self.shape) not in (1, 2):
            raise InputError(f"{url}: an array of rows expected, found shape {self.shape}")
        self.rows = self.shape[axis]
        self.width = self.shape[1 - axis] if len(self.shape) == 2 else 1
        # Whether a row's values lie together, or those of a column.
        self._by_rows = (axis == 0) != fortran or len(self.shape) == 1
        self.type = self.scalar if self.width == 1 else pa.list_(self.scalar, self.width)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows `[stop - start, width]`."""
        if self._by_rows:
            return self._values(start * self.width, (stop - start) * self.width).reshape(-1, self.width)
        return np.stack([self._values(k * self.rows + start, stop - start) for k in range(self.width)], axis=1)

    def _bytes(self, start: int, stop: int) -> bytes:
        fs, path = storage.filesystem(self.url)
        with fs.open(path, "rb", cache_type="none") as stream:
            stream.seek(start)
            return bytes(stream.read(stop - start))

    def _values(self, start: int, count: int) -> np.ndarray:
        size = self._dtype.itemsize
        content = self._bytes(self._start + start * size, self._start + (start + count) * size)
        if len(content) < count * size:
            raise InputError(f"{self.url}: cut off: the file is shorter than its header says")
        return np.frombuffer(content, self._dtype).astype(self._dtype.newbyteorder("="), copy=False)


def _npy_batches(piece: Piece, names: list[str], rows: int) -> Iterator[pa.RecordBatch]:
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


def _scan_parquet(file: str) -> TableFile:
    fs, path = storage.filesystem(file)
    with reading(file), fs.open(path, "rb") as stream:
        footer = pq.ParquetFile(stream)
        columns, sizes = _columns(footer.schema_arrow, file), []
        for group in range(footer.metadata.num_row_groups):
            sizes.append(footer.metadata.row_group(group).num_rows)
    pieces, first, start, rows = [], 0, 0, 0
    for group, size in enumerate(sizes):
        rows += size
        if rows >= PIECE_ROWS or group == len(sizes) - 1:
            pieces.append(Piece(file, start, rows, groups=(first, group + 1)))
            first, start, rows = group + 1, start + rows, 0
    return TableFile(file, columns, pieces)


def _scan_csv(file: str) -> TableFile:
    fs, path = storage.filesystem(file)
    with reading(file), fs.open(path, "rb", compression="infer") as stream:
        columns = _columns(pa.csv.open_csv(stream, _csv_options()).schema, file)
    return TableFile(file, columns, [Piece(file, 0, -1)])


def _csv_options() -> pa.csv.ReadOptions:
    # A task has one core, and every further thread would hold further blocks.
    return pa.csv.ReadOptions(use_threads=False, block_size=_CSV_BYTES)


def _merged(kinds: set[pa.DataType]) -> pa.DataType:
    if kinds == {pa.int64(), pa.float64()}:
        return pa.float64()
    numbers = (pa.int64(), pa.float64(), pa.bool_())
    return kinds.pop() if len(kinds) == 1 and kinds <= set(numbers) else pa.string() if kinds else pa.null()


def _columns(schema: pa.Schema, file: str) -> Columns:
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise InputError(f"{file}: column '{name}' is there twice")
    return dict(zip(schema.names, schema.types, strict=True))


def _in_threads(function: Callable[[str], Result], files: list[str]) -> list[Result]:
    """Headers of many files: on remote storage each is a wait, not work."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(function, files))


def _name(url: str) -> str:
    return url.rstrip("/").rsplit("/", 1)[-1]


def _folder(url: str) -> str:
    return url.rsplit("/", 1)[0]
