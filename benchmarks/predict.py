"""Predictions for a table of new nodes, against reading the same table and writing the same predictions alone.

    python -m benchmarks.predict [--quick] [--json FILE]

5 million rows of 128 float columns in one Parquet file, in row groups of about a million rows as pyarrow writes them,
and an RbM of 8 experts, 128 wide, for 10 classes. Alone, pyarrow reads the file batch by batch into rows and writes a
file of as many made-up predictions, on one thread each, one after the other; ours also computes, and does the two at
once. Memory is what the process holds of its own at its peak (RssAnon), over that before.
"""

import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from benchmarks.report import Row, main
from benchmarks.shards import Peak
from rbm_dist.serve.export import export
from rbm_dist.serve.format import Column, Features, ModelFile, NetworkFacts, NodeId
from rbm_dist.serve.prediction_files import Layout, Predictions, write
from rbm_dist.serve.tables import ReadOptions
from rbm_dist.stages.predict import predict_tables

FEATURES, HIDDEN, EXPERTS, CLASSES = 128, 128, 8, 10
MEMORY_MB = 500
_CHUNK = 1 << 20
_BATCH = 1 << 14


def write_table(path: Path, rows: int) -> None:
    """Ids and float32 features, a row group at a time."""
    schema = pa.schema([("id", pa.int64()), *((f"f{column}", pa.float32()) for column in range(FEATURES))])
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, _CHUNK):
            count = min(_CHUNK, rows - start)
            columns = [rng.standard_normal(count, np.float32) for _ in range(FEATURES)]
            writer.write_table(pa.table([np.arange(start, start + count), *columns], schema=schema))


def write_student(folder: Path) -> None:
    """An exported RbM with random weights."""
    rng = np.random.default_rng(1)

    def drawn(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / shape[-2] ** 0.5).astype(np.float32)

    network = NetworkFacts(
        kind="rbm", inputs=("feat",), num_features=FEATURES, hidden=HIDDEN, num_classes=CLASSES, num_layers=2,
        norm="layer", num_experts=EXPERTS, top_k=1, routing="input", routing_temperature=1.0, input_attention=False,
        ensemble_size=1,
    )  # fmt: skip
    none = np.zeros(FEATURES)
    tensors = {
        "layers.0.experts.weight_LDO": drawn(EXPERTS, FEATURES, HIDDEN),
        "layers.1.experts.weight_LDO": drawn(EXPERTS, HIDDEN, CLASSES),
        "layers.0.experts.bias_LO": drawn(EXPERTS, HIDDEN), "layers.1.experts.bias_LO": drawn(EXPERTS, CLASSES),
        "layers.0.memory_ED": drawn(EXPERTS, FEATURES),
        "layers.0.log_scale": np.zeros((), np.float32), "layers.1.log_scale": np.zeros((), np.float32),
        "norms.0.weight": np.ones(HIDDEN, np.float32), "norms.0.bias": np.zeros(HIDDEN, np.float32),
        "scaling.columns": np.stack([none, none, none + 1]), "scaling.indicators": np.empty(0, np.int64),
    }  # fmt: skip
    columns = tuple(Column(name=f"f{column}", how="number", type="float", width=1) for column in range(FEATURES))
    model = ModelFile(
        name="rbm", rbm_dist="benchmark", network=network, class_names=None, inputs={"feat": FEATURES},
        features=Features(columns=columns, named=True, missing=False, rows=""),
        id=NodeId(column="id", kind="integer", arrow="int64"), made_from={"run": "random", "graph": {
            "num_nodes": 1, "num_edges": 0, "num_features": FEATURES, "num_classes": CLASSES
        }},
    )  # fmt: skip
    export(str(folder), model, tensors)


def alone(table: Path, out: Path) -> float:
    """Seconds to read the table as rows and to write as many predictions."""
    start = time.perf_counter()
    rows = 0
    for batch in pq.ParquetFile(table).iter_batches(_BATCH, use_threads=False):
        feat_NF = batch.select(range(1, FEATURES + 1)).to_tensor(row_major=True).to_numpy()
        rows += len(feat_NF)
    probability_NC = np.random.default_rng(0).random((_BATCH, CLASSES), np.float32)
    chunks = (
        Predictions(pa.array(np.arange(first, min(first + _BATCH, rows))), probability_NC[: min(_BATCH, rows - first)])
        for first in range(0, rows, _BATCH)
    )
    write(str(out), "parquet", chunks, Layout(CLASSES), pa.int64())
    return time.perf_counter() - start


def measure(quick: bool) -> list[Row]:
    rows = 200_000 if quick else 5_000_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_table(folder / "nodes.parquet", rows)
        write_table(folder / "few.parquet", 1000)
        write_student(folder / "student")

        def ours(nodes: str) -> float:
            start = time.perf_counter()
            options = ReadOptions()
            predict_tables(
                f"{folder}/student",
                "rbm",
                f"{folder}/{nodes}.parquet",
                f"{folder}/out.parquet",
                options,
                None,
                Console(quiet=True),
            )
            return time.perf_counter() - start

        ours("few")  # compiles
        alone(folder / "few.parquet", folder / "floor.parquet")
        with Peak() as peak:
            spent = ours("nodes")
        floor = alone(folder / "nodes.parquet", folder / "floor.parquet")
    held = peak.bytes / 1e6
    return [
        Row(f"{rows:,} rows × {FEATURES}, from file to file", rows / spent, "rows/s", floor / spent, 0.5),
        Row("memory held", held, "MB", MEMORY_MB / held, 1.0),
    ]


if __name__ == "__main__":
    main("Predictions for new nodes, against reading and writing alone", measure)
