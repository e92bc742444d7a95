"""A source from tables: a node table and an edge list in files of Parquet, text or npy, read in bounded chunks.

The first to open it reads the ids, labels and split of all nodes once and leaves them, with an index of the ids, in a
folder that is named after the configuration and the files; all others map them. Features and edges are read in pieces.
"""

import base64
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from rbm_dist import storage
from rbm_dist.config.source import TablesConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.shards import IdType
from rbm_dist.graph.splits import NO_SPLIT, count_classes
from rbm_dist.sources import node_columns, node_ids, pieces, table_files, table_notes, table_schema
from rbm_dist.sources.node_columns import Feature
from rbm_dist.sources.node_ids import NodeIds
from rbm_dist.sources.node_scan import NodeScan, Scanned, words
from rbm_dist.sources.pieces import Columns, Piece
from rbm_dist.sources.streamed import About, Edges, Nodes, StreamedSource, fingerprint
from rbm_dist.sources.table_files import Listing

_EDGES = 1 << 18  # edges in a chunk
_VALUES = 1 << 21  # features in a chunk
_WIDE_ROWS = 512  # but so many rows: with few of very many columns, the work per column outweighs that per value
_READ_AGAIN = {"id", "id_type", "na_values", "thousands", "decimal"}
"""The keys by which a table of new nodes is read as this one."""
_NODES = 1 << 18  # ids, labels and splits that are converted at once


def open_tables(config: TablesConfig, scratch: str) -> StreamedSource:
    """Open a node table and an edge list. `scratch`: a folder URL that all who open it share, for what is derived.

    Rows are nodes: files in the order of their names (numbers by value), rows in order. `Nodes.orig_id` are the ids,
    int64 or fixed-width bytes (`node_ids`). Memory of the first to open it, per node: 80 bytes and, for ids of text,
    twice the longest; of the others: what they touch of 12 bytes and an id, mapped. Raises `InputError`, here or when a
    piece is read: for files or columns that are not there or of a wrong type, ids that occur twice or are of no node,
    labels and splits out of range, features that are not finite.
    """
    node_files = table_files.listing(config.nodes, "source.nodes")
    edge_files = table_files.listing(config.edges, "source.edges")
    made_of = fingerprint(config, node_files.files + edge_files.files)
    folder = storage.join(scratch, f"tables-{made_of}")
    work = partial(_derive, config, node_files, edge_files, folder)
    facts = storage.once(storage.join(folder, "tables.json"), work)
    tables = _Tables(config, folder, facts)
    return StreamedSource(
        name=config.nodes,
        num_nodes=facts["num_nodes"],
        num_features=node_columns.widths(tables.features),
        num_classes=facts["num_classes"],
        nodes=tables.nodes,
        num_edges=pieces.num_rows(Piece.of(piece) for piece in facts["edge_pieces"]),
        num_edge_pieces=len(facts["edge_groups"]),
        edges=tables.edges,
        feat_offsets=np.array(facts["feat_offsets"], np.int64),
        feat=tables.feat,
        undirected=config.undirected,
        about=tables.about(),
        fingerprint=made_of,
    )


