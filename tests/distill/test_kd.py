"""The distillation loss against the formula, row by row."""

import math

import pytest
import torch

from rbm_dist.distill.kd import kd_loss, label_loss


def draw() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(6, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    return logits, teacher, torch.tensor([0, 3, -1, 2, -1, 1])


def softmax(values: list[float], temperature: float) -> list[float]:
    exp = [math.exp(v / temperature) for v in values]
    return [e / sum(exp) for e in exp]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_formula(temperature: float) -> None:
    logits, teacher, _ = draw()
    kl = 0.0
    for row, target in zip(logits.tolist(), teacher.tolist(), strict=True):
        p, q = softmax(target, temperature), softmax(row, temperature)
        kl += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 6
    assert kd_loss(logits, teacher.softmax(1), 6, temperature).item() == pytest.approx(kl)


def test_label_loss_counts_labelled_rows() -> None:
    logits, _, label = draw()
    nll = sum(-math.log(softmax(row, 1.0)[y]) for row, y in zip(logits.tolist(), label.tolist(), strict=True) if y >= 0)
    assert label_loss(logits, label, torch.tensor(4)).item() == pytest.approx(nll / 4)
    assert label_loss(logits, torch.full((6,), -1), torch.tensor(0)).item() == 0


def test_shares_of_ranks_add_up() -> None:
    logits, teacher, label = draw()
    soft = teacher.softmax(1)
    parts = (slice(0, 2), slice(2, 2), slice(2, 6))
    shares = [kd_loss(logits[rows], soft[rows], 6, 2.0).item() for rows in parts]
    assert sum(shares) == pytest.approx(kd_loss(logits, soft, 6, 2.0).item())
    shares = [label_loss(logits[rows], label[rows], torch.tensor(4)).item() for rows in parts]
    assert sum(shares) == pytest.approx(label_loss(logits, label, torch.tensor(4)).item())


def test_gradient_and_certain_teachers() -> None:
    logits, teacher, _ = draw()
    soft = teacher.softmax(1)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: kd_loss(z, soft, 6, 2.0), (logits,))
    certain = torch.eye(4, dtype=torch.float64)[[0, 1, 2, 3, 0, 1]]
    loss = kd_loss(logits, certain, 6)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all(), "a probability of zero is no infinity"
