"""Predictions of a student for the nodes of a graph, with the caller's own node ids."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.graph.shards import ORIG_NAME, ROW_NUMBERS, IdType
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.student import Student
from rbm_dist.serve.frozen import freeze
from rbm_dist.serve.kernels import softmax
from rbm_dist.sources import node_ids

ID_ARRAYS = ("orig_id", ORIG_NAME)
"""The arrays of a graph that predictions need besides a student's inputs."""
_ROWS = 65_536
_ALWAYS = ["node_id", "class", "probability"]  # columns of predictions


@dataclass(frozen=True)
class Predictions:
    """Some nodes' predictions."""

    orig_id: np.ndarray  # [n] int64 or bytes, the caller's node ids as the graph keeps them
    cls: np.ndarray  # [n] int64
    probability: np.ndarray  # [n, C] float32


def predict(student: Student, store: GraphStore) -> Iterator[Predictions]:
    """Predictions for all nodes, in chunks, part by part."""
    network = freeze(student, few=1)
    for part in range(store.num_parts):
        ids, orig_id = store.ids(part), store.array(ORIG_NAME if store.named else "orig_id", part)
        for start in range(0, len(ids), _ROWS):
            rows = slice(start, start + _ROWS)
            probability = network.logits(store.inputs(ids[rows], student.inputs))
            softmax(probability)
            yield Predictions(np.array(orig_id[rows]), probability.argmax(1), probability)


def write_parquet(
    url: str, chunks: Iterator[Predictions], num_classes: int, id_type: IdType = ROW_NUMBERS,
    class_names: list[str] | None = None,
) -> int:  # fmt: skip
    """Write columns `node_id`, `class` and `probability` (a list of C); gives the number of rows.

    Ids are of the type that they had in the input. class_names: then there is a column `class_name`, too.
    Raises `InputError` for a file that is there and holds no predictions.
    """
    if not url.endswith((".parquet", ".pq")):
        raise InputError(f"{url}: predictions are written as Parquet; name a file that ends in .parquet (--out)")
    probability = pa.list_(pa.float32(), num_classes)
    fields = [("node_id", node_ids.arrow_type(id_type.arrow)), ("class", pa.int32())]
    named = [("class_name", pa.string())] if class_names else []
    schema = pa.schema([*fields, *named, ("probability", probability)])
    if storage.is_file(url) and [name for name in _columns(url) if name != "class_name"] != _ALWAYS:
        raise InputError(f"{url}: is there and holds no predictions; name another file (--out)")
    rows = 0
    with (
        storage.atomic_writer(url) as stream,
        pq.ParquetWriter(pa.PythonFile(_Sink(stream), mode="w"), schema) as writer,
    ):
        for chunk in chunks:
            flat = pa.array(chunk.probability.reshape(-1), pa.float32())
            cls = pa.array(chunk.cls, pa.int32())
            columns = [node_ids.to_arrow(chunk.orig_id, id_type), cls]
            if class_names:
                columns.append(pa.array(class_names, pa.string()).take(cls))
            columns.append(pa.FixedSizeListArray.from_arrays(flat, num_classes))
            writer.write_table(pa.table(columns, schema=schema))
            rows += len(chunk.orig_id)
    return rows


def _columns(url: str) -> list[str]:
    fs, path = storage.filesystem(url)
    try:
        with fs.open(path, "rb") as stream:
            return pq.read_schema(stream).names
    except (pa.ArrowException, OSError):
        return []


class _Sink:
    """What pyarrow asks of a Python file, on top of a writer that only writes."""

    closed = False

    def __init__(self, stream: storage.HashingWriter):
        self._stream = stream
        self._position = 0

    def write(self, data: bytes) -> int:
        self._position += self._stream.write(data)
        return len(data)

    def tell(self) -> int:
        return self._position

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        """Nothing is held back here."""

    def close(self) -> None:
        """The stream below is closed by its own block."""
