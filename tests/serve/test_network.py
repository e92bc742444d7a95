"""The network of a student at work against the same row by row in numpy, and against the one that was trained."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.special import log_softmax
from threadpoolctl import ThreadpoolController

from rbm_dist.moe.sparse_rows import to_rows
from rbm_dist.serve import kernels
from rbm_dist.serve.frozen import freeze
from rbm_dist.serve.network import Network
from tests.serve.reference import class_probabilities, random_student

ALWAYS, NEVER = 10**9, 0  # rows that go one by one


def rows_of(count: int, width: int = 12) -> np.ndarray:
    rows = np.random.default_rng(count).standard_normal((count, width)).astype(np.float32)
    return rows * (rows > -0.5)  # some zeros, which are passed over


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("few", [ALWAYS, NEVER])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mlp", {}),
        ("rbm", {}),
        ("rbm", {"routing": "input"}),
        ("rbm", {"routing": "input", "top_k": 1}),
        ("rbm", {"routing_temperature": 0.3, "input_attention": True}),
        ("rbm", {"num_layers": 1, "top_k": 1}),
    ],
)
def test_a_network_computes_the_methods_formulas(kind: str, changes: dict[str, Any], few: int) -> None:
    student, _ = random_student(kind, **changes)
    rows = rows_of(40)
    logits = freeze(student, few).logits(rows)
    assert_same(log_softmax(logits, 1), np.log(class_probabilities(student, rows)))


@pytest.mark.parametrize("few", [ALWAYS, NEVER])
@pytest.mark.parametrize("rows", [0, 1, 33])
@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
@pytest.mark.parametrize("kind", ["mlp", "rbm", "moe", "ensemble"])
@pytest.mark.parametrize(("num_experts", "top_k"), [(6, 2), (4, 4), (1, 1), (24, 1)])
def test_it_answers_as_the_student_that_was_trained(
    kind: str, num_experts: int, top_k: int, norm: str, rows: int, few: int
) -> None:
    # Wide enough that no row is all zeros behind a ReLU: it is as near to one memory as to another.
    student, _ = random_student(kind, num_experts=num_experts, top_k=top_k, norm=norm, hidden=32)
    x_BD = rows_of(rows)
    with torch.no_grad():
        expected = student(torch.from_numpy(x_BD))[0].numpy()
    assert_same(freeze(student, few).logits(x_BD), expected)


@pytest.mark.parametrize("kind", ["mlp", "rbm", "moe"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("routing", "top_k"), [("layers", 2), ("input", 1)])
def test_sparse_rows(kind: str, routing: str, top_k: int, dtype: torch.dtype) -> None:
    student, _ = random_student(kind, num_features=60, routing=routing, top_k=top_k, hidden=32)
    student = student.to(dtype)
    rows = sp.random_array((50, 60), density=0.1, format="csr", dtype=np.float32, rng=np.random.default_rng(2))
    rows = rows[np.diff(rows.indptr) > 0]  # a row of zeros is as near to one memory as to another
    network = freeze(student, few=1)
    with torch.no_grad():
        expected = student(to_rows(rows, torch.device("cpu"), dtype))[0].numpy()
    assert_same(network.logits(rows), expected)
    assert_same(network.logits(rows.toarray()), expected)
    assert network.logits(rows).dtype == expected.dtype
    assert network.logits(rows[:0]).shape == (0, 5)


@pytest.mark.parametrize(
    ("kind", "routing", "top_k"), [("rbm", "layers", 2), ("rbm", "input", 1), ("moe", "layers", 2)]
)
def test_routings_are_those_of_the_student(kind: str, routing: str, top_k: int) -> None:
    student, _ = random_student(kind, routing=routing, top_k=top_k, hidden=32)
    x_BD = rows_of(30)
    with torch.no_grad():
        _, traces = student(torch.from_numpy(x_BD))
    found = freeze(student).routings(x_BD)
    assert len(found) == len(traces)
    for went, trace in zip(found, traces, strict=True):
        np.testing.assert_array_equal(went.expert_Bk, trace.routing.experts_Bk.numpy())
        assert_same(went.weight_Bk, trace.routing.weights_Bk.numpy())
    if kind == "rbm":
        assert_same(found[0].cosine_Bk, traces[0].routing.cosines_Bk.numpy())


def test_how_many_rows_go_one_by_one_is_measured_once() -> None:
    network = freeze(random_student("rbm")[0])
    assert isinstance(network, Network)
    few = network.few
    assert few >= 1
    assert network.few == few


@pytest.mark.parametrize("rows", [kernels.NO_ROWS, kernels.SUM, kernels.LENGTH])
@pytest.mark.parametrize("missing", [False, True])
def test_features_are_scaled_as_for_training(rows: int, missing: bool) -> None:
    from rbm_dist.sources.scaling import Scaling

    rng = np.random.default_rng(3)
    x_BF = (rng.standard_normal((20, 6)) * [1, 1e-3, 1e9, 1, 1, 1]).astype(np.float32)
    x_BF[:, 2] += 1.7e9  # a time: in float32 its differences would be lost
    x_BF[4], x_BF[5, 1:3] = 0, np.nan if missing else 0
    shift, factor = rng.standard_normal(6), rng.random(6) + 0.5
    shift[2] = 1.7e9
    indicators = np.array([1, 2]) if missing else np.empty(0, np.int64)
    scaling = Scaling(rng.standard_normal(6), shift, factor, ("", "sum", "length")[rows], indicators)  # type: ignore[arg-type]
    found = np.empty((20, scaling.num_features), np.float32)
    assert kernels.scale(x_BF, scaling.fill, shift, factor, rows, indicators, missing, found) == -1
    np.testing.assert_allclose(found, scaling.apply(x_BF), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found(value: float) -> None:
    x_BF, ones = np.ones((5, 4), np.float32), np.ones(4)
    x_BF[3, 2] = value
    found = np.empty_like(x_BF)
    none = np.empty(0, np.int64)
    assert kernels.scale(x_BF, ones, ones, ones, kernels.NO_ROWS, none, False, found) == 3 * 4 + 2
    place = kernels.scale(x_BF, ones, ones, ones, kernels.NO_ROWS, none, True, found)
    assert place == (-1 if np.isnan(value) else 3 * 4 + 2)


@pytest.mark.parametrize("rows", [0, 1, 3, 8])
@pytest.mark.parametrize("width", [510, 513])
def test_few_rows_of_large_experts(width: int, rows: int) -> None:
    student, _ = random_student("rbm", num_features=width, hidden=520, num_experts=3, routing="input", top_k=1)
    x_BD = rows_of(rows, width) / width**0.5
    with torch.no_grad():
        expected = student(torch.from_numpy(x_BD))[0].numpy()
    np.testing.assert_allclose(freeze(student, NEVER).logits(x_BD), expected, rtol=1e-3, atol=1e-3)


def test_numpys_threads_are_as_before_however_many_ask_at_once() -> None:
    network, x_BD = freeze(random_student("rbm")[0], NEVER), rows_of(500)
    blas = ThreadpoolController().select(user_api="blas")
    with blas.limit(limits=2), ThreadPoolExecutor(4) as pool:
        before = [library.num_threads for library in blas.lib_controllers]
        assert set(before) == {2}
        expected = network.logits(x_BD)
        for found in pool.map(network.logits, [x_BD] * 40):
            np.testing.assert_array_equal(found, expected)
        assert [library.num_threads for library in blas.lib_controllers] == before
