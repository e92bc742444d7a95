"""Files of predictions, Parquet or CSV: their columns, and writing them chunk by chunk, whole or not at all."""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from rbm_dist import storage
from rbm_dist.errors import InputError

Format = Literal["parquet", "csv"]
_ENDINGS: dict[str, Format] = {".parquet": "parquet", ".pq": "parquet", ".csv": "csv"}
_GROUP_BYTES = 1 << 23  # of predictions that are written at once: a row group of Parquet
_ALWAYS = ["node_id", "class"]  # columns of predictions


@dataclass(frozen=True)
class Predictions:
    """Some nodes' predictions."""

    node_id: pa.Array  # [n], the caller's node ids in the caller's type
    probability_nC: np.ndarray  # float32


@dataclass(frozen=True)
class Layout:
    """The columns of a file.

    `node_id`, `class` (int32), `class_name` where classes have names, and `probability`, a list of C; with `top_k` in
    its place `top_classes`, `top_class_names` and `top_probabilities`, lists of the `top_k` most probable, best first.
    CSV has a column for each value of a list, `probability[0]`, `probability[1]`, …
    """

    num_classes: int
    class_names: tuple[str, ...] | None = None
    top_k: int | None = None

    def table(self, found: Predictions) -> pa.Table:
        """The columns of some predictions."""
        probability_nC = found.probability_nC
        class_n = probability_nC.argmax(1)
        columns = {"node_id": found.node_id, "class": pa.array(class_n, pa.int32())}
        if self.class_names is not None:
            columns["class_name"] = self._names(class_n)
        if self.top_k is None:
            columns["probability"] = _lists(pa.array(probability_nC.reshape(-1), pa.float32()), self.num_classes)
            return pa.table(columns)
        top_k = min(self.top_k, self.num_classes)
        best_nk = np.argsort(-probability_nC, axis=1, kind="stable")[:, :top_k]
        best = np.take_along_axis(probability_nC, best_nk, axis=1)
        columns["top_classes"] = _lists(pa.array(best_nk.reshape(-1), pa.int32()), top_k)
        if self.class_names is not None:
            columns["top_class_names"] = _lists(self._names(best_nk.reshape(-1)), top_k)
        columns["top_probabilities"] = _lists(pa.array(best.reshape(-1), pa.float32()), top_k)
        return pa.table(columns)

    def _names(self, class_n: np.ndarray) -> pa.Array:
        return pa.array(self.class_names, pa.string()).take(pa.array(class_n))


def format_of(url: str) -> Format | None:
    """The format that a file's name tells; None: it is not the name of a file of predictions."""
    return next((found for ending, found in _ENDINGS.items() if url.endswith(ending)), None)


def write(
    url: str, format_: Format, chunks: Iterable[Predictions], layout: Layout, id_type: pa.DataType
) -> int:  # fmt: skip
    """Write a file of predictions; gives the number of its rows. Raises `InputError` if it cannot be written.

    id_type: of `node_id`.
    """
    none = Predictions(pa.array([], id_type), np.empty((0, layout.num_classes), np.float32))
    schema = _as_text(layout.table(none)).schema if format_ == "csv" else layout.table(none).schema
    rows, held = 0, list[pa.Table]()
    with storage.atomic_writer(url) as stream:
        sink = pa.PythonFile(_Sink(stream), mode="w")
        with pq.ParquetWriter(sink, schema) if format_ == "parquet" else pa.csv.CSVWriter(sink, schema) as writer:
            for chunk in chunks:
                table = layout.table(chunk)
                held.append(_as_text(table) if format_ == "csv" else table)
                rows += len(chunk.node_id)
                if sum(each.nbytes for each in held) >= _GROUP_BYTES:
                    writer.write_table(pa.concat_tables(held))
                    held.clear()
            if held:
                writer.write_table(pa.concat_tables(held))
    return rows


def refuse_other_file(url: str) -> None:
    """Raise `InputError` for a file that is there and holds no predictions."""
    if storage.is_file(url) and _columns(url)[:2] != _ALWAYS:
        raise InputError(f"{url}: is there and holds no predictions; name another file (--out)")


def _columns(url: str) -> list[str]:
    fs, path = storage.filesystem(url)
    try:
        with fs.open(path, "rb") as stream:
            if format_of(url) == "csv":
                return io.TextIOWrapper(stream).readline().replace('"', "").strip().split(",")
            return pq.read_schema(stream).names
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        return []


def _lists(values: pa.Array, size: int) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(values, size)


def _as_text(table: pa.Table) -> pa.Table:
    """What CSV can hold of a table: a column for each value of a list, and ids of bytes in hexadecimal digits."""
    columns: dict[str, Any] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_fixed_size_list(column.type):
            size = column.type.list_size
            values = column.combine_chunks().flatten()
            columns |= {f"{name}[{k}]": values.take(pa.array(np.arange(k, len(values), size))) for k in range(size)}
        elif column.type == pa.uuid():
            columns[name] = pa.array([str(each) for each in column.to_pylist()], pa.string())
        elif any(
            test(column.type) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
        ):
            columns[name] = pa.array([each.hex() for each in column.to_pylist()], pa.string())
        else:
            columns[name] = column
    return pa.table(columns)


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
