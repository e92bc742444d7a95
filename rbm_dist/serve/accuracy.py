"""How often a student, a teacher or anything else that names classes is right, in bounded memory."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from rbm_dist.graph.splits import SPLIT_NAMES, TEST, UNSEEN, VAL
from rbm_dist.graph.store import SOFT, GraphStore
from rbm_dist.models.student import Student
from rbm_dist.moe.sparse_rows import to_rows
from rbm_dist.serve.frozen import freeze

Accuracy = dict[str, float | None]
Classes = Callable[[np.ndarray], np.ndarray]
"""The predicted classes `[n]` of nodes `[n]`."""
EVALUATED = (VAL, TEST, UNSEEN)
CPU = torch.device("cpu")
_ROWS = 65_536


@dataclass(frozen=True)
class Hits:
    """How many nodes of some splits are classified right, by split and true class."""

    splits: tuple[int, ...]
    rows_SC: np.ndarray
    right_SC: np.ndarray

    def __add__(self, other: "Hits") -> "Hits":
        """Those on other nodes counted too."""
        return Hits(self.splits, self.rows_SC + other.rows_SC, self.right_SC + other.right_SC)

    def accuracy(self) -> Accuracy:
        """Share of right classes by the split's name; None for a split without nodes."""
        rows_S, right_S = self.rows_SC.sum(1).tolist(), self.right_SC.sum(1).tolist()
        counts = zip(self.splits, right_S, rows_S, strict=True)
        return {SPLIT_NAMES[code]: right / rows if rows else None for code, right, rows in counts}

    def by_class(self, split: int) -> list[float | None]:
        """Share of right classes on the split's nodes of each class; None for a class without any there."""
        at = self.splits.index(split)
        counts = zip(self.right_SC[at].tolist(), self.rows_SC[at].tolist(), strict=True)
        return [right / rows if rows else None for right, rows in counts]


def student_accuracy(student: Student, store: GraphStore, splits: tuple[int, ...] = EVALUATED) -> Accuracy:
    """Accuracy of a student's own predictions."""
    return student_hits(student, store, splits).accuracy()


def student_hits(student: Student, store: GraphStore, splits: tuple[int, ...] = EVALUATED) -> Hits:
    """`hits` of a student's own predictions."""
    return hits(store, student_classes(student, store), splits)


def student_classes(student: Student, store: GraphStore, device: torch.device = CPU) -> Classes:
    """What a student says, by the engine that serves it; on a GPU by the student itself, which is moved there."""
    if device.type == "cpu":
        network = freeze(student, few=1)  # the same figures on every machine
        return lambda ids: network.logits(store.inputs(ids, student.inputs)).argmax(1)
    on_device = student.eval().to(device)

    @torch.inference_mode()
    def classes(ids: np.ndarray) -> np.ndarray:
        logits_nC, _ = on_device(to_rows(store.inputs(ids, student.inputs), device, torch.float32))
        return logits_nC.argmax(1).cpu().numpy()

    return classes


def teacher_classes(store: GraphStore, name: str = SOFT) -> Classes:
    """What the soft labels say, or another array of distributions; -1 where they say nothing."""

    def classes(ids: np.ndarray) -> np.ndarray:
        soft_nC = store.gather(name, ids)
        return np.where(soft_nC.max(1) > 0, soft_nC.argmax(1), -1)

    return classes


def hits(
    store: GraphStore, classes: Classes, splits: tuple[int, ...] = EVALUATED, parts: Iterable[int] | None = None
) -> Hits:
    """Count the right classes on the nodes of some splits, in some parts (default: all); all of those have a label.

    classes: asked for nodes of these splits only.
    """
    rows_SC, right_SC = np.zeros((2, len(splits), store.num_classes), np.int64)
    for part in range(store.num_parts) if parts is None else parts:
        split_n = store.array("split", part)
        for ids in chunks(store.ids(part)[np.isin(split_n, splits)]):
            label, split = store.gather("label", ids), store.gather("split", ids)
            hit = classes(ids) == label
            for at, code in enumerate(splits):
                rows_SC[at] += np.bincount(label[split == code], minlength=store.num_classes)
                right_SC[at] += np.bincount(label[hit & (split == code)], minlength=store.num_classes)
    return Hits(splits, rows_SC, right_SC)


def chunks(ids: np.ndarray) -> Iterator[np.ndarray]:
    return (ids[start : start + _ROWS] for start in range(0, len(ids), _ROWS))
