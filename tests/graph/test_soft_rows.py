"""What is read of class distributions is what was stored, as far as its bytes can tell."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbm_dist.graph.soft_rows import decode, dtype_beside, encode, encode_beside, layout


def drawn(rows: int, classes: int, seed: int, sharp: float) -> np.ndarray:
    logits = sharp * np.random.default_rng(seed).normal(size=(rows, classes))
    exp = np.exp(logits - logits.max(1, keepdims=True))
    return (exp / exp.sum(1, keepdims=True)).astype(np.float32)


CASES = {
    "rows": st.integers(0, 6),
    "classes": st.integers(1, 40),
    "seed": st.integers(0, 99),
    "sharp": st.sampled_from([0.1, 3, 40]),
}


@given(**CASES, m=st.integers(1, 10))
def test_the_likeliest_are_kept_and_the_rest_is_spread_evenly(
    rows: int, classes: int, seed: int, sharp: float, m: int
) -> None:
    soft = drawn(rows, classes, seed, sharp)
    stored = encode(soft, "top_m", m)
    dtype, width = layout("top_m", m, classes)
    assert stored.dtype == dtype
    assert stored.shape == (rows, width)
    found = decode(stored, classes)
    assert found.dtype == np.float32
    m = min(m, classes)
    for row, expected in zip(found, soft, strict=True):
        order = np.argsort(-expected, kind="stable")
        np.testing.assert_allclose(row[order[:m]], expected[order[:m]], rtol=2**-10, atol=2**-24)
        others = row[order[m:]]
        if len(others):
            np.testing.assert_allclose(others, (1 - expected[order[:m]].sum()) / len(others), atol=2e-3)
            assert (others == others[0]).all()
        assert row.sum() == pytest.approx(1, abs=5e-3)


@given(**CASES)
def test_float16_rounds(rows: int, classes: int, seed: int, sharp: float) -> None:
    soft = drawn(rows, classes, seed, sharp)
    stored = encode(soft, "float16", 8)
    assert (stored.dtype, stored.shape[1]) == layout("float16", 8, classes)
    found = decode(stored, classes)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, soft, rtol=2**-11, atol=2**-25)


@given(**CASES)
def test_float32_is_as_it_was(rows: int, classes: int, seed: int, sharp: float) -> None:
    soft = drawn(rows, classes, seed, sharp)
    np.testing.assert_array_equal(decode(encode(soft, "float32", 8), classes), soft)


@given(scale=st.floats(1e-3, 1e6), seed=st.integers(0, 9))
def test_what_is_stored_beside_is_rounded_and_ends_where_float16_does(scale: float, seed: int) -> None:
    rows = (scale * np.random.default_rng(seed).normal(size=(3, 5))).astype(np.float32)
    assert encode_beside(rows, "float32") is rows
    for store in ("float16", "top_m"):
        found = encode_beside(rows, store)
        assert found.dtype == dtype_beside(store) == np.float16
        np.testing.assert_allclose(found.astype(float), rows.clip(-65504, 65504), rtol=2**-11, atol=2**-25)


@pytest.mark.parametrize("store", ["float32", "float16", "top_m"])
def test_a_row_that_says_nothing_still_says_nothing(store: str) -> None:
    assert not decode(encode(np.zeros((2, 30), np.float32), store, 8), 30).any()


def test_of_172_classes_four_fifths_of_the_bytes_are_saved() -> None:
    dtype, width = layout("top_m", 8, 172)
    assert dtype.itemsize * width <= 0.2 * 4 * 172
