"""Splits and classes: the codes of a split, how one is drawn, and the checks of splits and labels for all sources."""

from collections.abc import Callable, Mapping

import numpy as np

from rbm_dist.errors import InputError
from rbm_dist.randomness.bits import generator
from rbm_dist.randomness.words import Word

TRAIN, VAL, TEST, UNSEEN, NO_SPLIT = 0, 1, 2, 3, -1
SPLIT_NAMES = {TRAIN: "train", VAL: "val", TEST: "test", UNSEEN: "unseen"}
MASKS = {"train_mask": TRAIN, "val_mask": VAL, "test_mask": TEST}
_UNSEEN_DRAW = 0x0_5EE


def split_per_class(label: np.ndarray, train: int, val: int, seed: int) -> np.ndarray:
    """A seeded split: `train` and `val` nodes of each class, the other labelled nodes for test.

    A class of fewer than `train + val + 1` nodes is divided in the same proportions, a third of it left for test.
    """
    split = np.full(len(label), NO_SPLIT, np.int8)
    rng = generator(seed, Word.SPLIT)
    for cls in np.unique(label[label >= 0]):
        nodes = rng.permutation(np.flatnonzero(label == cls))
        num_train, num_val = train, val
        if len(nodes) <= train + val:
            scale = len(nodes) * 2 / 3 / (train + val)
            num_train, num_val = max(1, round(train * scale)), round(val * scale)
        split[nodes] = TEST
        split[nodes[: num_train + num_val]] = VAL
        split[nodes[:num_train]] = TRAIN
    return split


def hidden_split(split: np.ndarray, share: float, seed: int) -> np.ndarray:
    """A split in which a seeded share of the test nodes is UNSEEN."""
    test = np.flatnonzero(split == TEST)
    hidden = generator(seed, _UNSEEN_DRAW).choice(test, round(share * len(test)), replace=False)
    split = split.copy()
    split[hidden] = UNSEEN
    return split


def check_split(name: str, label: np.ndarray, split: np.ndarray) -> None:
    """Raise `InputError` if there is nothing to train or to validate on."""
    for code in (TRAIN, VAL):
        if not np.any(split == code):
            raise InputError(
                f"{name}: the {SPLIT_NAMES[code]} split is empty ({len(label):,} nodes, "
                f"{int(np.sum(label >= 0)):,} of them labelled); at least one labelled node is needed"
            )


def split_of_masks(masks: Mapping[str, np.ndarray], label: np.ndarray, name: str) -> np.ndarray | None:
    """The split `[N]` int8 that the arrays of `MASKS`, `[N]` booleans, give; None without any of them.

    Raises `InputError` if some are missing or of another shape, or for a node that is in two or has no label.
    """
    missing = [each for each in MASKS if each not in masks]
    if len(missing) == len(MASKS):
        return None
    if missing:
        raise InputError(f"{name}: {', '.join(missing)} missing beside other masks; all three are needed, or none")
    split = np.full(len(label), NO_SPLIT, np.int8)
    for each, code in MASKS.items():
        mask = masks[each]
        if mask.dtype != bool or mask.shape != label.shape:
            raise InputError(
                f"{name}: {each}: {len(label)} booleans expected, found {mask.dtype} of shape {mask.shape}"
            )
        for wrong, trouble in ((mask & (split != NO_SPLIT), "is in two splits"), (mask & (label < 0), "has no label")):
            if np.any(wrong):
                raise InputError(f"{name}: {each}: node {np.argmax(wrong)} {trouble}")
        split[mask] = code
    return split


def whole_labels(given: np.ndarray, where: str) -> np.ndarray:
    """Labels of any number type as int64, -1 for NaN. Raises `InputError` for one that is not whole."""
    none = np.isnan(given)
    label = np.where(none, -1, given).astype(np.int64)
    wrong = (label != given) & ~none
    if np.any(wrong):
        node = int(np.argmax(wrong))
        raise InputError(f"{where}, node {node}: {given[node]:g} is not a class; classes are whole numbers from 0")
    return label


def count_classes(
    label: np.ndarray, where: str, num_classes: int | None = None, at: Callable[[int], str] | None = None
) -> int:
    """Check how classes are numbered, and give how many there are: `num_classes`, or else those that occur.

    label: `[N]` int64, -1 where there is none. `where` and `at`, of a node, begin the messages. Raises `InputError` for
    a label out of range, for none at all, and for a class that does not occur where `num_classes` is not given.
    """
    highest = label.max() if num_classes is None else num_classes - 1
    wrong = (label < -1) | (label > highest)
    if np.any(wrong):
        node = int(np.argmax(wrong))
        known = "" if num_classes is None else f" for num_classes: {num_classes:,}"
        raise InputError(
            f"{at(node) if at else f'{where}, node {node}'}: class {label[node]} is out of range{known}; classes are "
            "numbered from 0, and -1 means none"
        )
    present = np.unique(label[label >= 0])
    if not len(present):
        raise InputError(f"{where}: no node has a label, so nothing can be trained")
    if num_classes is not None:
        return num_classes
    if present[-1] != len(present) - 1:
        gap = int(np.flatnonzero(present != np.arange(len(present)))[0])
        raise InputError(
            f"{where}: class {present[-1]} occurs but class {gap} does not. "
            "Number the classes from 0 without gaps, or set source.num_classes"
        )
    return len(present)
