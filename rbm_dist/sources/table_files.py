"""Tables as files on any fsspec URL: which there are, and their rows in record batches of bounded size.

Besides a batch, a reader holds one row group of Parquet as it is stored, if that is not large, or some megabytes.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rbm_dist import storage
from rbm_dist.config.source import TablesConfig
from rbm_dist.errors import InputError
from rbm_dist.sources import csv_files, npy_files, pieces
from rbm_dist.sources.pieces import (
    Columns,
    Piece,
    TableFile,
    file_name,
    folder_of,
    in_threads,
    reading,
    without_compression,
)

_FORMATS = {".parquet": "Parquet", ".pq": "Parquet", ".npy": "npy"} | dict.fromkeys(
    (".csv", ".tsv", ".tab", ".txt", ".edges", ".edgelist"), "CSV"
)
_NUMBER = re.compile(r"(\d+)")
_PARTITION = re.compile(r"([^=/]+)=([^/]*)")
_LARGE_GROUP = 1 << 26  # bytes of a row group of Parquet, beyond which its columns are read some at a time
_BUFFERS = 1 << 26  # bytes of all columns' pieces of a remote file, where each is a request
_LEAST_BUFFER = 1 << 16  # bytes of a column that are read at once
_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class Listing:
    """The files of a table."""

    files: list[tuple[str, int, str]]  # their `storage.stamp`s
    empty: int  # files of no bytes, which are passed over
    others: list[str]  # files that are no tables, which are passed over too


def find(url: str, key: str) -> list[tuple[str, int, str]]:
    """The files of a file, folder or glob URL: their `storage.stamp`s; see `listing`."""
    return listing(url, key).files


def listing(url: str, key: str) -> Listing:
    """The files of a file, folder (whatever is below it) or glob URL; hidden ones (`.…`, `_…`) are left out.

    Sorted by path, numbers in names by value. `key`: the configuration's, for messages. Raises `InputError` where
    there are none, or where formats are mixed.
    """
    fs, path = storage.filesystem(url)
    with reading(url):
        alone = fs.isfile(path)
        if alone:
            found = [fs.info(path)]
        else:
            folder = fs.isdir(path)
            matched = [fs.info(path)] if folder else list(fs.glob(path, detail=True).values())
            if not matched:
                raise InputError(f"{url}: no such file ({key})")
            found = [each for info in matched for each in _below(fs, info)]
    files, others, empty = [], [], 0
    for info in found:
        name = info["name"] if storage.is_local(url) else fs.unstrip_protocol(info["name"])
        if not alone and _suffix_of(name) is None:
            others.append(name)
        elif not info["size"]:
            empty += 1
        else:
            files.append(storage.stamp(name, info))
    if not files:
        if alone:
            raise InputError(f"{url}: the file is empty ({key})")
        why = f"{empty:,} files of no bytes" if empty else "no table in it"
        why += f", but {', '.join(map(file_name, others[:3]))}" if others else ""
        raise InputError(f"{url}: {why}; tables end in {_endings()} ({key})")
    files.sort(key=lambda file: [(int(word), "") if word.isdigit() else (-1, word) for word in _NUMBER.split(file[0])])
    for file, _, _ in files:
        if format_of(file) != format_of(files[0][0]):
            raise InputError(
                f"{url}: {format_of(files[0][0])} and {format_of(file)} files are mixed ({file_name(files[0][0])}, "
                f"{file_name(file)}); choose one with a pattern, such as *.parquet ({key})"
            )
    return Listing(files, empty, sorted(others))


def _below(fs: Any, info: dict[str, Any]) -> list[dict[str, Any]]:
    """A file, or the files below a folder, but for hidden ones."""
    if info["type"] == "file":
        return [] if file_name(info["name"])[0] in "._" else [info]
    root = info["name"].rstrip("/")
    found = fs.find(root, detail=True).values()
    names = ((each, each["name"][len(root) :].strip("/").split("/")) for each in found)
    return [each for each, parts in names if not any(part[:1] in ("_", ".") for part in parts)]


def format_of(file: str) -> str:
    """The format that a file's name tells. Raises `InputError` for an unknown one."""
    found = _suffix_of(file)
    if found is None:
        raise InputError(f"{file}: unknown format; files end in {_endings()}")
    return found


