"""The batched product of filled-up groups against one product per group, values and gradients."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rbm_dist.moe.experts import batched_mm


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
