"""Which columns of a node table and an edge list are read, and whether all of their files agree."""

from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa

from rbm_dist.config.source import TablesConfig
from rbm_dist.errors import InputError
from rbm_dist.sources import table_files
from rbm_dist.sources.node_columns import is_feature, value_type
from rbm_dist.sources.node_ids import is_text, is_whole
from rbm_dist.sources.table_files import Columns, Piece, TableFile

_NPY_FEATURES = "feat"


@dataclass(frozen=True)
class NodeColumns:
    """The columns that are read of a node table."""

    id: str | None
    label: str
    split: str | None
    features: list[str]
    types: Columns  # of all of these; of a dictionary, that of its values
    text_ids: bool

    @property
    def at_once(self) -> Columns:
        """What is read of all nodes at once. `types` of it are those that text is converted to."""
        # As text, labels do not depend on what a file's first lines look like.
        types = {name: pa.string() for name in (self.label, self.split) if name}
        return types | ({self.id: pa.string() if self.text_ids else pa.int64()} if self.id else {})


def nodes(config: TablesConfig, urls: list[str]) -> tuple[NodeColumns, list[Piece]]:
    """Columns and pieces of the node table. Raises `InputError` for what is missing, of a wrong type or at odds."""
    if table_files.format_of(urls[0]) == "npy":
        prefix, *others = config.features or (_NPY_FEATURES,)
        names = [name for name in (config.id, config.label, config.split, *others) if name]
        tables = table_files.scan_npy_nodes(urls, prefix, names)
    else:
        tables = table_files.scan(urls)
    columns = _node_columns(config, tables[0])
    for table in tables[1:]:
        other = _node_columns(config, table)
        for name in {**columns.types, **other.types}:
            ours, theirs = columns.types.get(name, "not there"), other.types.get(name, "not there")
            if ours != theirs:
                raise InputError(f"{table.url}: column '{name}' is {theirs}, but {ours} in {tables[0].url}")
    return columns, [piece for table in tables for piece in table.pieces]


def edges(config: TablesConfig, urls: list[str], text_ids: bool) -> list[Piece]:
    """Pieces of the edge list. Raises `InputError` for what is missing or not of the type of the node ids."""
    kind = table_files.format_of(urls[0])
    tables = table_files.scan_npy_edges(urls, config.src, config.dst) if kind == "npy" else table_files.scan(urls)
    for table in tables:
        for name, key in ((config.src, "src"), (config.dst, "dst")):
            found = value_type(_need(table, name, key))
            # Numbers in CSV can be read as text too.
            fits = (kind == "CSV" or is_text(found)) if text_ids else is_whole(found)
            if not fits and not pa.types.is_null(found):
                ids = "strings" if text_ids else "integers" if config.id else "row numbers (source.id)"
                raise InputError(f"{table.url}: column '{name}' is {found}, but node ids are {ids} (source.{key})")
    return [piece for table in tables for piece in table.pieces]


def _node_columns(config: TablesConfig, table: TableFile) -> NodeColumns:
    columns, kind = table.columns, table_files.format_of(table.url)
    node_id, split = config.id, config.split
    if kind == "npy" and node_id == TablesConfig.model_fields["id"].default and node_id not in columns:
        node_id = None
    if split == TablesConfig.model_fields["split"].default and split not in columns:
        split = None
    text_ids = False
    if node_id:
        found = value_type(_need(table, node_id, "id", "; null: ids are row numbers"))
        text_ids = not is_whole(found)
        if kind != "CSV":
            _expect(table, node_id, "id", lambda t: is_whole(t) or is_text(t), "integers or strings")
    _need(table, config.label, "label")
    _expect(table, config.label, "label", _is_label, "classes, as integers or names,")
    if split:
        _need(table, split, "split")
        _expect(table, split, "split", lambda t: is_whole(t) or is_text(t) or pa.types.is_null(t), "train, val or test")
    taken = [name for name in (node_id, config.label, split) if name]
    if config.features:
        features = list(config.features)
        for name in features:
            _need(table, name, "features")
            _expect(table, name, "features", is_feature, "numbers or lists of numbers")
    else:
        features = [name for name, found in columns.items() if name not in taken and is_feature(found)]
        if not features:
            raise InputError(f"{table.url}: no columns of numbers for features (source.features); {_found(table)}")
    types = {name: value_type(columns[name]) for name in (*taken, *features)}
    return NodeColumns(node_id, config.label, split, features, types, text_ids)


def _is_label(kind: pa.DataType) -> bool:
    numbers = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
    return numbers or is_text(kind) or pa.types.is_null(kind)


def _need(table: TableFile, name: str, key: str, hint: str = "") -> pa.DataType:
    if name not in table.columns:
        raise InputError(f"{table.url}: no column '{name}' (source.{key}{hint}); {_found(table)}")
    return table.columns[name]


def _expect(table: TableFile, name: str, key: str, fits: Callable[[pa.DataType], bool], expected: str) -> None:
    found = value_type(table.columns[name])
    if not fits(found):
        raise InputError(f"{table.url}: column '{name}': {expected} expected, found {found} (source.{key})")


def _found(table: TableFile) -> str:
    return f"found {', '.join(table.columns) or 'nothing'}"
