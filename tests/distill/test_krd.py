"""KRD: the loss pair by pair, and the fit of q."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from rbm_dist.config.run import KrdConfig
from rbm_dist.distill.kd import kd_loss
from rbm_dist.distill.krd import Reliability, krd_loss

ROWS, TEACHERS, CLASSES = 6, 9, 4
ROW = torch.tensor([0, 1, 2, 3, 4, 5, 0, 0, 3, 5, 5, 5])
TEACHER = torch.tensor([0, 1, 2, 3, 4, 5, 7, 8, 0, 6, 7, 3])


def draw() -> tuple[Tensor, Tensor]:
    """The student's logits, and the teachers' probabilities; one teacher is certain."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(ROWS, CLASSES, generator=rng, dtype=torch.float64)
    soft = torch.randn(TEACHERS, CLASSES, generator=rng, dtype=torch.float64).mul(2).softmax(1)
    soft[7] = torch.eye(CLASSES)[2]
    return logits, soft


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_loss_pair_by_pair(temperature: float) -> None:
    logits, soft = draw()
    weight = torch.rand(ROWS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = 0.0
    for teacher, row in zip(TEACHER.tolist(), ROW.tolist(), strict=True):
        p = soft[teacher].numpy() ** (1 / temperature)
        p, q = p / p.sum(), np.exp(logits[row].numpy() / temperature)
        # The divergence KL(p ‖ q).
        total += weight[row].item() * temperature**2 * scipy.stats.entropy(p, q / q.sum())
    found = krd_loss(logits, soft, TEACHER, ROW, weight, 3.0, temperature)
    assert found.item() == pytest.approx(total / 3)
    assert torch.autograd.gradcheck(
        lambda z: krd_loss(z, soft, TEACHER, ROW, weight, 3.0, temperature), (logits.requires_grad_(),)
    )


def test_own_teachers_alone_are_plain_distillation() -> None:
    logits, soft = draw()
    own = torch.arange(ROWS)
    found = krd_loss(logits, soft, own, own, torch.ones(ROWS), ROWS, 2.0)
    torch.testing.assert_close(found, kd_loss(logits, soft[:ROWS], ROWS, 2.0))


def test_shares_of_ranks_add_up() -> None:
    logits, soft = draw()
    weight = 1 / torch.bincount(ROW).double()
    whole = krd_loss(logits, soft, TEACHER, ROW, weight, ROWS, 2.0)
    shares = []
    for rows in (range(2), range(2, 2), range(2, 6)):
        here = torch.isin(ROW, torch.tensor(list(rows)))
        shares.append(krd_loss(logits[rows], soft, TEACHER[here], ROW[here] - rows.start, weight[rows], ROWS, 2.0))
    assert shares[1] == 0
    torch.testing.assert_close(sum(shares), whole)


def test_agreement_is_a_histogram() -> None:
    rng = np.random.default_rng(0)
    bins, agrees = rng.integers(0, 10, 500), rng.random(500) < 0.6
    found = Reliability(KrdConfig(bins=10)).agreement(torch.from_numpy(bins), torch.from_numpy(agrees))
    assert found.dtype == torch.float64
    np.testing.assert_array_equal(found, [np.bincount(bins, minlength=10), np.bincount(bins[agrees], minlength=10)])


@pytest.mark.parametrize("power", [0.1, 0.7, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fit_recovers_the_power(power: float, momentum: float) -> None:
    reliability = Reliability(KrdConfig(momentum=momentum, initial_power=2.0))
    nodes = np.random.default_rng(0).integers(0, 400, 50).astype(float)
    nodes[[3, 20]] = 0  # bins without nodes count for nothing
    centre = (np.arange(50) + 0.5) / 50
    reliability.fit(np.stack([nodes, nodes * (1 - centre**power)]))
    assert reliability.power == pytest.approx(momentum * 2 + (1 - momentum) * power, rel=2e-3)


def test_full_bins_count_more() -> None:
    centre = (np.arange(50) + 0.5) / 50
    share = np.where(np.arange(50) % 2, 1 - centre**0.5, 1 - centre**3.0)
    powers = []
    for odd, even in ((1000.0, 1.0), (1.0, 1000.0)):
        reliability = Reliability(KrdConfig(momentum=0.0))
        nodes = np.where(np.arange(50) % 2, odd, even)
        reliability.fit(np.stack([nodes, nodes * share]))
        powers.append(reliability.power)
    assert powers == pytest.approx([0.5, 3.0], rel=0.05)
