"""Scaling against numpy's own statistics: whatever the chunks, the units, the missing values, and sparse or not."""

from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from rbm_dist.config.source import DigitsConfig
from rbm_dist.sources.scaling import Moments, Scaling

VALUES = st.floats(-1e3, 1e3, width=32) | st.just(float("nan"))
TABLES = npst.arrays(np.float32, npst.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9), elements=VALUES)


def scaling(rows: Any, **settings: Any) -> Scaling:
    return Scaling.of(DigitsConfig(**settings), Moments.of([rows], rows.shape[1]), sp.issparse(rows))


def example(rows: int = 200, columns: int = 6, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(rows, columns)) * rng.uniform(0.5, 2, columns) + rng.normal(size=columns)).astype("f4")


@given(rows_nF=TABLES, cut=st.integers(0, 9))
def test_moments_are_those_of_all_rows(rows_nF: np.ndarray, cut: int) -> None:
    found = Moments.of([rows_nF[:cut], rows_nF[cut:]], rows_nF.shape[1])
    gone = np.isnan(rows_nF)
    np.testing.assert_array_equal(found.missing, gone.sum(axis=0))
    for column in range(rows_nF.shape[1]):
        values = rows_nF[~gone[:, column], column].astype(np.float64)
        assert found.count[column] == len(values)
        if len(values):
            assert (found.low[column], found.high[column]) == (values.min(), values.max())
            np.testing.assert_allclose(found.mean[column], values.mean(), rtol=1e-9, atol=1e-9)
            np.testing.assert_allclose(found.deviation[column], values.std(), rtol=1e-6, atol=1e-6)


@given(rows_nF=TABLES)
def test_moments_of_sparse_rows_are_those_of_dense_ones(rows_nF: np.ndarray) -> None:
    rows_nF = np.nan_to_num(rows_nF)
    dense, sparse = Moments.of([rows_nF], rows_nF.shape[1]), Moments.of([sp.csr_array(rows_nF)], rows_nF.shape[1])
    np.testing.assert_allclose(sparse.as_array(), dense.as_array(), rtol=1e-9, atol=1e-6)


def test_columns_are_standardised() -> None:
    rows = example()
    found = scaling(rows, normalize="column").apply(rows)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, (rows - rows.mean(0)) / rows.std(0), rtol=1e-4, atol=1e-5)


def test_rows_are_divided_by_their_sum_and_empty_ones_stay_zero() -> None:
    rows = np.array([[-3, 1, 0], [0, 0, 0], [3e38, 3e38, -3e38]], np.float32)
    expected = [[-0.75, 0.25, 0], [0, 0, 0], [1 / 3, 1 / 3, -1 / 3]]
    np.testing.assert_allclose(scaling(rows, normalize="row").apply(rows), expected, rtol=1e-6)
    sparse = sp.csr_array(rows)
    np.testing.assert_allclose(scaling(sparse, normalize="row").apply(sparse).toarray(), expected, rtol=1e-6)


def test_nothing_is_copied_where_nothing_is_done() -> None:
    rows = example()
    assert scaling(rows, normalize="none").apply(rows) is rows


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("factor", [1e-20, 0.01, 100, 1e20])
def test_auto_knows_no_unit(sparse: bool, factor: float) -> None:
    rows = example()
    if sparse:
        rows = np.where(np.random.default_rng(1).random(rows.shape) < 0.2, rows, 0)
    forms = [sp.csr_array(each) if sparse else each for each in (rows, rows * np.float32(factor))]
    one, other = (scaling(form).apply(form) for form in forms)
    if sparse:
        one, other = one.toarray(), other.toarray()
        assert np.array_equal(one != 0, rows != 0), "it stays sparse"
    np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6)
    length_n = np.linalg.norm(one.astype(np.float64), axis=1)
    if sparse:
        filled = length_n > 0
        np.testing.assert_allclose(length_n[filled], 1, rtol=1e-5)
        np.testing.assert_allclose(one[filled] * np.linalg.norm(rows[filled], axis=1)[:, None], rows[filled], rtol=1e-4)
    else:
        np.testing.assert_allclose(np.mean(length_n**2), 1, rtol=1e-4)


def test_auto_keeps_proportions_but_no_column_drowns_the_others() -> None:
    rows = example()
    ratio = scaling(rows).apply(rows).std(0) / rows.std(0)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    wild = rows.astype(np.float64) * [1, 1e30, 1, 1, 1e-30, 1] + [0, 0, 1.7e9, 0, 0, 0]
    found = scaling(wild).apply(wild)
    assert np.isfinite(found).all()
    spread = found.std(0, dtype=np.float64)
    middle = np.median(np.delete(wild, [1, 4], axis=1).std(0)) / rows.std(0)[0] * spread[0]
    assert spread[4] == pytest.approx(spread[1] / 10, rel=1e-3)
    assert 0.5 * middle < spread[1] < 2 * middle
    np.testing.assert_allclose(spread[2] / spread[0], rows.std(0)[2] / rows.std(0)[0], rtol=1e-3)


def test_a_wild_column_of_mostly_zeros_does_not_decide_every_length() -> None:
    rows = np.where(np.random.default_rng(1).random((200, 6)) < 0.3, np.abs(example()), 0)
    for form in (rows, sp.csr_array(rows)):  # dense or sparse, mostly zeros is what counts
        assert scaling(form).rows == "length"
    wild = rows.copy()
    wild[:, 3] = 1.7e9
    found = scaling(wild).apply(wild)
    assert np.median(np.abs(np.delete(found, 3, axis=1)).max(axis=1)) > 1e-3, "the others can still be told apart"


def test_a_column_that_never_changes_becomes_zero() -> None:
    rows = example()
    rows[:, 2] = 7.25
    for how in ("auto", "column"):
        assert not scaling(rows, normalize=how).apply(rows)[:, 2].any()
    rows[:] = 3
    assert not scaling(rows).apply(rows).any(), "as do all that never change"


@pytest.mark.parametrize("how", ["mean", "zero"])
def test_missing_values_are_filled_and_marked(how: str) -> None:
    rows = example()
    rows[::3, 1] = np.nan
    rows[5, 4] = np.nan
    made = scaling(rows, normalize="none", missing=how, missing_indicator=True)
    assert made.num_features == 8
    found = made.apply(rows)
    fill = np.nanmean(rows, axis=0, dtype=np.float64) if how == "mean" else np.zeros(6)
    np.testing.assert_allclose(found[:, :6], np.where(np.isnan(rows), fill, rows), rtol=1e-6)
    np.testing.assert_array_equal(found[:, 6:], np.isnan(rows[:, [1, 4]]))
    again = Scaling.from_arrays(made.as_arrays())
    np.testing.assert_array_equal(again.apply(rows), found)
