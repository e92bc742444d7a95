"""A teacher from elsewhere: its predictions, found for the nodes of a graph that is cut and renumbered, and checked."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import log_softmax, softmax

from rbm_dist.config.teacher import ExternalTeacherConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.propagate import batches
from rbm_dist.graph.shards import ORIG_NAME
from rbm_dist.graph.splits import NO_SPLIT, TEST, TRAIN, UNSEEN, VAL
from rbm_dist.graph.store import GraphStore
from rbm_dist.sources import node_ids
from rbm_dist.sources.teacher_rows import read_ids, read_rows
from rbm_dist.train.temperature import best_temperature

TAUGHT = "taught"
"""The array that says who is taught, where some nodes may not be: 1 or 0, `[N]` float32."""
_KEY = "teacher.external"
_SUM = 0.01  # by which the probabilities of a row may miss one: of float16, and of many classes
_AGREEMENT = 0.1  # Cohen's kappa with the labels, below which rows are taken to be in another order


def leaves_out(settings: ExternalTeacherConfig | None) -> bool:
    """Whether a teacher may have nothing to say of some nodes."""
    return settings is not None and settings.missing == "labels"


class ExternalTeacher:
    """The predictions of some files for the nodes of a graph. Raises `InputError` for what does not fit it.

    temperatures: of each file's logits, as `fit_temperatures` gives them; None: predictions are taken as they are.
    """

    def __init__(
        self, settings: ExternalTeacherConfig, store: GraphStore, temperatures: Sequence[float] | None = None
    ):  # fmt: skip
        self._settings, self._store, self._temperatures = settings, store, temperatures
        read = [read_rows(path, settings, store.num_classes) for path in settings.paths]
        self._files = list(zip(settings.paths, [rows for rows, _ in read], strict=True))
        shared = read_ids(settings.ids) if settings.ids is not None else None
        self._row_N = None if settings.rows != "splits" else _rows_by_split(store)
        self._indexes = []
        if settings.rows == "ids":
            for (path, rows), (_, own) in zip(self._files, read, strict=True):
                ids, where = (own, path) if own is not None else (shared, str(settings.ids))
                if ids is None:
                    raise InputError(f"{path}: has no ids of its own; name a file of them ({_KEY}.ids)")
                if len(ids) != len(rows):
                    raise InputError(f"{where}: {len(ids):,} ids for {len(rows):,} rows of {path}")
                self._indexes.append(_indexed(ids, store, where))
        self._check_lengths()

    def taught(self, ids: np.ndarray) -> np.ndarray:
        """Which nodes are taught, `[n]` bool: those with a row and, if so configured, labelled training nodes."""
        has_row = self._has_row(ids)
        if self._settings.missing == "labels":
            return has_row | (self._store.gather("split", ids) == TRAIN)
        return has_row

    def probabilities(self, ids: np.ndarray) -> np.ndarray:
        """What the files that have a node say together, or a training node's label; zeros for who is not taught.

        `[n, C]` float32: the mean, or of the file that is surest of the node's class, the first of equals. Raises
        `InputError` for numbers that are none, or not what `kind` says.
        """
        total_nC, count_n = np.zeros((len(ids), self._store.num_classes)), np.zeros(len(ids), np.int64)
        for file in range(len(self._files)):
            row_n = self._rows(file, ids)
            at = np.flatnonzero(row_n >= 0)
            order = np.argsort(row_n[at])  # in the order of the file, which may be mapped from a disk
            at = at[order]
            found_nC = self._read(file, row_n[at])
            if self._temperatures is not None:
                found_nC = softmax(self._logits(file, found_nC, self._temperatures[file]), axis=1)
            if self._settings.combine == "best":
                surer = found_nC.max(axis=1) > total_nC[at].max(axis=1)
                total_nC[at[surer]], count_n[at] = found_nC[surer], 1
            else:
                total_nC[at] += found_nC
                count_n[at] += 1
        without = np.flatnonzero(count_n == 0)
        if len(without):
            train = without[self._store.gather("split", ids[without]) == TRAIN]
            total_nC[train, self._store.gather("label", ids[train])] = 1
        return (total_nC / np.maximum(count_n, 1)[:, None]).astype(np.float32)

    def check(self) -> dict[str, Any]:
        """How many nodes have rows, and how often each file names a labelled node's class, of training and validation.

        Raises `InputError` if nodes lack rows that need them, or a file agrees with the labels as chance would.
        """
        store, classes = self._store, self._store.num_classes
        confusion_FCC = np.zeros((len(self._files), classes, classes), np.int64)
        covered, first_without = 0, None
        for ids in _batches(store):
            has_row = self._has_row(ids)
            covered += int(has_row.sum())
            if first_without is None and not has_row.all():
                first_without = ids[np.argmin(has_row)]
            labelled = ids[np.isin(store.gather("split", ids), (TRAIN, VAL))]
            for file in range(len(self._files)):
                row_n = self._rows(file, labelled)
                label, row_n = store.gather("label", labelled[row_n >= 0]), row_n[row_n >= 0]
                np.add.at(confusion_FCC[file], (label, self._read(file, row_n).argmax(1)), 1)
        if covered < store.num_nodes and self._settings.missing == "refuse":
            raise InputError(
                f"{self._settings.paths[0]}: {store.num_nodes - covered:,} of {store.num_nodes:,} nodes have no row, "
                f"such as {self._name(first_without)}. Complete the file, or let those nodes learn from their labels, "
                f"if they have any ({_KEY}.missing: labels)"
            )
        accuracies = []
        for (path, _), confusion_CC in zip(self._files, confusion_FCC, strict=True):
            accuracies.append(_accuracy(path, confusion_CC))
        return {"nodes": store.num_nodes, "with_rows": covered, "accuracy": accuracies}

    def fit_temperatures(self) -> list[float]:
        """Of each file what its logits are divided by, so that validation labels are likeliest.

        In passes over the validation nodes. Raises `InputError` for a file that has none of them.
        """
        store = self._store
        val = np.concatenate([ids[store.gather("split", ids) == VAL] for ids in _batches(store)])
        return [self._fit_temperature(file, val) for file in range(len(self._files))]

    def _fit_temperature(self, file: int, val: np.ndarray) -> float:
        row_n = np.concatenate([self._rows(file, ids) for ids in batches(val, _floats(self._store))] or [val])
        if not (row_n >= 0).any():
            raise InputError(
                f"{self._files[file][0]}: no validation node has a row, so that nothing says how sure it may be "
                f"({_KEY}.combine: best, teacher.calibrate)"
            )
        order = np.argsort(row_n)[(row_n < 0).sum() :]  # as it is read

        def loss(temperature: float) -> float:
            total = 0.0
            for at in batches(order, _floats(self._store)):
                log_nC = log_softmax(self._logits(file, self._read(file, row_n[at]), temperature), axis=1)
                total -= np.take_along_axis(log_nC, self._store.gather("label", val[at])[:, None], axis=1).sum()
            return total / len(order)

        return best_temperature(loss)

    def _logits(self, file: int, probability_nC: np.ndarray, temperature: float) -> np.ndarray:
        """In place: their logarithms by the temperature, of a zero as of the least number that the file could have."""
        dtype = self._files[file][1].dtype if self._settings.kind == "probabilities" else np.float64
        np.maximum(probability_nC, float(np.finfo(dtype).smallest_subnormal), out=probability_nC)
        np.log(probability_nC, out=probability_nC)
        probability_nC /= temperature
        return probability_nC

    def _read(self, file: int, row_n: np.ndarray) -> np.ndarray:
        """The probabilities in some rows of a file, `[n, C]` float64."""
        path, rows = self._files[file]
        return self._as_probabilities(path, row_n, np.asarray(rows[row_n], np.float64))

    def _has_row(self, ids: np.ndarray) -> np.ndarray:
        """Which nodes are in any file, bool `[n]`."""
        return np.any([self._rows(file, ids) >= 0 for file in range(len(self._files))], axis=0)

    def _rows(self, file: int, ids: np.ndarray) -> np.ndarray:
        """The row of each node in a file, -1 where it has none, `[n]` int64."""
        if self._row_N is not None:
            return self._row_N[ids]
        store = self._store
        if not self._indexes:
            return store.gather("orig_id", ids).astype(np.int64)
        row_n, absent_n = self._indexes[file].rows(store.gather(ORIG_NAME if store.named else "orig_id", ids))
        return np.where(absent_n, -1, row_n.astype(np.int64))

    def _check_lengths(self) -> None:
        """That files have as many rows as there are nodes to have them."""
        for path, rows in self._files:
            if self._settings.rows == "splits":
                assert self._row_N is not None
                wanted = int((self._row_N >= 0).sum())
                if len(rows) != wanted:
                    raise InputError(
                        f"{path}: {len(rows):,} rows; training, validation and test nodes are {wanted:,} ({_KEY}.rows)"
                    )
            elif self._settings.rows == "nodes":
                lowest, highest = _range_of_ids(self._store)
                last = highest + 1 if lowest >= 0 else len(rows) + 1
                # Where a source left nodes out, their rows are there all the same.
                if last > len(rows) or (last < len(rows) and last == self._store.num_nodes):
                    raise InputError(
                        f"{path}: {len(rows):,} rows; nodes are numbered from {lowest:,} to {highest:,}, and with "
                        f"rows: nodes a row is a node's number, from 0. Say so if it is another order ({_KEY}.rows)"
                    )

    def _as_probabilities(self, path: str, row_n: np.ndarray, value_nC: np.ndarray) -> np.ndarray:
        kind = self._settings.kind
        wrong = ~np.isfinite(value_nC).all(axis=1)
        if kind == "log_probabilities":  # of a class that is impossible
            wrong = np.isnan(value_nC).any(axis=1) | (value_nC == np.inf).any(axis=1)
        if wrong.any():
            raise InputError(f"{path}: row {row_n[np.argmax(wrong)]:,} has numbers that are not finite")
        if kind == "logits":
            return softmax(value_nC, axis=1)
        found_nC = value_nC if kind == "probabilities" else np.exp(value_nC)
        sum_n = found_nC.sum(axis=1)
        wrong = (np.abs(sum_n - 1) > _SUM) | (found_nC < -_SUM).any(axis=1)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise InputError(
                f"{path}: row {row_n[at]:,} is not of {kind.replace('_', '-')}: they sum to {sum_n[at]:.4g}. Is the "
                f"file of {'logits' if kind == 'probabilities' else 'probabilities or logits'}? ({_KEY}.kind)"
            )
        return found_nC.clip(min=0) / sum_n[:, None]

    def _name(self, node: Any) -> str:
        store = self._store
        return node_ids.shown(store.gather(ORIG_NAME if store.named else "orig_id", np.array([node]))[0], store.id_type)


def _accuracy(path: str, confusion_CC: np.ndarray) -> float:
    """The share that is right. Raises `InputError` if it is hardly more than if rows were shuffled."""
    nodes = confusion_CC.sum()
    if not nodes:
        raise InputError(f"{path}: no training or validation node has a row, so that nothing says whose the rows are")
    right = np.trace(confusion_CC) / nodes
    shuffled = float(confusion_CC.sum(0) @ confusion_CC.sum(1)) / nodes**2
    deviation = np.sqrt(shuffled * (1 - shuffled) / nodes)
    if right - shuffled < max(_AGREEMENT * (1 - shuffled), 3 * deviation):
        raise InputError(
            f"{path}: {right:.1%} of {nodes:,} training and validation nodes right, and shuffled rows would have "
            f"{shuffled:.1%}: the rows seem to be in another order ({_KEY}.rows), or the classes in another"
        )
    return float(right)


def _batches(store: GraphStore) -> Iterator[np.ndarray]:
    """All nodes, some at a time."""
    return (ids for part in range(store.num_parts) for ids in batches(store.ids(part), _floats(store)))


def _floats(store: GraphStore) -> int:
    """Numbers of a row, which is computed in float64, in float32s."""
    return 2 * store.num_classes


def _range_of_ids(store: GraphStore) -> tuple[int, int]:
    """The lowest and the highest number of a node in the caller's order, or id."""
    ends = [store.array("orig_id", part) for part in range(store.num_parts)]
    return min(int(each.min()) for each in ends if len(each)), max(int(each.max()) for each in ends if len(each))


def _rows_by_split(store: GraphStore) -> np.ndarray:
    """The row of each node where the nodes of the splits come one after the other, -1 for others, `[N]` int64."""
    parts = range(store.num_parts)
    split_N, orig_N = (np.concatenate([store.array(name, part) for part in parts]) for name in ("split", "orig_id"))
    split_N = np.where(split_N == UNSEEN, TEST, split_N)
    order_N = np.lexsort((orig_N, split_N))
    in_split = order_N[split_N[order_N] != NO_SPLIT]
    row_N = np.full(store.num_nodes, -1)
    row_N[in_split] = np.arange(len(in_split))
    return row_N


def _indexed(ids: pa.Array, store: GraphStore, where: str) -> node_ids.NodeIds:
    def at(row: int) -> str:
        return f"{where}: row {row:,}"

    found, wrong = node_ids.from_arrow(ids, store.id_type, "ids", at)
    if wrong is not None and wrong.any():
        raise InputError(f"{at(int(np.argmax(wrong)))}: is no id of this graph, whose ids are {store.id_type}")
    return node_ids.index(found, store.id_type, at)
