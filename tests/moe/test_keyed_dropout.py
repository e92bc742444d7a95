"""Dropout masks that belong to rows."""

import numpy as np
import pytest
import torch

from rbm_dist.moe.keyed_dropout import derive_keys, keyed_dropout

P = 0.3


def splitmix(state: int, word: int) -> int:
    """splitmix64 in Python's integers."""
    mask = 2**64 - 1
    z = ((state ^ word) + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_keys_are_splitmix64() -> None:
    for state in (0, 1, 2**63 + 5, 2**64 - 1):
        found = derive_keys(state, torch.tensor([0, 7, 2**40]))
        assert [int(np.uint64(key.item() % 2**64)) for key in found] == [splitmix(state, w) for w in (0, 7, 2**40)]


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
