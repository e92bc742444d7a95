"""How often a student, a teacher or anything else that names classes is right, in bounded memory."""

from collections.abc import Callable, Iterator

import numpy as np

from rbm_dist.graph.splits import SPLIT_NAMES, TEST, UNSEEN, VAL
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.student import Student
from rbm_dist.serve.frozen import freeze

Accuracy = dict[str, float | None]
EVALUATED = (VAL, TEST, UNSEEN)
_ROWS = 65_536


def student_accuracy(student: Student, store: GraphStore, splits: tuple[int, ...] = EVALUATED) -> Accuracy:
    """`accuracy` of a student's own predictions."""
    network = freeze(student, few=1)  # the same figures on every machine
    return accuracy(store, lambda ids: network.logits(store.inputs(ids, student.inputs)).argmax(1), splits)


def accuracy(
    store: GraphStore, classes: Callable[[np.ndarray], np.ndarray], splits: tuple[int, ...] = EVALUATED
) -> Accuracy:
    """Share of right classes on the nodes of some splits, by name; None for a split without nodes.

    classes: the predicted classes `[n]` of nodes `[n]`; asked for nodes of these splits only.
    """
    right, rows = dict.fromkeys(splits, 0), dict.fromkeys(splits, 0)
    for part in range(store.num_parts):
        split_n = store.array("split", part)
        for ids in chunks(store.ids(part)[np.isin(split_n, splits)]):
            hit, split = classes(ids) == store.gather("label", ids), store.gather("split", ids)
            for code in right:
                right[code] += int(np.sum(hit & (split == code)))
                rows[code] += int(np.sum(split == code))
    return {SPLIT_NAMES[code]: right[code] / rows[code] if rows[code] else None for code in right}


def chunks(ids: np.ndarray) -> Iterator[np.ndarray]:
    return (ids[start : start + _ROWS] for start in range(0, len(ids), _ROWS))
