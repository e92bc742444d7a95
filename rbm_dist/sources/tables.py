"""A source from tables: a node table and an edge list in files of Parquet, CSV or npy, read in bounded chunks.

The first to open it reads the ids, labels and split of all nodes once and leaves them, with an index of the ids, in a
folder that is named after the configuration and the files; all others map them. Features and edges are read in pieces.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from rbm_dist import storage
from rbm_dist.config.source import TablesConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.splits import NO_SPLIT, count_classes
from rbm_dist.sources import node_columns, node_ids, table_files, table_schema
from rbm_dist.sources.node_columns import Labels
from rbm_dist.sources.node_ids import NodeIds
from rbm_dist.sources.streamed import Edges, Nodes, StreamedSource, fingerprint
from rbm_dist.sources.table_files import Columns, Piece
from rbm_dist.sources.table_schema import NodeColumns

_EDGES = 1 << 18  # edges in a chunk
_VALUES = 1 << 21  # features in a chunk
_NODES = 1 << 18  # ids, labels and splits that are converted at once


def open_tables(config: TablesConfig, scratch: str) -> StreamedSource:
    """Open a node table and an edge list. `scratch`: a folder URL that all who open it share, for what is derived.

    Rows are nodes: files in the order of their names (numbers by value), rows in order. `Nodes.orig_id` are the ids,
    int64 or fixed-width UTF-8. Memory of the first to open it, per node: 80 bytes and, for string ids, twice the
    longest; of the others: what they touch of 12 bytes and an id, mapped. Raises `InputError`, here or when a piece is
    read: for files or columns that are not there or of a wrong type, ids that occur twice or are of no node, labels
    and splits out of range, features that are not finite.
    """
    node_files = table_files.find(config.nodes, "source.nodes")
    edge_files = table_files.find(config.edges, "source.edges")
    made_of = fingerprint(config, node_files + edge_files)
    folder = storage.join(scratch, f"tables-{made_of}")
    work = partial(_derive, config, [file[0] for file in node_files], [file[0] for file in edge_files], folder)
    facts = storage.once(storage.join(folder, "tables.json"), work)
    tables = _Tables(config, folder, facts)
    return StreamedSource(
        name=config.nodes,
        num_nodes=facts["offsets"][-1],
        num_features=sum(width for _, width, _ in facts["features"]),
        num_classes=facts["num_classes"],
        nodes=tables.nodes,
        num_edges=table_files.num_rows(Piece(**piece) for piece in facts["edge_pieces"]),
        num_edge_pieces=len(facts["edge_pieces"]),
        edges=tables.edges,
        feat_offsets=np.array(facts["offsets"], np.int64),
        feat=tables.feat,
        undirected=config.undirected,
        fingerprint=made_of,
    )


@dataclass(frozen=True)
class _Tables:
    config: TablesConfig
    folder: str
    facts: dict[str, Any]  # what `_derive` gives

    def nodes(self) -> Nodes:
        split = self._array("split") if "split" in self.facts["files"] else None
        return Nodes(self._array("label"), split, self._array("id"))

    def edges(self, piece: int) -> Iterator[Edges]:
        where = Piece(**self.facts["edge_pieces"][piece])
        kind = pa.string() if self.facts["text_ids"] else pa.int64()
        ids = None
        if self.facts["salt"] is not None:
            ids = NodeIds(self._array("id"), self._array("key"), self._array("row"), self.facts["salt"])
        for batch, start in _batches(where, {self.config.src: kind, self.config.dst: kind}, _EDGES):
            yield (
                self._rows(batch, self.config.src, ids, where, start),
                self._rows(batch, self.config.dst, ids, where, start),
            )

    def feat(self, piece: int) -> Iterator[np.ndarray]:
        where, features = Piece(**self.facts["pieces"][piece]), self.facts["features"]
        types = {name: pa.type_for_alias(kind) for name, _, kind in features}
        widths = {name: width for name, width, _ in features}
        for batch, start in _batches(where, types, max(1, _VALUES // sum(widths.values()))):
            yield node_columns.features(batch, widths, partial(where.at, start))

    def _array(self, name: str) -> np.ndarray:
        return storage.open_array(storage.join(self.folder, f"{name}.npy"), self.facts["files"][name])

    def _rows(self, batch: pa.RecordBatch, name: str, ids: NodeIds | None, piece: Piece, start: int) -> np.ndarray:
        id_M = node_ids.from_arrow(batch.column(name), name, partial(piece.at, start))
        num_nodes = self.facts["offsets"][-1]
        row_M, unknown_M = ids.rows(id_M) if ids else (id_M, (id_M < 0) | (id_M >= num_nodes))
        if unknown_M.any():
            first = int(unknown_M.argmax())
            raise InputError(
                f"{piece.at(start, first)}, column {name}: no node has the id {node_ids.shown(id_M[first])}, and "
                f"{int(unknown_M.sum()):,} of these {len(id_M):,} ids are of no node ({self.config.nodes})"
            )
        return row_M


def _derive(config: TablesConfig, node_urls: list[str], edge_urls: list[str], folder: str) -> dict[str, Any]:
    """Read what is asked of all nodes, write it below `folder`, and give what is to be known of the tables."""
    columns, found = table_schema.nodes(config, node_urls)
    edge_pieces = table_schema.edges(config, edge_urls, columns.text_ids)
    pieces: list[Piece] = []
    offsets, ids, labels, splits = [0], [], Labels(), []
    for piece in found:
        rows = 0
        for batch in table_files.batches(piece, columns.at_once, _NODES):
            at = partial(piece.at, rows)
            with table_files.reading(piece.file):  # a conversion can fail too
                labels.add(batch.column(columns.label), columns.label, at)
                if columns.split:
                    splits.append(node_columns.split(batch.column(columns.split), columns.split, at))
                if columns.id:
                    ids.append(node_ids.from_arrow(batch.column(columns.id), columns.id, at))
            rows += batch.num_rows
        pieces.append(replace(piece, rows=rows))
        offsets.append(offsets[-1] + rows)
    num_nodes = offsets[-1]
    if not num_nodes:
        raise InputError(f"{config.nodes}: the node table is empty")

    def node_at(row: int) -> str:
        piece = int(np.searchsorted(offsets, row, side="right")) - 1
        return pieces[piece].at(0, row - offsets[piece])

    arrays: dict[str, np.ndarray] = {}
    arrays["label"], classes = labels.finish()
    where = f"{config.nodes}: column {config.label}"
    if classes and config.num_classes and arrays["label"].max() >= config.num_classes:
        raise InputError(
            f"{where}: {len(classes):,} classes ({', '.join(classes[:5])} …), but source.num_classes is "
            f"{config.num_classes:,}"
        )
    num_classes = count_classes(
        arrays["label"], where, config.num_classes, lambda row: f"{node_at(row)}, column {config.label}"
    )
    if columns.split:
        arrays["split"] = np.concatenate(splits)
        bare = np.flatnonzero((arrays["split"] != NO_SPLIT) & (arrays["label"] < 0))
        if len(bare):
            raise InputError(
                f"{node_at(int(bare[0]))}, column {columns.split}: the node is in a split but has no label"
            )
    arrays["id"] = np.concatenate(ids) if columns.id else np.arange(num_nodes)
    ids.clear()
    salt = None
    if columns.text_ids or not np.array_equal(arrays["id"], np.arange(num_nodes)):
        index = node_ids.index(arrays["id"], node_at)
        arrays["key"], arrays["row"], salt = index.key, index.row, index.salt
    features = _features(columns, pieces)
    return {
        "num_classes": num_classes, "classes": classes, "text_ids": columns.text_ids, "salt": salt,
        "pieces": [asdict(piece) for piece in pieces], "offsets": offsets,
        "edge_pieces": [asdict(piece) for piece in edge_pieces],
        "features": features,
        "files": {
            name: storage.write_array(storage.join(folder, f"{name}.npy"), array) for name, array in arrays.items()
        },
    }  # fmt: skip


def _batches(piece: Piece, types: Columns, rows: int) -> Iterator[tuple[pa.RecordBatch, int]]:
    """The batches of a piece, and how many rows of it were before."""
    start = 0
    for batch in table_files.batches(piece, types, rows):
        yield batch, start
        start += batch.num_rows


def _features(columns: NodeColumns, pieces: list[Piece]) -> list[tuple[str, int, str]]:
    """Columns of features, how many are in each, and the type that text is converted to."""
    first = next(piece for piece in pieces if piece.rows)
    kinds = {name: "bool" if pa.types.is_boolean(columns.types[name]) else "double" for name in columns.features}
    types = {name: pa.type_for_alias(kind) for name, kind in kinds.items()}
    batch = next(batch for batch in table_files.batches(first, types, 1) if batch.num_rows)
    features = [(name, node_columns.width(batch.column(name)), kind) for name, kind in kinds.items()]
    if not any(width for _, width, _ in features):
        raise InputError(f"{first.file}: nodes have no features; a graph-free student needs some")
    return features