@dataclass(frozen=True)
class _Tables:
    config: TablesConfig
    folder: str
    facts: dict[str, Any]  # what `_derive` gives

    @property
    def features(self) -> list[Feature]:
        return [Feature(**{**each, "values": tuple(each["values"])}) for each in self.facts["features"]]

    @property
    def id_type(self) -> IdType:
        return IdType(**self.facts["id_type"])

    def about(self) -> About:
        names = [(name, each.type) for each in self.features for name in each.names]
        table = self.config.model_dump(mode="json", include=_READ_AGAIN) | {"columns": self.facts["features"]}
        return About(**self.facts["about"] | {"id_type": self.id_type, "features": names, "table": table})

    def nodes(self) -> Nodes:
        split = self._array("split") if "split" in self.facts["files"] else None
        return Nodes(self._array("label"), split, self._array("id"))

    def edges(self, piece: int) -> Iterator[Edges]:
        ids = _Ends(self.config, self.id_type, self.facts["num_nodes"], self._index())
        types = _unpacked(self.facts["edge_types"])
        for where in map(Piece.of, self.facts["edge_pieces"][slice(*self.facts["edge_groups"][piece])]):
            for batch, start in _edge_batches(where, types, self.id_type):
                src_M, dst_M = (ids.rows(column, name, where, start) for name, column in _ends_of(batch))
                yield src_M, dst_M

    def feat(self, piece: int) -> Iterator[np.ndarray]:
        features = self.features
        width = node_columns.widths(features)
        if piece == len(self.facts["groups"]):  # of nodes that edges alone name
            yield np.full((self.facts["num_added"], width), np.nan, np.float32)
            return
        types, text = _unpacked(self.facts["feature_types"]), words(self.config)
        missing = self.config.missing != "refuse"
        for where in map(Piece.of, self.facts["pieces"][slice(*self.facts["groups"][piece])]):
            for batch, start in table_files.placed_batches(where, types, max(_WIDE_ROWS, _VALUES // width)):
                yield node_columns.features(batch, features, text, partial(where.at, start), missing)

    def _array(self, name: str) -> np.ndarray:
        return storage.open_array(storage.join(self.folder, f"{name}.npy"), self.facts["files"][name])

    def _index(self) -> NodeIds | None:
        salt = self.facts["salt"]
        return None if salt is None else NodeIds(self._array("id"), self._array("key"), self._array("row"), salt)


@dataclass(frozen=True)
class _Ends:
    """Finds the rows of nodes that edges name."""

    config: TablesConfig
    id_type: IdType
    num_nodes: int
    index: NodeIds | None  # None: ids are row numbers

    def rows(self, column: pa.Array, name: str, piece: Piece, start: int) -> np.ndarray:
        """The row of each id, -1 where it is of no node, if such edges are to be dropped; else raises `InputError`."""
        id_M, wrong_M = node_ids.from_arrow(column, self.id_type, name, partial(piece.at, start))
        if self.index is None:
            row_M, unknown_M = id_M, (id_M < 0) | (id_M >= self.num_nodes)
        else:
            row_M, unknown_M = self.index.rows(id_M)
        if wrong_M is not None:
            unknown_M = unknown_M | wrong_M
        if not unknown_M.any():
            return row_M
        if self.config.unknown_nodes == "drop":
            return np.where(unknown_M, -1, row_M)
        first = int(unknown_M.argmax())
        value = column[first].as_py()
        what = value.hex() if isinstance(value, bytes) else repr(value) if isinstance(value, str) else value
        raise InputError(
            f"{piece.at(start, first)}, column {name}: no node has the id {what}, and "
            f"{int(unknown_M.sum()):,} of these {len(row_M):,} ids are of no node ({self.config.nodes}). "
            "source.unknown_nodes: drop leaves such edges out, add makes nodes of them"
        )

    def unknown(self, column: pa.Array, name: str, piece: Piece, start: int) -> np.ndarray:
        """The ids that are of no node, each once."""
        id_M, wrong_M = node_ids.from_arrow(column, self.id_type, name, partial(piece.at, start))
        if wrong_M is not None:
            row = int(wrong_M.argmax())
            raise InputError(
                f"{piece.at(start, row)}, column {name}: no node can have the id {column[row].as_py()!r}, as ids are "
                "integers (source.unknown_nodes: add; source.id_type)"
            )
        if self.index is None:
            return np.unique(id_M[(id_M < 0) | (id_M >= self.num_nodes)])
        return np.unique(id_M[self.index.rows(id_M)[1]])


def _derive(config: TablesConfig, node_files: Listing, edge_files: Listing, folder: str) -> dict[str, Any]:
    """Read what is asked of all nodes, write it below `folder`, and give what is to be known of the tables."""
    columns, found = table_schema.nodes(config, [file[0] for file in node_files.files])
    scan, parts, offsets = NodeScan(config, columns), [], [0]
    for piece in found:
        rows = 0
        for batch in table_files.batches(piece, columns.scanned, _NODES):
            with table_files.reading(piece.file):  # a conversion can fail too
                scan.add(batch, partial(piece.at, rows))
            rows += batch.num_rows
        parts.append(replace(piece, rows=rows))
        offsets.append(offsets[-1] + rows)
    num_rows = offsets[-1]
    if not num_rows:
        raise InputError(f"{config.nodes}: the node table is empty")

    def node_at(row: int) -> str:
        piece = int(np.searchsorted(offsets, row, side="right")) - 1
        return parts[piece].at(0, row - offsets[piece])

    scanned = scan.finish()
    arrays: dict[str, np.ndarray] = {"label": scanned.label}
    num_classes = _num_classes(config, scanned, node_at)
    if scanned.split is not None:
        arrays["split"] = scanned.split
        bare = np.flatnonzero((scanned.split != NO_SPLIT) & (scanned.label < 0))
        if len(bare):
            raise InputError(
                f"{node_at(int(bare[0]))}, column {columns.split or ' or '.join(columns.masks)}: the node is in a "
                f"split but has no label, as are {len(bare):,} in all. Take these out of the split, or name another "
                "column (source.split, source.label; source.unlabelled: the words that stand for no label)"
            )
    arrays["id"] = np.arange(num_rows) if scanned.id is None else scanned.id
    (src, dst), edge_types, edge_pieces = table_schema.edges(
        config, [file[0] for file in edge_files.files], scanned.id_type
    )
    end_types = {name: edge_types[name] for name in (src, dst)}
    index = _indexed(arrays["id"], scanned.id_type, node_at)
    added = np.empty(0, arrays["id"].dtype)
    if config.unknown_nodes == "add":
        ends = _Ends(config, scanned.id_type, num_rows, index)
        added = _unknown_ids(ends, edge_pieces, end_types)
    if len(added):
        arrays["id"] = np.concatenate([arrays["id"], added])
        arrays["label"] = np.concatenate([arrays["label"], np.full(len(added), -1)])
        if "split" in arrays:
            arrays["split"] = np.concatenate([arrays["split"], np.full(len(added), NO_SPLIT, np.int8)])
        index = _indexed(arrays["id"], scanned.id_type, node_at)
    if index is not None:
        arrays["key"], arrays["row"] = index.key, index.row
    groups = pieces.grouped(parts)
    features, left_out = scan.features(table_schema.widths(columns, parts))
    left_out += table_schema.left_out_of_edges(edge_types, (src, dst))
    names = scanned.classes.names
    about = {
        # Of classes that do not occur, though source.num_classes says that there are such, the number is the name.
        "class_names": None if names is None else [*names, *map(str, range(len(names), num_classes))],
        "notes": table_notes.notes(columns, scanned, (src, dst), node_files, edge_files, edge_pieces, len(added)),
        "left_out": left_out + table_notes.passed_over(node_files) + table_notes.passed_over(edge_files),
        "warnings": table_notes.warnings(scanned),
    }
    table_schema.need_features(config, features, left_out)
    return {
        "num_nodes": num_rows + len(added), "num_added": len(added), "num_classes": num_classes,
        "id_type": asdict(scanned.id_type), "about": about,
        "salt": None if index is None else index.salt,
        "pieces": [asdict(piece) for piece in parts],
        "groups": groups, "edge_groups": pieces.grouped(edge_pieces),
        "feat_offsets": [0, *(offsets[stop] for _, stop in groups), *[num_rows + len(added)] * bool(len(added))],
        "edge_pieces": [asdict(piece) for piece in edge_pieces], "edge_types": _packed(end_types),
        "features": [asdict(each) for each in features],
        "feature_types": _packed({each.name: table_schema.read_as(each, columns) for each in features}),
        "files": {
            name: storage.write_array(storage.join(folder, f"{name}.npy"), array) for name, array in arrays.items()
        },
    }  # fmt: skip


def _num_classes(config: TablesConfig, scanned: Scanned, node_at: Callable[[int], str]) -> int:
    names, where = scanned.classes.names, f"{config.nodes}: column {config.label}"
    if names and config.num_classes and len(names) > config.num_classes:
        raise InputError(
            f"{where}: {len(names):,} classes ({', '.join(names[:5])} …), but source.num_classes is "
            f"{config.num_classes:,}"
        )
    return count_classes(scanned.label, where, config.num_classes, lambda row: f"{node_at(row)}, column {config.label}")


def _indexed(id_N: np.ndarray, of: IdType, node_at: Callable[[int], str]) -> NodeIds | None:
    """An index of ids, unless they are row numbers."""
    if not of.is_named and np.array_equal(id_N, np.arange(len(id_N))):
        return None
    return node_ids.index(id_N, of, node_at)


def _unknown_ids(ends: _Ends, edge_pieces: list[Piece], types: Columns) -> np.ndarray:
    """The ids that edges name and the node table does not, in ascending order."""
    found: list[np.ndarray] = []
    held, most = 0, _NODES
    for piece in edge_pieces:
        for batch, start in _edge_batches(piece, types, ends.id_type):
            found += [ends.unknown(column, name, piece, start) for name, column in _ends_of(batch)]
            held += sum(map(len, found[-2:]))
            if held > most:  # so that what is held stays within twice what there is
                found = [np.unique(np.concatenate(found))]
                held, most = len(found[0]), max(_NODES, 2 * len(found[0]))
    return np.unique(np.concatenate(found)) if found else np.empty(0, np.int64)


def _edge_batches(piece: Piece, types: Columns, ids: IdType) -> Iterator[tuple[pa.RecordBatch, int]]:
    """The batches of an edge list, and how many rows of it were before. Text is read as integers as far as it is."""
    done = 0
    if piece.dialect is not None and not ids.is_named:
        with suppress(InputError):  # what is wrong is found again, and said better
            for batch, start in table_files.placed_batches(piece, dict.fromkeys(types, pa.int64()), _EDGES):
                yield batch, start
                done = start + batch.num_rows
            return
    for batch, start in table_files.placed_batches(piece, types, _EDGES):
        if start + batch.num_rows > done:
            yield batch.slice(max(done - start, 0)), max(done, start)


def _ends_of(batch: pa.RecordBatch) -> Iterator[tuple[str, pa.Array]]:
    return zip(batch.schema.names, batch.columns, strict=True)


def _packed(types: Columns) -> str:
    """Types of columns as text, for JSON."""
    return base64.b64encode(pa.schema(types.items()).serialize()).decode()


def _unpacked(packed: str) -> Columns:
    schema = pa.ipc.read_schema(pa.BufferReader(base64.b64decode(packed)))
    return dict(zip(schema.names, schema.types, strict=True))
