"""Splits: how one is drawn, what masks give, and how classes must be numbered."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbm_dist.errors import InputError
from rbm_dist.graph.splits import (
    MASKS,
    NO_SPLIT,
    TEST,
    TRAIN,
    UNSEEN,
    VAL,
    check_split,
    count_classes,
    hidden_split,
    split_of_masks,
    split_per_class,
    whole_labels,
)


@given(
    label=st.lists(st.integers(-1, 4), min_size=1, max_size=120),
    train=st.integers(1, 12),
    val=st.integers(1, 12),
    seed=st.integers(0, 2**31),
)
def test_split_per_class(label: list[int], train: int, val: int, seed: int) -> None:
    label_N = np.array(label)
    split = split_per_class(label_N, train, val, seed)
    assert np.array_equal(split == -1, label_N == -1)
    for cls in set(label) - {-1}:
        count, (in_train, in_val, in_test) = label.count(cls), np.bincount(split[label_N == cls], minlength=3)
        if count > train + val:
            assert (in_train, in_val) == (train, val)
        else:
            assert in_train >= 1
            assert abs(in_test - count / 3) < 2
            assert abs(in_train - in_val * train / val) <= 1 + train / val
    np.testing.assert_array_equal(split_per_class(label_N, train, val, seed), split)


def test_another_seed_splits_otherwise() -> None:
    label = np.zeros(200, int)
    assert not np.array_equal(split_per_class(label, 20, 30, seed=0), split_per_class(label, 20, 30, seed=1))


def test_a_share_of_the_test_nodes_is_hidden() -> None:
    split = np.array([TRAIN, VAL, NO_SPLIT, *[TEST] * 10], np.int8)
    hidden = hidden_split(split, 0.3, seed=0)
    assert np.sum(hidden == UNSEEN) == 3
    np.testing.assert_array_equal(np.where(hidden == UNSEEN, TEST, hidden), split)
    assert any(not np.array_equal(hidden_split(split, 0.3, seed), hidden) for seed in range(1, 5))


@pytest.mark.parametrize(("split", "name"), [([VAL, TEST], "train"), ([TRAIN, NO_SPLIT], "val")])
def test_an_empty_split_is_refused(split: list[int], name: str) -> None:
    with pytest.raises(InputError, match=f"^here: the {name} split is empty"):
        check_split("here", np.zeros(2, int), np.array(split))


def test_masks_give_a_split() -> None:
    split = np.array([TRAIN, TEST, NO_SPLIT, VAL, TRAIN], np.int8)
    masks = {name: split == code for name, code in MASKS.items()}
    found = split_of_masks(masks, np.zeros(5, int), "here")
    assert found is not None
    np.testing.assert_array_equal(found, split)
    assert found.dtype == np.int8
    assert split_of_masks({}, np.zeros(5, int), "here") is None


@pytest.mark.parametrize(
    ("masks", "reason"),
    [
        ({"train_mask": [1, 0, 0], "test_mask": [0, 0, 0]}, "val_mask missing beside other masks"),
        ({"train_mask": [1, 0, 0], "val_mask": [0, 1], "test_mask": [0, 0, 0]}, r"val_mask: 3 booleans .*\(2,\)"),
        ({"train_mask": [1, 1, 0], "val_mask": [0, 1, 0], "test_mask": [0, 0, 0]}, "val_mask: node 1 is in two"),
        ({"train_mask": [1, 0, 0], "val_mask": [0, 1, 0], "test_mask": [0, 0, 1]}, "test_mask: node 2 has no label"),
    ],
)
def test_masks_that_are_refused(masks: dict[str, list[int]], reason: str) -> None:
    arrays = {name: np.array(mask, bool) for name, mask in masks.items()}
    with pytest.raises(InputError, match=f"^here: {reason}"):
        split_of_masks(arrays, np.array([0, 1, -1]), "here")


def test_labels_are_whole() -> None:
    label = whole_labels(np.array([2.0, np.nan, -1, 0]), "here")
    assert (label.dtype, label.tolist()) == (np.int64, [2, -1, -1, 0])
    for wrong in (0.5, np.inf):
        with pytest.raises(InputError, match=f"^here, node 1: {wrong:g} is not a class"), np.errstate(invalid="ignore"):
            whole_labels(np.array([0, wrong]), "here")


@given(label=st.lists(st.integers(-3, 5), min_size=1, max_size=8), given=st.none() | st.integers(1, 5))
def test_how_classes_are_numbered(label: list[int], given: int | None) -> None:
    """Accepted are the labels of 0 to C - 1: all of them, or those of the C that is given."""
    classes = set(label) - {-1}
    wanted = len(classes) if given is None else given
    fine = bool(classes) and classes <= set(range(wanted))
    try:
        assert count_classes(np.array(label), "here", given) == wanted
    except InputError:
        assert not fine
    else:
        assert fine


def test_a_message_says_where_a_label_is() -> None:
    label = np.array([0, 1, 3, -2])
    for classes, at, message in (
        (None, None, "^here, node 3: class -2 is out of range; classes are numbered from 0"),
        (2, lambda node: f"row {node} of a.csv", "^row 2 of a.csv: class 3 is out of range for num_classes: 2"),
    ):
        with pytest.raises(InputError, match=message):
            count_classes(label, "here", classes, at)
    with pytest.raises(InputError, match=r"^here: class 3 occurs but class 2 does not"):
        count_classes(label[:3], "here")
