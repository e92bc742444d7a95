"""Predictions for tables of nodes that nobody has seen: rows of files in, classes and probabilities out.

Files are read as those that a graph is made of (`sources/table_files.py`), in bounded memory, and neither torch nor Ray
is imported. While one batch is computed, a thread reads the next.
"""

import re
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat, takewhile
from typing import Literal

import numpy as np
import pyarrow as pa

from rbm_dist.config.source import TablesConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.loader import Prefetch
from rbm_dist.graph.shards import IdType
from rbm_dist.serve.format import ModelFile, NodeId
from rbm_dist.serve.loaded import LoadedStudent
from rbm_dist.serve.prediction_files import Predictions
from rbm_dist.sources import node_ids, npy_files, pieces, table_files
from rbm_dist.sources.pieces import At, Columns, TableFile, file_name

_VALUES = 1 << 20  # features in a batch
_ROWS = 1 << 16  # in a batch, at most
_DEADLINE_S = 600.0  # for a batch to be read
_COMPRESSION = 4  # how much smaller text is when it is compressed, about
_OPTIONS = "id|id_type|delimiter|header|encoding|src|dst|unknown_nodes"


@dataclass(frozen=True)
class ReadOptions:
    """How tables of new nodes are written, as far as it differs from what is found."""

    id: str | None = None  # column of node ids; None: as in training
    row_numbers: bool = False  # ids are row numbers, whatever columns there are
    id_type: Literal["auto", "integer", "text"] = "auto"  # of text files; auto: as in training
    delimiter: str | None = None
    header: bool | None = None
    encoding: str = "utf8"

    def tables(self, nodes: str, **more: str) -> TablesConfig:
        """As the configuration of a source."""
        return TablesConfig(
            nodes=nodes, delimiter=self.delimiter, header=self.header, encoding=self.encoding, **{"edges": "", **more}
        )


@dataclass(frozen=True)
class NodeTable:
    """One file of nodes, and what is read of it."""

    file: TableFile
    stamp: tuple[str, int, str]
    types: Columns  # of the features, as they are read
    id: str | None  # None: row numbers
    id_type: IdType | None  # of text that is to become ids of this type; None: as they are
    rows: int  # about, where it is not known before it is read
    others: int  # columns that are passed over

    @property
    def written_id(self) -> pa.DataType:
        """The type of ids in predictions."""
        if self.id is None:
            return pa.int64()
        kind = self.file.columns[self.id]
        if self.id_type is not None:
            return node_ids.arrow_type(self.id_type.arrow)
        return kind if isinstance(kind, pa.BaseExtensionType) else table_files.plain(kind)


Encode = Callable[[int, int], dict[str, np.ndarray]]
"""The encodings of the rows of a file from one row to another, by name: `[n, width]`."""


def open_tables(
    url: str,
    model: ModelFile,
    reader_types: Callable[..., Columns],
    options: ReadOptions,
    option: str = "--nodes",
    more: Sequence[str] = (),
) -> list[NodeTable]:
    """The files of a table, in order, with what is read of each: headers and footers are read, no row.

    url: file, folder or pattern; `option` is where it is from, for messages. more: columns that may be there. Raises
    `InputError` for what is not there, and for columns that are missing or of another type.
    """
    found = table_files.listing(url, option).files
    files = [stamp[0] for stamp in found]
    config, wanted = options.tables(url), _id_column(model.id, options)
    names = [column.name for column in model.features.columns]
    with said_as_options():
        if table_files.format_of(files[0]) == "npy":
            wanted = wanted if options.id or any(file_name(file) == f"{wanted}.npy" for file in files) else None
            there = [name for name in more if any(file_name(file) == f"{name}.npy" for file in files)]
            tables = npy_files.scan_nodes(files, names[0], [name for name in (wanted, *names[1:], *there) if name])
        else:
            lists = {column.name for column in model.features.columns if column.how == "list"}
            tables = table_files.scan(files, config, [name for name in (wanted, *names) if name and name not in lists])
    stamps = {stamp[0]: stamp for stamp in found}
    return [_node_table(table, stamps[table.url], model, wanted, reader_types, options) for table in tables]


def predictions(
    student: LoadedStudent, table: NodeTable, encode: Encode | None = None, first_row: int = 0
) -> Generator[Predictions, None, None]:
    """Predictions for the rows of a file, in chunks and in order.

    encode: gives the inputs that come from edges. first_row: the number of its first row, where ids are row numbers.
    Raises `InputError`, which names file and row.
    """
    read = _batches(student, table, first_row)
    jobs = repeat(partial(next, read, None))
    with said_as_options(), Prefetch(f"{table.file.url}: rows", jobs, _DEADLINE_S) as found:
        row = 0
        for ids, feat_BF in takewhile(lambda each: each is not None, found):
            encodings = {} if encode is None else encode(row, row + len(ids))
            yield Predictions(ids, student.probabilities({"feat": feat_BF} | encodings))
            row += len(ids)


def all_ids(table: NodeTable, of: IdType) -> np.ndarray:
    """The ids of all rows of a file, as a graph with ids of this type has them. Raises `InputError`."""
    found = (ids for _, ids, _ in read_columns(replace(table, types={}), of))
    return np.concatenate([np.empty(0, "S1" if of.is_named else np.int64), *found])


