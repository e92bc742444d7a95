"""Rows with labels that an exported student is measured on: the validation nodes of its run, or a table of the user's.

They are kept as the student learns them, that is scaled: what is measured is its network alone.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from rbm_dist.errors import InputError
from rbm_dist.graph.splits import SPLIT_NAMES, VAL
from rbm_dist.graph.store import GraphStore
from rbm_dist.serve.features import FeatureReader
from rbm_dist.serve.format import ModelFile
from rbm_dist.serve.loaded import NativeEngine
from rbm_dist.serve.network import Network, Networks, Rows

_ROWS = 65_536


class Labelled(NamedTuple):
    """Some rows `[n, D]`, dense or sparse, as the student learns them, and their classes `[n]` int64."""

    rows_BD: Rows
    label_B: np.ndarray

    def accuracy(self, network: Network | Networks) -> float:
        """The share of rows whose class a network names."""
        starts = range(0, len(self.label_B), _ROWS)
        found = [network.logits(self.rows_BD[start : start + _ROWS]).argmax(1) for start in starts]
        return float(np.mean(np.concatenate(found) == self.label_B))


def from_graph(store: GraphStore, model: ModelFile, split: int = VAL) -> Labelled:
    """The nodes of a split of a run's graph. Raises `InputError` if it is not the graph that the student is of."""
    inputs = model.network.inputs
    names = None if store.class_names is None else tuple(store.class_names)
    if store.width(inputs) != model.network.num_features or (store.num_classes, names) != (
        model.num_classes, model.class_names,
    ):  # fmt: skip
        raise InputError(f"{store.url}: another graph than the student's: features or classes differ (--run)")
    parts = range(store.num_parts)
    ids = np.concatenate([store.ids(part)[np.asarray(store.array("split", part)) == split] for part in parts])
    if not len(ids):
        raise InputError(f"{store.url}: has no {SPLIT_NAMES[split]} nodes; give a table of labelled rows (--nodes)")
    return Labelled(store.inputs(ids, inputs), store.gather("label", ids).astype(np.int64))


def from_table(url: str, column: str, model: ModelFile, tensors: Mapping[str, np.ndarray]) -> Labelled:
    """The labelled rows of a Parquet or text table. `column`: of classes, by name, or numbers where they have none.

    Raises `InputError` for a table that the student cannot read, without labels, or with unknown classes.
    """
    from rbm_dist.serve.tables import ReadOptions, open_tables, said_as_options
    from rbm_dist.sources import table_files

    if set(model.inputs) != {"feat"}:
        raise InputError(f"--nodes: student {model.name} learned from encodings, too, which no table has; give --run")
    reader, engine = FeatureReader(model.features), NativeEngine(model, tensors)
    codes = {name: code for code, name in enumerate(model.class_names or map(str, range(model.num_classes)))}
    rows, labels = [], []
    for table in open_tables(url, model, reader.column_types, ReadOptions(row_numbers=True)):
        if column not in table.file.columns:
            raise InputError(f"{table.file.url}: no column '{column}' of classes; name it (--label)")
        types = {**table.types, column: table.file.columns[column]}
        for piece in table.file.pieces:
            with said_as_options():
                for batch, start in table_files.placed_batches(piece, types, _ROWS):
                    names = batch.column(column).to_pylist()
                    label = np.array([_code(each, codes, table.file.url) for each in names], np.int64)
                    rows_BF = reader.from_batch(batch, partial(piece.at, start))
                    rows.append(engine.scaled({"feat": rows_BF.astype(np.float32)[label >= 0]}))
                    labels.append(label[label >= 0])
    if not sum(map(len, labels)):
        raise InputError(f"{url}: no row has a class in column '{column}' (--label)")
    return Labelled(np.concatenate(rows), np.concatenate(labels))


def _code(label: object, codes: Mapping[str, int], where: str) -> int:
    """The number of a class, −1 for none."""
    if label is None or label == "":
        return -1
    if isinstance(label, float):
        label = int(label) if label.is_integer() else label
    code = codes.get(label.decode() if isinstance(label, bytes) else str(label))
    if code is None:
        known = ", ".join(list(codes)[:10]) + (f" and {len(codes) - 10:,} more" if len(codes) > 10 else "")
        raise InputError(f"{where}: class '{label}' is unknown to the student, whose classes are {known} (--label)")
    return code
