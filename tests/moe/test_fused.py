"""A mixture's passes over memory on a CPU against the same in torch, values and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rbm_dist.moe.dispatch import Dispatched, LocalDispatcher
from rbm_dist.moe.fused import spread_dropped, spread_dropped_torch, weighted_sums, weighted_sums_torch

SIZES = {"rows": st.integers(0, 20), "experts": st.integers(1, 6), "k": st.integers(1, 6), "seed": st.integers(0, 99)}


def routed(rows: int, experts: int, k: int, seed: int, here: range | None) -> tuple[Dispatched, torch.Generator]:
    """Rows with k distinct experts each; of those not `here` there is nothing to do."""
    rng, k = torch.Generator().manual_seed(seed), min(k, experts)
    chosen = torch.stack([torch.randperm(experts, generator=rng)[:k] for _ in range(rows)] or [torch.empty(k)]).long()
    chosen = chosen[:rows]
    if here is not None:
        chosen = torch.where((chosen >= here.start) & (chosen < here.stop), chosen, -1)
    x, weights = (torch.randn(rows, width, generator=rng, dtype=torch.float64) for width in (5, k))
    dispatcher = LocalDispatcher(experts) if here is None else LocalDispatcher(len(here), here.start)
    return dispatcher.dispatch(x.requires_grad_(), chosen, weights.requires_grad_(), torch.arange(rows)), rng


def both(fused: Tensor, reference: Tensor, leaves: list[Tensor], rng: torch.Generator) -> None:
    """Equal, and so are their gradients at some point."""
    torch.testing.assert_close(fused, reference)
    towards = torch.randn(fused.shape, generator=rng, dtype=fused.dtype)
    for found, expected in zip(
        *(torch.autograd.grad(each, leaves, towards) for each in (fused, reference)), strict=True
    ):
        torch.testing.assert_close(found, expected)


@settings(deadline=None, max_examples=60)
@given(**SIZES, p=st.sampled_from([0.0, 0.4]), some=st.booleans())
def test_rows_are_spread_and_dropped(rows: int, experts: int, k: int, seed: int, p: float, some: bool) -> None:
    d, rng = routed(rows, experts, k, seed, range(experts // 2, experts) if some else None)
    for keys in (d.key_Tk, None):
        found = spread_dropped(d.rows_TD, d.place_Tk, d.at_R, keys, p)
        expected = spread_dropped_torch(d.rows_TD, d.at_R, keys, p, d.place_Tk.shape[1])
        both(found, expected, [d.rows_TD], rng)


@settings(deadline=None, max_examples=60)
@given(**SIZES, wider=st.integers(0, 3), some=st.booleans())
def test_outputs_are_weighed_and_summed(rows: int, experts: int, k: int, seed: int, wider: int, some: bool) -> None:
    d, rng = routed(rows, experts, k, seed, range(experts // 2, experts) if some else None)
    y = torch.randn(len(d.at_R), 4 + wider, generator=rng, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(len(d.counts_L), 4, generator=rng, dtype=torch.float64, requires_grad=True)
    found = weighted_sums(y, bias, d.place_Tk, d.at_R, d.experts_Tk, d.weights_Tk)
    both(found, weighted_sums_torch(y, bias, d.at_R, d.experts_Tk, d.weights_Tk), [y, bias, d.weights_Tk], rng)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_threads_make_no_difference(threads: int, dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    rng = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(2000, width, generator=rng).to(dtype).requires_grad_() for width in (8, 2))
    chosen = torch.stack([torch.randperm(5, generator=rng)[:2] for _ in range(2000)])
    d = LocalDispatcher(5).dispatch(x, chosen, weights, torch.arange(2000))
    bias = torch.randn(5, 8, generator=rng).to(dtype).requires_grad_()
    try:
        torch.set_num_threads(threads)
        spread = spread_dropped(x, d.place_Tk, d.at_R, d.key_Tk, 0.3)
        assert isinstance(spread, Tensor)
        out = weighted_sums(spread, bias, d.place_Tk, d.at_R, d.experts_Tk, weights)
        loss = out.square().sum()
        found = torch.autograd.grad(loss, [x, bias, weights], retain_graph=True)
        for _ in range(20):  # threads end in any order
            again = torch.autograd.grad(loss, [x, bias, weights], retain_graph=True)
            assert all(map(torch.equal, found, again))
    finally:
        torch.set_num_threads(before)
    reference = spread_dropped_torch(x, d.at_R, d.key_Tk, 0.3, 2)
    assert torch.equal(spread, reference)
    out = weighted_sums_torch(reference, bias, d.at_R, d.experts_Tk, weights)
    for each, expected in zip(found, torch.autograd.grad(out.square().sum(), [x, bias, weights]), strict=True):
        torch.testing.assert_close(each, expected)