def read_columns(
    table: NodeTable, of: IdType, more: Sequence[str] = ()
) -> Iterator[tuple[pa.RecordBatch, np.ndarray, At]]:
    """Batches of a file's features and of further columns, the rows' ids as in `all_ids`, and what says where a row is.

    Raises `InputError`.
    """
    if table.id is None:
        raise InputError(
            f"{table.file.url}: edges need the ids of new nodes, and there is no column of ids; name it (--id)"
        )
    types = dict(table.types)
    for name in (table.id, *more):
        types.setdefault(name, table_files.plain(table.file.columns[name]))
    rows = min(_ROWS, max(1, _VALUES // max(1, len(types))))
    for piece in table.file.pieces:
        for batch, start in table_files.placed_batches(piece, types, rows):
            at = partial(piece.at, start)
            with pieces.reading(piece.file):  # a conversion can fail too
                yield batch, _ids(batch.column(table.id), of, table.id, at), at


@contextmanager
def said_as_options() -> Iterator[None]:
    """In this block errors name options of the command in place of keys of a source's configuration."""
    try:
        yield
    except InputError as error:
        text = re.sub(rf"source\.({_OPTIONS})\b", lambda key: "--" + key[1].replace("_", "-"), str(error))
        raise InputError(text) from None


def _id_column(trained: NodeId, options: ReadOptions) -> str | None:
    return None if options.row_numbers else options.id or trained.column


def _node_table(
    table: TableFile, stamp: tuple[str, int, str], model: ModelFile, wanted: str | None,
    reader_types: Callable[..., Columns], options: ReadOptions,
) -> NodeTable:  # fmt: skip
    text = bool(table.pieces) and table.pieces[0].dialect is not None
    id_type = None
    if wanted is not None:
        if wanted not in table.columns:
            raise InputError(
                f"{table.url}: no column '{wanted}' of node ids; name another (--id), or number rows (--row-numbers)"
            )
        kind = table.columns[wanted]
        if node_ids.id_type(kind, "auto") is None:
            raise InputError(f"{table.url}: column '{wanted}': integers, text or binary expected as ids, found {kind}")
        if text:
            as_integers = options.id_type == "integer" or (
                options.id_type == "auto" and wanted == model.id.column and model.id.kind in ("integer", "unsigned")
            )
            id_type = (
                IdType(
                    model.id.kind if model.id.kind == "unsigned" else "integer",
                    "uint64" if model.id.kind == "unsigned" else "int64",
                )
                if as_integers
                else IdType("text", "string")
            )
    types = reader_types(table.columns, table.url, text)
    return NodeTable(
        table, stamp, types, wanted, id_type, _rows(table, stamp[1]), len(table.columns.keys() - {wanted, *types})
    )


def _rows(table: TableFile, size: int) -> int:
    known = pieces.num_rows(table.pieces)
    if known is not None:
        return known
    dialect = table.pieces[0].dialect
    is_compressed = pieces.without_compression(table.url) != table.url
    return size * (_COMPRESSION if is_compressed else 1) // max(1, dialect.row_bytes if dialect else 1)


def _batches(student: LoadedStudent, table: NodeTable, first_row: int) -> Iterator[tuple[pa.Array, np.ndarray]]:
    """Ids and features, batch by batch."""
    types = dict(table.types)
    if table.id is not None:
        types.setdefault(table.id, table_files.plain(table.file.columns[table.id]))
    rows = min(_ROWS, max(1, _VALUES // student.model.features.width))
    for piece in table.file.pieces:
        for batch, start in table_files.placed_batches(piece, types, rows):
            at = partial(piece.at, start)
            with pieces.reading(piece.file):  # a conversion can fail too
                feat_BF = student.reader.from_batch(batch, at)
                for part in range(0, max(1, batch.num_rows), rows):
                    own = batch.slice(part, rows)
                    yield _written_ids(own, table, at, first_row + part), feat_BF[part : part + rows]
            first_row += batch.num_rows


def _written_ids(batch: pa.RecordBatch, table: NodeTable, at: At, first_row: int) -> pa.Array:
    if table.id is None:
        return pa.array(np.arange(first_row, first_row + batch.num_rows))
    column, kind = batch.column(table.id), table.written_id
    if table.id_type is not None:
        column = node_ids.to_arrow(_ids(column, table.id_type, table.id, at), table.id_type)
    elif column.null_count:
        row = int(column.is_null().to_numpy(zero_copy_only=False).argmax())
        raise InputError(f"{at(row)}, column {table.id}: the id is missing")
    return pa.ExtensionArray.from_storage(kind, column) if isinstance(kind, pa.BaseExtensionType) else column


def _ids(column: pa.Array, of: IdType, name: str, at: At) -> np.ndarray:
    found, wrong = node_ids.from_arrow(column, of, name, at)
    if wrong is not None:
        row = int(wrong.argmax())
        raise InputError(
            f"{at(row)}, column {name}: ids are integers, as in training; found {column[row].as_py()!r} "
            "(source.id_type: text takes the ids of text files as they are written)"
        )
    return found