def _suffix_of(file: str) -> str | None:
    stem = without_compression(file).lower()
    return next((name for suffix, name in _FORMATS.items() if stem.endswith(suffix)), None)


def _endings() -> str:
    return f"{', '.join(_FORMATS)} (text also .gz, .bz2, .xz)"


def scan(files: list[str], config: TablesConfig, wanted: Sequence[str], is_edges: bool = False) -> list[TableFile]:
    """Columns and pieces of some Parquet or CSV files. `wanted`: columns that have to be there."""
    if format_of(files[0]) == "Parquet":
        tables = in_threads(_scan_parquet, files)
    else:
        tables = csv_files.scan(files, config, wanted, is_edges)
    return [_with_partition(table) for table in tables]


def _with_partition(table: TableFile) -> TableFile:
    """With the columns that the path says, as Hive and Spark write them: `day=3/part-0.parquet`."""
    parts = [match for part in folder_of(table.url).split("/") if (match := _PARTITION.fullmatch(part))]
    said = {match[1]: match[2] for match in parts}
    constants = {
        key: "" if value == _NULL else unquote(value) for key, value in said.items() if key not in table.columns
    }
    if not constants:
        return table
    columns = table.columns | dict.fromkeys(constants, pa.string())
    return TableFile(table.url, columns, [replace(piece, constants=constants) for piece in table.pieces])


def batches(piece: Piece, types: Columns, rows: int) -> Iterator[pa.RecordBatch]:
    """Some columns of a piece, in order, in batches of `rows` rows or fewer; of CSV, of some megabytes of text.

    `types`: what they are given as; a file may have them in another type that this one holds. Raises `InputError`.
    """
    names = [name for name in types if name not in piece.constants]
    stored = {name: types[name] for name in names}
    with reading(piece.file):
        if piece.groups is not None:
            found = _parquet_batches(piece, names, rows)
        elif piece.arrays:
            found = npy_files.batches(piece, names, rows)
        else:
            found = csv_files.batches(piece, stored)
        for batch in found:
            yield _typed(batch, types, piece)


def placed_batches(piece: Piece, types: Columns, rows: int) -> Iterator[tuple[pa.RecordBatch, int]]:
    """The batches of a piece, and how many rows of it were before."""
    start = 0
    for batch in batches(piece, types, rows):
        yield batch, start
        start += batch.num_rows


def _typed(batch: pa.RecordBatch, types: Columns, piece: Piece) -> pa.RecordBatch:
    """The batch with these columns, in these types."""
    if not piece.constants and batch.schema.names == list(types) and batch.schema.types == list(types.values()):
        return batch
    columns, by_name = [], dict(zip(batch.schema.names, batch.columns, strict=True))
    for name, kind in types.items():
        if name in piece.constants:
            columns.append(pa.repeat(pa.scalar(piece.constants[name], kind), batch.num_rows))
        else:
            columns.append(cast(by_name[name], kind))
    return pa.RecordBatch.from_arrays(columns, names=list(types))


def cast(column: pa.Array, kind: pa.DataType) -> pa.Array:
    """A column in another type of the same values: of a dictionary or an extension, what it stands for."""
    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if column.type == kind:
        return column
    if pa.types.is_boolean(column.type) and not pa.types.is_boolean(kind):
        column = column.cast(pa.uint8())
    # Not safe: a large integer may lose its last digits as a float, as every feature does.
    return column.cast(kind, safe=not pa.types.is_floating(kind))


