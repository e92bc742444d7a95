"""Which columns of a node table and an edge list are read, as what, and why others are not."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from rbm_dist.config.source import TablesConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.shards import ROW_NUMBERS, IdType
from rbm_dist.graph.splits import MASKS
from rbm_dist.sources import node_columns, node_ids, npy_files, table_files
from rbm_dist.sources.node_columns import MASK_COLUMNS, Feature
from rbm_dist.sources.pieces import Columns, Piece, TableFile
from rbm_dist.sources.table_files import is_list, is_number, is_string, plain, unified

_FEATURES = "feat"  # of npy
_PANDAS_INDEX = ("", "Unnamed: 0", "__index_level_0__")
_NAMES_IN_MESSAGES = 30
_ROWS = 1 << 12  # in which the first list is looked for


@dataclass(frozen=True)
class NodeColumns:
    """What the columns of a node table are for."""

    id: str | None
    id_type: IdType | None  # None: text, of which it is not known yet whether all of it is integers
    label: str
    split: str | None
    masks: tuple[str, ...]  # in place of a split
    text: bool  # whether all columns are text (CSV)
    types: Columns  # of all columns, as they are read
    features: list[str]  # that are numbers, booleans or lists of them by their type
    candidates: list[str]  # text that is to be looked at: numbers as text
    one_hot: list[str]  # text whose values are to be known
    hashed: list[str]
    left_out: list[tuple[str, str]]  # columns, and why
    named: bool  # whether `source.features` says which columns are features

    @property
    def scanned(self) -> Columns:
        """What is read of all nodes at once, and in which types."""
        names = [each for each in (self.id, self.label, self.split, *self.masks) if each]
        return {name: self.types[name] for name in dict.fromkeys([*names, *self.candidates, *self.one_hot])}


def nodes(config: TablesConfig, files: Sequence[str]) -> tuple[NodeColumns, list[Piece]]:
    """Columns and pieces of the node table. Raises `InputError` for what is missing, of a wrong type or at odds."""
    kind = table_files.format_of(files[0])
    if kind == "npy":
        prefix, *others = config.features or (_FEATURES,)
        names = [name for name in (config.id, config.label, config.split, *MASK_COLUMNS, *others) if name]
        tables = npy_files.scan_nodes(list(files), prefix, names)
    else:
        wanted = [name for name in (config.id, config.label) if name]
        tables = table_files.scan(list(files), config, wanted)
    types = _one_schema(tables, config, _used_by_name(config), kind == "CSV")
    by_path = {name for table in tables for piece in table.pieces for name in piece.constants}
    of_ids = {str(table.columns.get(config.id)): table.columns.get(config.id) for table in tables if config.id}
    if len(of_ids) == 1 and config.id in types:  # UUIDs come back as such
        types[config.id] = tables[0].columns[config.id]
    found = _roles(config, types, tables[0].url, kind, by_path)
    return found, [piece for table in tables for piece in table.pieces]


def edges(
    config: TablesConfig, files: Sequence[str], ids: IdType | None
) -> tuple[tuple[str, str], Columns, list[Piece]]:
    """Columns of sources and destinations with their types, and pieces of the edge list.

    `ids`: what node ids are. Raises `InputError` for what is missing or cannot be such ids.
    """
    kind = table_files.format_of(files[0])
    src, dst = config.src, config.dst
    if kind == "npy":
        tables = npy_files.scan_edges(list(files), src, dst)
    else:
        tables = table_files.scan(list(files), config, (src, dst), is_edges=True)
        fields = TablesConfig.model_fields
        if kind == "CSV" and "0" in tables[0].columns and (src, dst) == (fields["src"].default, fields["dst"].default):
            src, dst = "0", "1"  # without a header the first two are
    for table in tables:
        for name, key in ((src, "src"), (dst, "dst")):
            _need(table.columns, table.url, name, key)
    types = _one_schema(tables, config, (src, dst), kind == "CSV")
    for name, key in ((src, "src"), (dst, "dst")):
        found = node_ids.id_type(types[name], config.id_type)
        fits = kind == "CSV" or pa.types.is_null(types[name]) or (found is not None and _comparable(found, ids))
        if not fits:
            what = str(ids) if config.id else "row numbers (source.id)"
            raise InputError(
                f"{tables[0].url}: column '{name}' is {types[name]}, but node ids are {what} (source.{key}; "
                "source.id_type: text or integer compares both as one)"
            )
    return (src, dst), types, [piece for table in tables for piece in table.pieces]


def need_features(config: TablesConfig, features: list[Feature], left_out: list[tuple[str, str]]) -> None:
    """Raise `InputError` if there are none, with what became of the columns."""
    if not node_columns.widths(features):
        columns = "; ".join(f"{name}: {why}" for name, why in left_out[:_NAMES_IN_MESSAGES]) or "its lists are empty"
        raise InputError(
            f"{config.nodes}: nodes have no features, and a graph-free student needs some. Left out were: {columns}. "
            "source.features, one_hot and hashed say what to use"
        )


def left_out_of_edges(types: Columns, ends: tuple[str, str]) -> list[tuple[str, str]]:
    """Columns of the edge list that are not used, and why."""
    return [
        (name, "of the edge list; an edge is its two ends, weights are not used") for name in types if name not in ends
    ]


def widths(columns: NodeColumns, pieces: list[Piece]) -> dict[str, int]:
    """How many features are in each column of lists: as many as in the first row that has any."""
    found: dict[str, int] = {}
    for name in (name for name in columns.features if is_list(columns.types[name])):
        lists = (
            batch.column(0)
            for piece in pieces
            for batch in table_files.batches(piece, {name: columns.types[name]}, _ROWS)
        )
        found[name] = next(filter(None, map(node_columns.width, lists)), 0)
    return found


def read_as(feature: Feature, columns: NodeColumns) -> pa.DataType:
    """The type that a column of features is read in: text that is plain numbers as numbers."""
    return pa.float64() if feature.how == "number" and columns.text else columns.types[feature.name]


def _comparable(found: IdType, ids: IdType | None) -> bool:
    return ids is None or found.kind == ids.kind or {found.kind, ids.kind} == {"integer", "unsigned"}


def _used_by_name(config: TablesConfig) -> tuple[str, ...]:
    names = (config.id, config.label, config.split, *(config.features or ()), *config.one_hot, *config.hashed)
    return tuple(name for name in names if name)


def _one_schema(tables: list[TableFile], config: TablesConfig, used: Sequence[str], text: bool) -> Columns:
    """The type of each column that all files share. Raises `InputError` for one that is missing in some or at odds."""
    types, first = {name: plain(kind) for name, kind in tables[0].columns.items()}, tables[0]
    for table in tables[1:]:
        if table.columns == first.columns:
            continue
        for name in {**first.columns, **table.columns}:
            if name in config.ignore:
                types.setdefault(name, plain(table.columns.get(name, pa.null())))
                continue
            there = name in first.columns, name in table.columns
            if all(there):
                both = unified(types[name], table.columns[name])
                if both is not None:
                    types[name] = both
                elif name in used or is_number(types[name]) or is_number(plain(table.columns[name])):
                    raise InputError(
                        f"{table.url}: column '{name}' is {table.columns[name]}, but {first.columns[name]} in "
                        f"{first.url}. Write one type, or leave the column out (source.ignore)"
                    )
                continue
            kind = plain(first.columns[name] if there[0] else table.columns[name])
            # A column of Parquet that would not be used anyway may be missing here and there.
            if name in used or (config.features is None and (text or is_number(kind) or is_list(kind))):
                without, other = (table, first) if there[0] else (first, table)
                raise InputError(
                    f"{without.url}: no column '{name}', which {other.url} has. Give all files the same columns, or "
                    "leave it out (source.ignore)"
                )
            types.setdefault(name, kind)
    return types


def _roles(config: TablesConfig, types: Columns, file: str, kind: str, by_path: set[str]) -> NodeColumns:
    defaults = TablesConfig.model_fields
    text, node_id, split = kind == "CSV", config.id, config.split
    if kind == "npy" and node_id == defaults["id"].default and node_id not in types:
        node_id = None
    if split == defaults["split"].default and split not in types:
        split = None
    ids: IdType | None = ROW_NUMBERS
    if node_id:
        found = _need(types, file, node_id, "id", "; null: ids are row numbers")
        ids = None if text and config.id_type == "auto" else node_ids.id_type(found, config.id_type)
        if ids is None and not text:
            raise InputError(
                f"{file}: column '{node_id}': integers, text or binary expected, found {found} (source.id; "
                f"source.id_type is {config.id_type})"
            )
    _expect(types, file, config.label, "label", _is_label, "classes, as integers or names,")
    if split:
        _expect(types, file, split, "split", lambda t: is_number(t) or is_string(t), "train, val or test")
    masks = _masks(config, types, file) if config.split is not None and not split else ()
    taken = {node_id, config.label, split, *masks}
    left_out = [(name, "source.ignore") for name in config.ignore if name in types]
    for key in ("features", "one_hot", "hashed", "ignore"):
        for name in getattr(config, key) or ():
            _need(types, file, name, key)
    features, candidates = [], []
    categorical = [*config.one_hot, *config.hashed]
    for name in categorical:
        if not (is_string(types[name]) or pa.types.is_integer(types[name]) or pa.types.is_boolean(types[name])):
            raise InputError(f"{file}: column '{name}': text expected, found {types[name]} (source.one_hot, hashed)")
        types = types | {name: pa.large_string()}
    aside = taken | set(categorical) | set(config.ignore)
    if not config.features:
        left_out += [(name, "said by the path, not in the files") for name in sorted(by_path - aside)]
        aside |= by_path
    for name in config.features or [name for name in types if name not in aside]:
        found = types[name]
        of_numbers = is_number(found) or (is_list(found) and is_number(found.value_type))
        if of_numbers:
            features.append(name)
        elif is_string(found) and (text or config.features):
            candidates.append(name)
        elif config.features:
            raise InputError(
                f"{file}: column '{name}': numbers or lists of numbers expected, found {found} (source.features)"
            )
        else:
            left_out.append((name, f"{found}, which is no number"))
    if config.features:
        unnamed = (name for name in types if name not in aside | set(config.features))
        left_out += [(name, "not among source.features") for name in unnamed]
    else:
        no_features = (
            {} if node_id in _PANDAS_INDEX else dict.fromkeys(_PANDAS_INDEX, "the row index that pandas wrote")
        )
        no_features |= dict.fromkeys(MASK_COLUMNS, f"the split is that of column {split}") if split else {}
        left_out += [(name, no_features[name]) for name in (*features, *candidates) if name in no_features]
        features, candidates = ([each for each in some if each not in no_features] for some in (features, candidates))
    if not features and not candidates and not categorical:
        raise InputError(f"{file}: no columns of numbers for features (source.features); {_found(types)}")
    return NodeColumns(
        node_id, ids, config.label, split, masks, text, types, features, candidates, [*config.one_hot],
        [*config.hashed], left_out,
        config.features is not None,
    )  # fmt: skip


def _masks(config: TablesConfig, types: Columns, file: str) -> tuple[str, ...]:
    """The columns that are the split where no column says it: all three masks, or none."""
    masks = tuple(name for name in MASK_COLUMNS if name in types and name not in config.ignore)
    missing = [name for name in MASKS if name not in {MASK_COLUMNS[mask] for mask in masks}]
    if masks and missing:
        raise InputError(
            f"{file}: no column {' nor '.join(missing)} beside {' and '.join(masks)}; all three are the split, or none "
            "is (leave them out: source.ignore)"
        )
    return masks


def _is_label(kind: pa.DataType) -> bool:
    return is_number(kind) or is_string(kind) or pa.types.is_null(kind)


def _need(types: Columns, file: str, name: str, key: str, hint: str = "") -> pa.DataType:
    if name not in types:
        raise InputError(f"{file}: no column '{name}' (source.{key}{hint}); {_found(types)}{_headless(types)}")
    return types[name]


def _expect(types: Columns, file: str, name: str, key: str, fits, expected: str) -> None:  # type: ignore[no-untyped-def]
    found = plain(_need(types, file, name, key))
    if not fits(found) and not pa.types.is_null(found):
        raise InputError(f"{file}: column '{name}': {expected} expected, found {found} (source.{key})")


def _found(types: Columns) -> str:
    names = list(types)
    more = f" and {len(names) - _NAMES_IN_MESSAGES:,} more" if len(names) > _NAMES_IN_MESSAGES else ""
    return f"found {', '.join(names[:_NAMES_IN_MESSAGES]) or 'nothing'}{more}"


def _headless(types: Columns) -> str:
    """Advice for a file of text whose columns are named like values, or are all in one."""
    if "0" in types and "1" in types:
        return ". Without a header, columns are named by their place"
    if len(types) == 1 and all(is_string(kind) for kind in types.values()):
        return ". If another character stands between columns, set source.delimiter"
    if any(name != name.strip() for name in types):
        return ". Some names have spaces around them: take these out, or name the columns with them"
    values = sum(name.strip().lstrip("-").replace(".", "", 1).isdigit() for name in types)
    return ". If the file has no header, set source.header to false" if 2 * values > len(types) else ""
