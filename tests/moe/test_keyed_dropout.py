"""Dropout masks that belong to rows."""

import pytest
import torch

from rbm_dist.moe.keyed_dropout import keyed_dropout
from rbm_dist.randomness import rows as module
from rbm_dist.randomness.rows import derive_keys

P = 0.3


def test_rate_and_scale() -> None:
    x = torch.ones(4000, 33)
    out = keyed_dropout(x, derive_keys(1, torch.arange(4000)), P)
    kept = out != 0
    assert out[kept].unique().tolist() == pytest.approx([1 / (1 - P)])
    # Five standard deviations of a binomial.
    assert kept.float().mean().item() == pytest.approx(1 - P, abs=5 * (P * (1 - P) / x.numel()) ** 0.5)
    for axis, count in ((0, 4000), (1, 33)):
        spread = kept.float().mean(axis).std().item()
        assert spread == pytest.approx((P * (1 - P) / count) ** 0.5, rel=0.6), "no row or column is favoured"


def test_neighbouring_columns_and_rows_are_independent() -> None:
    kept = keyed_dropout(torch.ones(4000, 64), derive_keys(2, torch.arange(4000)), 0.5) != 0
    for a, b in ((kept[:, :-1], kept[:, 1:]), (kept[:-1], kept[1:]), (kept[:, :32], kept[:, 32:])):
        assert (a == b).float().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / a.numel() ** 0.5)


def test_a_mask_belongs_to_its_row() -> None:
    x, keys = torch.randn(50, 8), derive_keys(3, torch.arange(50))
    whole = keyed_dropout(x, keys, P)
    order = torch.randperm(50)
    assert torch.equal(keyed_dropout(x[order], keys[order], P), whole[order])
    assert not torch.equal(keyed_dropout(x, derive_keys(4, torch.arange(50)), P), whole)


def test_evaluation_changes_nothing() -> None:
    x = torch.randn(3, 4)
    assert keyed_dropout(x, None, P) is x
    assert keyed_dropout(x, torch.arange(3), 0.0) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_kernel_draws_what_the_formula_draws(dtype: torch.dtype) -> None:
    keys, columns = derive_keys(5, torch.arange(300)), torch.arange(41)
    for p in (0.05, 0.5, 0.9):
        expected = (module._bits32(keys[:, None], columns) >= int(p * 2**32) - 2**31).to(dtype) / (1 - p)
        found = keyed_dropout(torch.ones(300, 41, dtype=dtype), keys, p)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
