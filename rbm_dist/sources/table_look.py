"""A look at tables without reading them: headers, footers and a first block of rows."""

import gzip
from dataclasses import dataclass
from functools import partial

from rbm_dist import storage
from rbm_dist.config.source import TablesConfig
from rbm_dist.errors import InputError
from rbm_dist.sources import node_columns, pieces, table_files, table_schema
from rbm_dist.sources.node_columns import Feature
from rbm_dist.sources.node_scan import NodeScan, Scanned
from rbm_dist.sources.pieces import Piece
from rbm_dist.sources.table_files import Listing
from rbm_dist.sources.table_schema import NodeColumns

_BLOCK = 1 << 20  # bytes of text, or rows, that are read of a table


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
    if not node_columns.widths(features):
        raise InputError(f"{config.nodes}: nodes have no features; a graph-free student needs some")
    estimated = pieces.num_rows([*found, *edge_pieces]) is None
    return Look(
        columns, scanned, features, left_out, found, edge_pieces, ends, node_files, edge_files, num_nodes, num_edges,
        estimated,
    )  # fmt: skip


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
