"""Small tables as people have them: written as they come, opened, and read back by the caller's ids."""

from pathlib import Path
from typing import Any

from rbm_dist.config.source import TablesConfig
from rbm_dist.sources import node_ids
from rbm_dist.sources.streamed import StreamedSource
from rbm_dist.sources.tables import open_tables
from tests.sources.pieces import read_edges
from tests.sources.table_input import put, save

NODES = {"id": [7, 8, 9, 10], "label": [0, 1, 0, 1], "x": [0.5, 1.5, 2.5, 3.5]}
EDGES = {"src": [7, 8], "dst": [8, 10]}


def put_text(path: Path | str, text: str, encoding: str = "utf-8") -> None:
    put(str(path), text.encode(encoding))


def opened(folder: Path, nodes: str = "nodes.parquet", edges: str = "edges.parquet", **config: Any) -> StreamedSource:
    if not any(folder.glob("edges*")):
        save(f"{folder}/edges.parquet", EDGES)
    return open_tables(TablesConfig(nodes=f"{folder}/{nodes}", edges=f"{folder}/{edges}", **config), f"{folder}/s")


def pairs(source: StreamedSource) -> list[tuple[Any, Any]]:
    """Edges as pairs of the ids that the caller has."""
    ids = node_ids.to_arrow(source.nodes().orig_id, source.about.id_type).to_pylist()
    return [(ids[src], ids[dst]) for src, dst in read_edges(source).T.tolist()]


def left_out(source: StreamedSource) -> dict[str, str]:
    return dict(source.about.left_out)
