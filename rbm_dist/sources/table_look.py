"""A look at tables without reading them: headers, footers and a first block of rows."""

import gzip
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from rbm_dist import storage
from rbm_dist.config.source import TablesConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.splits import NO_SPLIT
from rbm_dist.sources import node_columns, node_scan, pieces, table_files, table_notes, table_schema
from rbm_dist.sources.node_columns import Feature
from rbm_dist.sources.node_scan import NodeScan, Scanned
from rbm_dist.sources.pieces import Piece
from rbm_dist.sources.scaling import Moments, Scaling
from rbm_dist.sources.streamed import About
from rbm_dist.sources.summary import summarise
from rbm_dist.sources.table_files import Listing
from rbm_dist.sources.table_schema import NodeColumns

_BLOCK = 1 << 20  # bytes of text, or rows, that are read of a table
_LOOKED_AT = 1 << 10  # rows whose features are looked at


@dataclass(frozen=True)
class Look:
    """What a look shows. Labels, splits, ids and what is made of columns of text are those of the first rows."""

    columns: NodeColumns
    scanned: Scanned
    features: list[Feature]
    left_out: list[tuple[str, str]]
    pieces: list[Piece]
    edge_pieces: list[Piece]
    edge_columns: tuple[str, str]
    node_files: Listing
    edge_files: Listing
    num_nodes: int
    num_edges: int
    estimated: bool  # whether these are estimated from the files' sizes


def look_at(config: TablesConfig) -> Look:
    """Look at the configured tables. Raises `InputError` as reading them would, as far as it can be seen."""
    node_files = table_files.listing(config.nodes, "source.nodes")
    edge_files = table_files.listing(config.edges, "source.edges")
    columns, found = table_schema.nodes(config, [file for file, _, _ in node_files.files])
    first = next((piece for piece in found if piece.rows), None)
    scan = NodeScan(config, columns)
    batch = None
    if first is not None:
        batch = next((each for each in table_files.batches(first, columns.scanned, _BLOCK) if each.num_rows), None)
    if first is None or batch is None:
        raise InputError(f"{config.nodes}: the node table is empty")
    with table_files.reading(first.file):
        scan.add(batch, partial(first.at, 0))
    scanned = scan.finish()
    ends, edge_types, edge_pieces = table_schema.edges(
        config, [file for file, _, _ in edge_files.files], scanned.id_type
    )
    features, left_out = scan.features(table_schema.widths(columns, found))
    left_out += table_schema.left_out_of_edges(edge_types, ends)
    num_nodes, num_edges = _rows(found, node_files), _rows(edge_pieces, edge_files)
    table_schema.need_features(config, features, left_out)
    estimated = pieces.num_rows([*found, *edge_pieces]) is None
    return Look(
        columns, scanned, features, left_out, found, edge_pieces, ends, node_files, edge_files, num_nodes, num_edges,
        estimated,
    )  # fmt: skip


def summary_of_look(config: TablesConfig) -> dict[str, Any]:
    """The summary of the configured tables as far as a look tells; `sources/summary.py` has its form."""
    look = look_at(config)
    first = next(piece for piece in look.pieces if piece.rows)
    types = {each.name: table_schema.read_as(each, look.columns) for each in look.features}
    batch = next(each for each in table_files.batches(first, types, _LOOKED_AT) if each.num_rows)
    feat_nF = node_columns.features(batch, look.features, node_scan.words(config), partial(first.at, 0), missing=True)
    moments = Moments.of([feat_nF], feat_nF.shape[1])
    if first.groups is not None:
        ranges = table_files.ranges(
            [file for file, _, _ in look.node_files.files], [each.name for each in look.features]
        )
        for column, name in enumerate(name for each in look.features for name in each.names):
            if name in ranges:
                moments.low[column], moments.high[column], moments.missing[column] = ranges[name]
    about = About(
        look.scanned.classes.names,
        look.scanned.id_type,
        [(name, each.type) for each in look.features for name in each.names],
        table_notes.notes(
            look.columns, look.scanned, look.edge_columns, look.node_files, look.edge_files, look.edge_pieces
        ),
        look.left_out + table_notes.passed_over(look.node_files) + table_notes.passed_over(look.edge_files),
        table_notes.warnings(look.scanned),
    )
    split_n = look.scanned.split if look.scanned.split is not None else np.full(len(look.scanned.label), NO_SPLIT)
    num_classes = int(look.scanned.label.max(initial=0)) + 1
    scaling = Scaling.of(config, moments, sparse=False)
    edges = {"read": look.num_edges}
    found = summarise(config, about, num_classes, look.scanned.label, split_n, edges, moments, scaling)
    found["nodes"]["rows"] = look.num_nodes
    rows = len(look.scanned.label)
    if rows < look.num_nodes:
        for part in ("label", "split") if look.scanned.split is not None else ("label",):
            found[part]["from"] += f", of the first {rows:,} rows"
    return found


def _rows(found: list[Piece], files: Listing) -> int:
    """Rows of a table; of text, what the files' sizes say, by the lines of a first block."""
    known = pieces.num_rows(found)
    if known is not None:
        return known
    file = files.files[0][0]
    fs, path = storage.filesystem(file)
    with table_files.reading(file), fs.open(path, "rb", compression="infer") as stream:
        block = stream.read(_BLOCK)
    lines = block.count(b"\n")
    size = len(gzip.compress(block)) if pieces.without_compression(file) != file else len(block)
    dialect = found[0].dialect if found else None
    header = len(files.files) * (dialect is not None and dialect.header)  # a line in each file
    return max(0, round(sum(size for _, size, _ in files.files) * lines / max(size, 1)) - header)
