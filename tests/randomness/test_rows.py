"""Keys and noise that belong to rows."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch

from rbm_dist.randomness import rows as module
from rbm_dist.randomness.rows import derive_keys, keyed_normal, keyed_uniform


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


@pytest.mark.parametrize(("noise", "law"), [(keyed_normal, "norm"), (keyed_uniform, "uniform")])
def test_noise_has_its_distribution(noise: Callable[..., torch.Tensor], law: str) -> None:
    x = noise(derive_keys(5, torch.arange(2000)), 21, torch.float64)
    assert scipy.stats.kstest(x.flatten().numpy(), law).pvalue > 1e-3
    exact, count = getattr(scipy.stats, law), x.numel()
    moments = [float(exact.moment(order)) for order in range(1, 9)]
    for order in range(1, 5):
        deviation = ((moments[2 * order - 1] - moments[order - 1] ** 2) / count) ** 0.5
        assert x.pow(order).mean().item() == pytest.approx(moments[order - 1], abs=5 * deviation)
    for a, b in ((x[:, :-1], x[:, 1:]), (x[:-1], x[1:])):
        assert abs(np.corrcoef(a.flatten(), b.flatten())[0, 1]) < 5 / a.numel() ** 0.5


def test_noise_belongs_to_its_row() -> None:
    keys, order = derive_keys(6, torch.arange(50)), torch.randperm(50)
    for noise in (keyed_normal, keyed_uniform):
        whole = noise(keys, 8, torch.float32)
        assert (whole.dtype, whole.shape) == (torch.float32, (50, 8))
        assert torch.equal(noise(keys[order], 8, torch.float32), whole[order])
        assert torch.equal(noise(keys, 5, torch.float32), whole[:, :5]), "a column keeps its noise"
        assert len(whole.unique()) > 390
        assert not torch.equal(noise(derive_keys(7, torch.arange(50)), 8, torch.float32), whole)


def test_noise_is_finite_at_the_ends_of_the_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    for bits in (-(2**31), 2**31 - 1):
        monkeypatch.setattr(module, "_bits32", lambda key, column, bits=bits: torch.full((2, 3), bits))
        for dtype in (torch.float32, torch.float64):
            uniform = keyed_uniform(torch.arange(2), 3, dtype)
            assert ((uniform > 0) & (uniform <= 1)).all()
            assert torch.isfinite(keyed_normal(torch.arange(2), 3, dtype)).all()
