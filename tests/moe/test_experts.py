"""Stacked experts against a loop over plain linear layers."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rbm_dist.moe.experts import StackedExperts, batched_mm
from rbm_dist.moe.fused import weighted_sums


def make(counts: list[int], width: int, outputs: int, dtype: torch.dtype) -> tuple[StackedExperts, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    experts = StackedExperts(
        torch.randn(len(counts), width, outputs, generator=rng, dtype=dtype),
        torch.randn(len(counts), outputs, generator=rng, dtype=dtype),
    )
    return experts, torch.randn(sum(counts), width, generator=rng, dtype=dtype)


def with_bias(experts: StackedExperts, rows: Tensor, counts: Tensor) -> Tensor:
    """Each row by its expert."""
    place = torch.arange(len(rows))
    of = torch.repeat_interleave(counts)[:, None]
    products = experts(rows, counts)
    return weighted_sums(products, experts.bias_LO, place[:, None], place, of, torch.ones_like(of, dtype=rows.dtype))


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    width=st.integers(1, 20),
    outputs=st.sampled_from([1, 3, 8, 10, 47]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_values_and_gradients(counts: list[int], width: int, outputs: int, dtype: torch.dtype) -> None:
    experts, rows = make(counts, width, outputs, dtype)
    rows.requires_grad_()
    out = with_bias(experts, rows, torch.tensor(counts))
    out.square().mean().backward() if len(rows) else out.sum().backward()
    found = [rows.grad, experts.weight_LDO.grad, experts.bias_LO.grad]
    assert all(grad is not None for grad in found), "connected even without rows"
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (rows, experts.weight_LDO, experts.bias_LO)]
    groups = leaves[0].split(counts)
    expected = torch.cat([F.linear(g, w.T, b) for g, w, b in zip(groups, leaves[1], leaves[2], strict=True)])
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(out, expected, **tolerance)
    if len(rows):
        grads = torch.autograd.grad(expected.square().mean(), leaves)
        for grad, reference in zip(found, grads, strict=True):
            torch.testing.assert_close(grad, reference, **tolerance)


def test_gradcheck() -> None:
    experts, rows = make([2, 0, 3], 4, 3, torch.float64)
    counts = torch.tensor([2, 0, 3])
    assert torch.autograd.gradcheck(lambda r: with_bias(experts, r, counts), (rows.requires_grad_(),))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_expanded_gradients_pass(reduction: str) -> None:
    experts, rows = make([3, 2], 8, 16, torch.float32)
    getattr(with_bias(experts, rows, torch.tensor([3, 2])), reduction)().backward()
    assert torch.isfinite(experts.weight_LDO.grad).all()


@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 0]])
def test_input_attention(counts: list[int]) -> None:
    plain, rows = make(counts, 4, 3, torch.float64)
    experts = StackedExperts(plain.weight_LDO.detach(), plain.bias_LO.detach(), input_attention=True)
    groups = torch.tensor(counts)
    torch.testing.assert_close(
        with_bias(experts, rows, groups), with_bias(plain, rows, groups), msg="it begins as no attention"
    )

    def formula(rows: Tensor, attention: Tensor, weight: Tensor) -> Tensor:
        scales = attention.clamp(max=math.log(100)).exp()
        return torch.cat([(c * x) @ w for x, c, w in zip(rows.split(counts), scales, weight, strict=True)])

    def found(rows: Tensor, attention: Tensor, weight: Tensor) -> Tensor:
        parameters = {"log_attention_LD": attention, "weight_LDO": weight, "bias_LO": experts.bias_LO.detach()}
        return torch.func.functional_call(experts, parameters, (rows, groups))

    attention = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    attention[0, 0] = 9.0  # beyond the limit
    inputs = [rows, attention, experts.weight_LDO.detach()]
    torch.testing.assert_close(found(*inputs), formula(*inputs))
    assert torch.autograd.gradcheck(found, [each.clone().requires_grad_() for each in inputs])
    out = experts(rows.requires_grad_(), groups).sum()
    out.backward()
    assert experts.log_attention_LD.grad is not None, "connected even without rows"


@settings(deadline=None, max_examples=40)
@given(counts=st.lists(st.integers(0, 7), min_size=1, max_size=6), width=st.integers(1, 5), seed=st.integers(0, 9))
def test_batched_is_grouped(counts: list[int], width: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(counts), width, generator=rng, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(counts), width, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    found = batched_mm(rows, weight, torch.tensor(counts))
    expected = torch.cat([x @ w for x, w in zip(rows.split(counts), weight, strict=True)])
    torch.testing.assert_close(found, expected)
    towards = torch.randn(expected.shape, generator=rng, dtype=torch.float64)
    for each, same in zip(
        torch.autograd.grad(found, [rows, weight], towards),
        torch.autograd.grad(expected, [rows, weight], towards), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(each, same)
