"""Reading node tables of awkward shapes, as a source does, against pyarrow's own reading of the same files.

    python -m benchmarks.tables [--quick] [--json FILE]

CPU time of one thread each: a very wide Parquet file, very many small files, row groups of a million rows, a long and a
very wide CSV file. The source looks at ids, labels and columns of all rows, then gives features in bounded chunks;
pyarrow reads each table into memory once. The ratio is pyarrow's time by ours; the floor of ours is pyarrow's for
Parquet (each byte is decoded once) and twice that for text, which is read twice: what a column holds depends on all of
its rows. Beyond it are checks of every value, the conversion to rows, and a file's opening for each of three passes.
Twice as many columns or files should take twice the time: there the ratio is twice the one by the other.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from benchmarks.report import Row, main
from rbm_dist.config.source import TablesConfig
from rbm_dist.sources.tables import open_tables

_BLOCK = 1 << 28


def write(path: Path, rows: int, columns: int, first_id: int = 0, **options: int) -> None:
    """A node table of float32 features."""
    rng = np.random.default_rng(first_id)
    found = {"id": np.arange(first_id, first_id + rows), "label": np.arange(rows) % 3}
    feat_FN = rng.normal(size=(columns, rows)).astype(np.float32)
    table = pa.table(found | {f"f{column}": feat_FN[column] for column in range(columns)})
    if path.suffix == ".csv":
        pacsv.write_csv(table, path)
    else:
        pq.write_table(table, path, **options)


def many(folder: Path, files: int) -> Path:
    folder.mkdir()
    for file in range(files):
        write(folder / f"part-{file}.parquet", 30, 8, 30 * file)
    return folder


def one(path: Path, rows: int, columns: int, **options: int) -> Path:
    write(path, rows, columns, **options)
    return path


def by_source(nodes: Path, folder: Path) -> float:
    """CPU seconds in which a source opens a table and gives all features."""
    pq.write_table(pa.table({"src": [0, 1], "dst": [1, 2]}), folder / "edges.parquet")
    with tempfile.TemporaryDirectory() as scratch:
        start = time.process_time()
        source = open_tables(TablesConfig(nodes=str(nodes), edges=f"{folder}/edges.parquet"), scratch)
        rows = sum(len(chunk) for piece in range(len(source.feat_offsets) - 1) for chunk in source.feat(piece))
        spent = time.process_time() - start
    assert rows == source.num_nodes
    return spent


def by_pyarrow(nodes: Path) -> float:
    """CPU seconds in which pyarrow reads the same files."""
    start = time.process_time()
    for file in sorted(nodes.glob("*")) if nodes.is_dir() else [nodes]:
        if file.suffix == ".csv":
            options = pacsv.ReadOptions(use_threads=False, block_size=_BLOCK)
            for _ in pacsv.open_csv(file, options):
                """Read."""
        else:
            pq.read_table(file, use_threads=False, partitioning=None)
    return time.process_time() - start


def measure(quick: bool) -> list[Row]:
    wide, files, rows, long_csv, wide_csv = (
        (5_000, 1_000, 1_000_000, 100_000, 5_000) if quick else (20_000, 10_000, 3_000_000, 1_000_000, 50_000)
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shapes: list[tuple[str, float, Callable[[], Path]]] = [
            (f"Parquet, {wide:,} columns", 0.25, lambda: one(folder / "wide.parquet", 2_000, wide)),
            (f"Parquet, {files:,} files of 30 rows", 0.25, lambda: many(folder / "many", files)),
            (
                f"Parquet, {rows:,} rows in groups of a million", 0.33,
                lambda: one(folder / "long.parquet", rows, 8, row_group_size=1_000_000),
            ),
            (f"CSV, {long_csv:,} rows of 8 features", 0.25, lambda: one(folder / "long.csv", long_csv, 8)),
            (f"CSV, {wide_csv:,} columns", 0.25, lambda: one(folder / "wide.csv", 400, wide_csv)),
        ]  # fmt: skip
        found = []
        for title, target, make in shapes:
            nodes = make()
            peer = min(by_pyarrow(nodes) for _ in range(2))
            ours = min(by_source(nodes, folder) for _ in range(2))
            found.append(Row(title, ours, "CPU s", peer / ours, target))
        half_wide, half_many = one(folder / "half.parquet", 2_000, wide // 2), many(folder / "fewer", files // 2)
        for title, whole, half in (("columns", found[0].value, half_wide), ("files", found[1].value, half_many)):
            spent = min(by_source(half, folder) for _ in range(2))
            found.append(Row(f"twice as many {title}", whole / spent, "times", 2 * spent / whole, 0.5))
    return found


if __name__ == "__main__":
    main("Node tables, against pyarrow", measure)
