"""Sparse rows against the same rows as a plain tensor: products, gradients, and every layer that takes them."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rbm_dist.models.gnn import Gnn, Neighbourhood, seeded
from rbm_dist.models.student import DenseLayer, RoutedLayer, make_mlp, make_moe, mlp_to_rbm
from rbm_dist.moe.experts import StackedExperts
from rbm_dist.moe.keyed_dropout import keyed_dropout
from rbm_dist.moe.routing import memory_statistics, route
from rbm_dist.moe.sparse_rows import Rows, SparseRows, dense, to_rows, to_scipy, unit
from rbm_dist.randomness.rows import derive_keys

DTYPE = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


def pair(rows: int, width: int, density: float = 0.3, seed: int = 0) -> tuple[SparseRows, Tensor]:
    """Rows of mostly zeros in both forms; the first of them has none but zeros."""
    x = draw(rows, width, seed=seed).numpy() * (np.random.default_rng(seed).random((rows, width)) < density)
    x[:1] = 0
    return SparseRows.of(sp.csr_array(x), DTYPE), torch.from_numpy(x)


@st.composite
def pairs(draw_: st.DrawFn) -> tuple[SparseRows, Tensor]:
    density = draw_(st.sampled_from([0.0, 0.2, 1.0]))
    return pair(draw_(st.integers(0, 9)), draw_(st.integers(1, 8)), density, draw_(st.integers(0, 99)))


@given(rows=pairs(), outputs=st.integers(1, 5))
def test_product_and_gradient(rows: tuple[SparseRows, Tensor], outputs: int) -> None:
    sparse, x = rows
    weight, back = draw(x.shape[1], outputs, seed=1).requires_grad_(), draw(len(x), outputs, seed=2)
    out = sparse.matmul(weight)
    torch.testing.assert_close(out, x @ weight)
    torch.testing.assert_close(torch.autograd.grad(out, weight, back)[0], x.T @ back)


@given(
    counts=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    width=st.integers(1, 6),
    density=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_grouped_product_and_gradient(counts: list[int], width: int, density: float) -> None:
    sparse, x = pair(sum(counts), width, density)
    weight, back = draw(len(counts), width, 3, seed=1).requires_grad_(), draw(sum(counts), 3, seed=2)
    expected = torch.cat([rows @ w for rows, w in zip(x.split(counts), weight, strict=True)])
    out = sparse.grouped_matmul(weight, torch.tensor(counts))
    torch.testing.assert_close(out, expected)
    for found, reference in zip(*(torch.autograd.grad(y, weight, back) for y in (out, expected)), strict=True):
        torch.testing.assert_close(found, reference)


@given(rows=pairs(), data=st.data())
def test_some_rows(rows: tuple[SparseRows, Tensor], data: st.DataObject) -> None:
    sparse, x = rows
    at = torch.tensor(data.draw(st.lists(st.integers(0, len(x) - 1), max_size=12)) if len(x) else [], dtype=torch.int64)
    start, stop = data.draw(st.integers(0, 10)), data.draw(st.integers(0, 10))
    for index in (at, slice(start, stop), slice(stop)):
        found = sparse[index]
        assert found.shape == x[index].shape
        assert torch.equal(found.dense(), x[index])


@given(rows=pairs(), seed=st.integers(0, 9))
def test_forms(rows: tuple[SparseRows, Tensor], seed: int) -> None:
    sparse, x = rows
    assert (len(sparse), sparse.shape) == (len(x), x.shape)
    assert torch.equal(sparse.dense(), x)
    assert torch.equal(dense(x), x)
    assert torch.equal(sparse.transposed().dense(), x.T)
    np.testing.assert_array_equal(sparse.scipy().toarray(), x)
    assert sparse.scipy().indices.dtype == np.int32
    torch.testing.assert_close(sparse.normalized().dense(), F.normalize(x, dim=1))
    keys = derive_keys(seed, torch.arange(len(x)))
    torch.testing.assert_close(dense(keyed_dropout(sparse, keys, 0.4)), keyed_dropout(x, keys, 0.4))


def test_conversions() -> None:
    matrix = sp.csr_array(pair(5, 7)[1].numpy())
    rows = to_rows(matrix, torch.device("cpu"), torch.float32)
    assert isinstance(rows, SparseRows)
    assert rows.value_n.dtype == torch.float32
    assert isinstance(to_scipy(rows), sp.csr_array)
    values = matrix.data.copy()
    rows.value_n.zero_()
    np.testing.assert_array_equal(matrix.data, values, "the matrix may be mapped from a file")
    plain = to_rows(matrix.toarray(), torch.device("cpu"), DTYPE)
    assert torch.equal(dense(plain), torch.from_numpy(matrix.toarray()))
    assert isinstance(to_scipy(plain), np.ndarray)


def test_gradcheck() -> None:
    sparse, _ = pair(6, 5)
    assert torch.autograd.gradcheck(sparse.matmul, (draw(5, 3).requires_grad_(),))
    counts = torch.tensor([4, 0, 2])
    grouped = draw(3, 5, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda weight: sparse.grouped_matmul(weight, counts), (grouped,))


def test_what_routing_makes_of_them() -> None:
    (sparse, x), memory = pair(12, 20), draw(5, 20, seed=3)
    found, expected = route(sparse, memory, 2, 0.5), route(x, memory, 2, 0.5)
    # The row of zeros has a cosine of zero with every memory: any two of them will do.
    torch.testing.assert_close(found.weights_Bk, expected.weights_Bk)
    torch.testing.assert_close(found.cosines_Bk, expected.cosines_Bk)
    assert torch.equal(found.experts_Bk[1:], expected.experts_Bk[1:])
    torch.testing.assert_close(dense(unit(sparse)), unit(x))
    sums, dense_sums = (memory_statistics(rows, expected, 5) for rows in (sparse, x))
    torch.testing.assert_close(sums.sum_ED, dense_sums.sum_ED)
    torch.testing.assert_close(sums.mass_E, dense_sums.mass_E)


MLP = make_mlp(20, 8, 4, num_layers=2, norm="layer", dropout=0.3, seed=1).double()
EXPERTS = {"weight_LDO": draw(5, 20, 8, seed=4), "bias_LO": draw(5, 8, seed=5)}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "dense layer": lambda: DenseLayer(20, 8, 0.3).double(),
    "routed layer": lambda: RoutedLayer(draw(5, 20, seed=3), StackedExperts(**EXPERTS), 2, 0.3, temperature=0.5),
    "input attention": lambda: RoutedLayer(draw(5, 20, seed=3), StackedExperts(**EXPERTS, input_attention=True), 2, 0),
    "mlp": lambda: MLP,
    "rbm": lambda: mlp_to_rbm(MLP, [draw(5, width, seed=6) for width in (20, 8)], 2),
    "vanilla mixture": lambda: make_moe(MLP, 5, 2, seed=2).double(),
}


@pytest.mark.parametrize("rows", [0, 12])
@pytest.mark.parametrize("name", MODULES)
def test_modules_give_the_same_on_both(name: str, rows: int) -> None:
    module, keys = MODULES[name](), derive_keys(3, torch.arange(rows))
    # A row of zeros is as near to one memory as to another; here it goes nowhere else.
    sparse, x = (each[1:] for each in pair(rows + 1, 20))

    def results(rows_BD: Rows) -> list[Tensor]:
        module.zero_grad()
        out = module(rows_BD, keys)[0]
        out.square().sum().backward()
        # No gradient is the same as zeros: without rows, only some parameters stay connected.
        return [out.detach(), *[torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]]

    for found, expected in zip(results(sparse), results(x), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("memories", [1, 2])
def test_layer_inputs(memories: int) -> None:
    widths = (21, 9)
    mlp = make_mlp(*widths, 5, num_layers=2, norm="layer", dropout=0.0, seed=1).double()
    student = mlp_to_rbm(mlp, [draw(4, width, seed=6) for width in widths[:memories]], top_k=2).eval()
    sparse, x = (each[1:] for each in pair(13, 21))
    torch.testing.assert_close(student.layer_inputs(sparse)[1], student.layer_inputs(x)[1])


@pytest.mark.parametrize("hidden", [6, 32], ids=["narrows", "widens"])
def test_teacher(hidden: int) -> None:
    model = seeded(0, lambda: Gnn(20, hidden, 4, num_layers=2, dropout=0.3)).double()
    sparse, x = pair(9, 20)
    edges = torch.tensor([[2, 3, 4, 0, 5, 6, 7, 8], [0, 0, 1, 1, 2, 2, 3, 4]])
    hood = Neighbourhood(torch.arange(9) * 7, edges, [2, 3, 4], [4, 4])
    for key in (None, 5):
        for found, expected in zip(*(model.forward_hidden(rows, hood, key) for rows in (sparse, x)), strict=True):
            torch.testing.assert_close(found, expected)
