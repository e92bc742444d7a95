"""Delimited text (CSV, TSV, SNAP's edge lists) as tables whose every value is text until a column's whole is known.

What a column is made of is never guessed from a file's first lines: text is read, and `text_columns` decides.
"""

import csv
import io
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from rbm_dist import storage
from rbm_dist.config.source import TablesConfig
from rbm_dist.errors import InputError
from rbm_dist.sources.pieces import Columns, Dialect, Piece, TableFile, in_threads, reading, without_compression

_BLOCK = 1 << 22  # bytes of text that are parsed at once; a row has to fit
_WIDE_ROWS = 256  # of very wide tables so many rows at once, or the work per column would outweigh that per value
_WIDE_BLOCK = 1 << 28
_HEAD = 1 << 16
_COMMENTS = ("#", "%")
_DELIMITERS = (",", "\t", ";", "|", " ")
_TABS = (".tsv", ".tab")


def scan(files: list[str], config: TablesConfig, wanted: Sequence[str], is_edges: bool) -> list[TableFile]:
    """Columns and pieces of some files. `wanted`: columns that a header should name, which tells the delimiter."""

    def one(file: str) -> TableFile:
        found = _dialect(file, config, wanted, is_edges)
        if len(set(found.names)) < len(found.names):
            name = next(name for name in found.names if found.names.count(name) > 1)
            spaces = "; where several spaces stand between columns, write one other character (source.delimiter)"
            raise InputError(f"{file}: column '{name}' is there twice{spaces * (not name)}")
        return TableFile(file, dict.fromkeys(found.names, pa.string()), [Piece(file, 0, -1, dialect=found)])

    return in_threads(one, files)


def batches(piece: Piece, types: Columns) -> Iterator[pa.RecordBatch]:
    """Some columns of a file, in batches of some megabytes of text. `types`: text, or numbers where all values are."""
    dialect = piece.dialect
    assert dialect is not None
    fs, path = storage.filesystem(piece.file)
    # A comment of as many words as there are columns looks like a row.
    commented = dialect.comments and all(map(pa.types.is_string, types.values()))
    names = list(dict.fromkeys([*types, *dialect.names[:1]])) if commented else list(types)
    read = pa.csv.ReadOptions(
        use_threads=False,  # a task has one core, and every further thread would hold further blocks
        block_size=max(_BLOCK, min(_WIDE_ROWS * dialect.row_bytes, _WIDE_BLOCK)),
        skip_rows=dialect.skip, encoding=dialect.encoding,
        column_names=None if dialect.header else list(dialect.names),
    )  # fmt: skip
    parse = pa.csv.ParseOptions(
        delimiter=dialect.delimiter, newlines_in_values=True, invalid_row_handler=_comment_or_error
    )
    read_as = {name: types.get(name, pa.string()) for name in names}
    convert = pa.csv.ConvertOptions(
        column_types=read_as, include_columns=names, null_values=[], strings_can_be_null=False
    )
    with fs.open(path, "rb", compression="infer") as stream:
        for batch in pa.csv.open_csv(stream, read, parse, convert):
            if commented:
                first = pc.utf8_ltrim_whitespace(batch.column(dialect.names[0]))
                batch = batch.filter(pc.invert(pc.match_substring_regex(first, "^[#%]"))).select(list(types))
            yield batch


def _comment_or_error(row: pa.csv.InvalidRow) -> str:
    return "skip" if row.text.lstrip().startswith(_COMMENTS) else "error"


def _dialect(file: str, config: TablesConfig, wanted: Sequence[str], is_edges: bool) -> Dialect:
    with reading(file):
        head = _head(file)
        text = head.decode(config.encoding.replace("utf8", "utf-8-sig"), errors="replace")
    skip, comment = 0, ""
    lines = text.splitlines(keepends=True)
    while skip < len(lines) and (not lines[skip].strip() or _is_comment(lines[skip], wanted)):
        comment = lines[skip].strip() or comment
        skip += 1
    rest = "".join(lines[skip:])
    if not rest.strip():
        raise InputError(f"{file}: has no lines but comments; remove it, or write a header")
    delimiter = config.delimiter or _delimiter(file, rest, wanted)
    first = _record(rest, delimiter)
    header, names = True, first
    if config.header is False or (config.header is None and is_edges and _is_data(first, wanted)):
        said = _record(comment.lstrip("#% "), delimiter)
        named = config.header is None and set(wanted) <= set(said) and len(said) == len(first)
        header, names = False, said if named else list(map(str, range(len(first))))
    return Dialect(delimiter, skip, tuple(names), header, config.encoding, len(rest.partition("\n")[0]), bool(comment))


def _is_comment(line: str, wanted: Sequence[str]) -> bool:
    """A first line such as `#id,label` is a header whose first column is named `#id`, if that is what is asked for."""
    if not line.startswith(_COMMENTS):
        return False
    return not any(name.startswith(_COMMENTS) and name in line for name in wanted)


def _is_data(first: list[str], wanted: Sequence[str]) -> bool:
    """Whether the first line of an edge list is an edge: it names no wanted column, and begins with two numbers."""
    return (
        not set(first) & set(wanted)
        and len(first) >= 2
        and all(each.strip().lstrip("-").isdigit() for each in first[:2])
    )


def _head(file: str) -> bytes:
    """A first line at least, and what comes with it."""
    fs, path = storage.filesystem(file)
    with fs.open(path, "rb", compression="infer") as stream:
        head = b""
        while block := stream.read(_HEAD):
            head += block
            if (b"\n" in block and not head.lstrip().startswith((b"#", b"%"))) or len(head) >= _BLOCK:
                break
    return head


def _delimiter(file: str, text: str, wanted: Sequence[str]) -> str:
    """That which separates the wanted columns in the first line; else that which makes most columns of it."""
    stem = without_compression(file).lower()
    candidates = ("\t", *_DELIMITERS) if stem.endswith(_TABS) else _DELIMITERS
    records = {each: _record(text, each) for each in candidates}
    for each, fields in records.items():
        if set(wanted) <= set(fields):
            return each
    return max(records, key=lambda each: min(len(records[each]), 2) if stem.endswith(".csv") else len(records[each]))


def _record(text: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(text), delimiter=delimiter), [])
    except csv.Error:
        return text.splitlines()[0].split(delimiter) if text else []
