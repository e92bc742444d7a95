"""The distillation loss against the formula, row by row."""

import math

import pytest
import torch

from rbm_dist.distill.kd import kd_loss


def draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(6, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    return logits, teacher, torch.tensor([0, 3, -1, 2, -1, 1])


def softmax(values: list[float], temperature: float) -> list[float]:
    exp = [math.exp(v / temperature) for v in values]
    return [e / sum(exp) for e in exp]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("label_weight", [0.0, 0.3, 1.0])
def test_formula(temperature: float, label_weight: float) -> None:
    logits, teacher, label = draw()
    kl = nll = 0.0
    for row, target, y in zip(logits.tolist(), teacher.tolist(), label.tolist(), strict=True):
        p, q = softmax(target, temperature), softmax(row, temperature)
        kl += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 6
        nll -= math.log(softmax(row, 1.0)[y]) / 4 if y >= 0 else 0.0
    found = kd_loss(logits, teacher.softmax(1), label, 6, 4, temperature, label_weight)
    assert found.item() == pytest.approx(label_weight * nll + (1 - label_weight) * kl)


def test_shares_of_ranks_add_up() -> None:
    logits, teacher, label = draw()
    soft = teacher.softmax(1)
    whole = kd_loss(logits, soft, label, 6, 4, 2.0, 0.3)
    shares = [
        kd_loss(logits[rows], soft[rows], label[rows], 6, 4, 2.0, 0.3)
        for rows in (slice(0, 2), slice(2, 2), slice(2, 6))
    ]
    assert sum(share.item() for share in shares) == pytest.approx(whole.item())


def test_gradient_and_certain_teachers() -> None:
    logits, teacher, label = draw()
    soft = teacher.softmax(1)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: kd_loss(z, soft, label, 6, 4, 2.0, 0.3), (logits,))
    certain = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 3, 0, 1]]
    loss = kd_loss(logits, certain, label, 6, 4)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all(), "a probability of zero is no infinity"