def plain(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values: of a dictionary or an extension such as UUID, what it stands for."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def unified(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type that holds the values of two, such as those of one column in two files; None if there is none."""
    one, other = plain(one), plain(other)
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if is_list(one) and is_list(other):
        value = unified(one.value_type, other.value_type)
        fixed = {each.list_size if pa.types.is_fixed_size_list(each) else None for each in (one, other)}
        if value is None:
            return None
        return pa.list_(value, *fixed) if len(fixed) == 1 and None not in fixed else pa.large_list(value)
    for is_kind, kind in ((is_string, pa.large_string()), (is_bytes, pa.large_binary())):
        if is_kind(one) and is_kind(other):
            return kind
    if is_number(one) and is_number(other):
        if pa.types.is_decimal(one) or pa.types.is_decimal(other):
            return pa.float64()
        return pa.from_numpy_dtype(np.result_type(one.to_pandas_dtype(), other.to_pandas_dtype()))
    return None


def is_number(kind: pa.DataType) -> bool:
    return (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
    )


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def is_string(kind: pa.DataType) -> bool:
    return any(getattr(pa.types, test)(kind) for test in ("is_string", "is_large_string", "is_string_view"))


def is_bytes(kind: pa.DataType) -> bool:
    tests = ("is_binary", "is_large_binary", "is_binary_view", "is_fixed_size_binary")
    return any(getattr(pa.types, test)(kind) for test in tests)


def _parquet_batches(piece: Piece, names: list[str], rows: int) -> Iterator[pa.RecordBatch]:
    fs, path = storage.filesystem(piece.file)
    assert piece.groups is not None
    with fs.open(path, "rb", cache_type="none") as stream:
        whole = pq.ParquetFile(stream, pre_buffer=True)
        metadata = whole.metadata
        # One group at a time: a reader of several would fetch and keep them all.
        for group in range(*piece.groups):
            file = whole
            if metadata.row_group(group).total_byte_size > _LARGE_GROUP:  # it would be held whole, too
                file = pq.ParquetFile(
                    stream, metadata=metadata, pre_buffer=False, buffer_size=_buffer(piece, len(names))
                )
            yield from file.iter_batches(rows, row_groups=[group], columns=names, use_threads=False)


def _buffer(piece: Piece, columns: int) -> int:
    return _LEAST_BUFFER if storage.is_local(piece.file) else max(_LEAST_BUFFER, _BUFFERS // max(1, columns))


def ranges(files: list[str], names: Sequence[str]) -> dict[str, tuple[float, float, int]]:
    """Lowest and highest value and missing ones of columns of numbers, as far as all footers of Parquet say them."""
    wanted, found, silent = set(names), dict[str, tuple[float, float, int]](), set[str]()
    for metadata in in_threads(_metadata, files):
        for group in (metadata.row_group(index) for index in range(metadata.num_row_groups)):
            for chunk in (group.column(index) for index in range(group.num_columns)):
                name, said = chunk.path_in_schema, chunk.statistics
                if name not in wanted:
                    continue
                if said is None or not said.has_min_max or not isinstance(said.min, int | float):
                    silent.add(name)
                    continue
                low, high, missing = found.get(name, (np.inf, -np.inf, 0))
                found[name] = (min(low, said.min), max(high, said.max), missing + (said.null_count or 0))
    return {name: said for name, said in found.items() if name not in silent}


def _metadata(file: str) -> pq.FileMetaData:
    fs, path = storage.filesystem(file)
    with reading(file), fs.open(path, "rb") as stream:
        return pq.read_metadata(stream)


def _scan_parquet(file: str) -> TableFile:
    fs, path = storage.filesystem(file)
    with reading(file), fs.open(path, "rb") as stream:
        footer = pq.ParquetFile(stream)
        schema = footer.schema_arrow
        sizes = [footer.metadata.row_group(group).num_rows for group in range(footer.metadata.num_row_groups)]
    names = schema.names
    if len(set(names)) < len(names):
        raise InputError(f"{file}: column '{next(name for name in names if names.count(name) > 1)}' is there twice")
    found, first, start, rows = [], 0, 0, 0
    for group, size in enumerate(sizes):
        rows += size
        if rows >= pieces.PIECE_ROWS or group == len(sizes) - 1:
            found.append(Piece(file, start, rows, groups=(first, group + 1)))
            first, start, rows = group + 1, start + rows, 0
    return TableFile(file, dict(zip(names, schema.types, strict=True)), found)
