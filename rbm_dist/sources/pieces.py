"""What tables are read in: pieces, each the rows that one task reads, front to back; and how trouble is reported."""

import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import pyarrow as pa

from rbm_dist.errors import InputError

PIECE_ROWS = 1 << 22
"""Rows of a Parquet or npy file after which another piece begins."""

_GROUPS = 256  # of pieces, as long as these are small

At = Callable[[int], str]
"""Says where a row is, for messages."""
Columns = dict[str, pa.DataType]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Dialect:
    """How a file of delimited text is written."""

    delimiter: str
    skip: int  # lines before the header, or before the first row where there is no header
    names: tuple[str, ...]  # of the columns
    header: bool  # whether a line of the file says these names
    encoding: str = "utf8"
    row_bytes: int = 0  # of a row, about
    comments: bool = False  # whether it begins with lines that are comments, and so may have more


@dataclass(frozen=True)
class Piece:
    """Rows that one task reads."""

    file: str
    start: int  # the row of the file that it begins with
    rows: int  # -1: not known before it is read (CSV)
    groups: tuple[int, int] | None = None  # Parquet: the first row group, and the first that is no longer its own
    # npy: the columns that an array gives (one, or two of an edge list), the array, its axis of rows, its first row.
    arrays: tuple[tuple[tuple[str, ...], str, int, int], ...] = ()
    dialect: Dialect | None = None  # CSV
    constants: dict[str, str] = field(default_factory=dict)  # columns that the path says: `…/day=3/…`

    def at(self, before: int, row: int) -> str:
        """For messages: where a row of a batch is, of which so many rows of the piece are before."""
        return f"{self.file}: row {self.start + before + row}"

    @classmethod
    def of(cls, stored: dict) -> "Piece":
        """A piece from what `dataclasses.asdict` made of it, and JSON of that."""
        dialect = stored["dialect"]
        if dialect is not None:
            dialect = Dialect(**{**dialect, "names": tuple(dialect["names"])})
        return cls(**{**stored, "dialect": dialect})


@dataclass(frozen=True)
class TableFile:
    """What can be said of a file from its header or footer. A file of text has text in all columns."""

    url: str
    columns: Columns
    pieces: list[Piece]


def grouped(pieces: list[Piece]) -> list[tuple[int, int]]:
    """Which neighbouring pieces one task reads: many small files are read some at a time."""
    most = -(-len(pieces) // _GROUPS)
    groups, first, rows = [], 0, 0
    for index, piece in enumerate(pieces):
        rows += piece.rows
        if index + 1 - first >= most or rows >= PIECE_ROWS or index + 1 == len(pieces):
            groups.append((first, index + 1))
            first, rows = index + 1, 0
    return groups


def num_rows(pieces: Iterable[Piece]) -> int | None:
    """How many rows some pieces have; None where that is not known before they are read (CSV)."""
    rows = [piece.rows for piece in pieces]
    return None if -1 in rows else sum(rows)


@contextmanager
def reading(file: str) -> Iterator[None]:
    """Turn what a missing or damaged file makes its readers raise into an `InputError` that names it."""
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (OSError, EOFError, ValueError, zlib.error, pa.ArrowException) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        text = " ".join(str(reason).split())
        raise InputError(f"{file}: cannot be read: {text}{_advice(text)}") from None


def _advice(text: str) -> str:
    if "UTF8" in text or "utf-8" in text:
        return ". Say what its text is written in: source.encoding, such as latin-1"
    if "straddling" in text:
        return ". A row is too long, or a quote is never closed"
    return ""


def in_threads(function: Callable[[str], Result], files: list[str]) -> list[Result]:
    """Headers of many files: on remote storage each is a wait, not work."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        return list(pool.map(function, files))


def file_name(url: str) -> str:
    return url.rstrip("/").rsplit("/", 1)[-1]


def folder_of(url: str) -> str:
    return url.rsplit("/", 1)[0]


def without_compression(file: str) -> str:
    """A file's name without the ending that says how it is compressed."""
    return re.sub(r"\.(gz|bz2|xz|zst)$", "", file, flags=re.IGNORECASE)
