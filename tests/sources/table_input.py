"""Small tables in every format, to be read, changed and spoilt."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from rbm_dist import storage
from rbm_dist.config.source import TablesConfig
from rbm_dist.sources.streamed import StreamedSource
from rbm_dist.sources.tables import open_tables
from tests.sources.pieces import read_features

Table = dict[str, list[Any]]


def put(url: str, content: bytes) -> None:
    fs, path = storage.filesystem(url)
    fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
    fs.pipe_file(path, content)


def save(url: str, table: Table, row_group_size: int = 3) -> None:
    """Write a table as the format that the URL's suffix tells."""
    sink = pa.BufferOutputStream()
    arrow = pa.table(table)
    if ".csv" in url:
        pa.csv.write_csv(arrow, sink)
    else:
        pq.write_table(arrow, sink, row_group_size=row_group_size)
    content = sink.getvalue().to_pybytes()
    put(url, gzip.compress(content) if url.endswith(".gz") else content)


def save_npy(url: str, array: np.ndarray) -> None:
    storage.write_array(url, array)


def rows(table: Table, start: int, stop: int) -> Table:
    return {name: column[start:stop] for name, column in table.items()}


def nodes() -> Table:
    return {
        "id": [30, 10, 20, 40], "label": [0, 1, None, 1], "split": ["train", "val", None, "test"],
        "x": [0.5, 1.5, 2.5, 3.5], "y": [1, 2, 3, 4], "note": ["a", "b", "c", "d"],
    }  # fmt: skip


def edges() -> Table:
    return {"src": [30, 10, 20], "dst": [10, 20, 20]}


def opened(folder: Path | str, node_table: Table, edge_table: Table, suffix: str = "parquet", **config: Any):  # type: ignore[no-untyped-def]
    save(f"{folder}/nodes.{suffix}", node_table)
    save(f"{folder}/edges.{suffix}", edge_table)
    return open_tables(
        TablesConfig(nodes=f"{folder}/nodes.{suffix}", edges=f"{folder}/edges.{suffix}", **config), f"{folder}/scratch"
    )


def read_all(source: StreamedSource) -> tuple[list[tuple[Any, Any]], np.ndarray]:
    """Edges as pairs of the caller's ids, sorted, and features `[N, F]`."""
    ids = source.nodes().orig_id
    pairs = []
    for piece in range(source.num_edge_pieces):
        for src, dst in source.edges(piece):
            pairs += list(zip(ids[src].tolist(), ids[dst].tolist(), strict=True))
    return sorted(pairs), read_features(source)
