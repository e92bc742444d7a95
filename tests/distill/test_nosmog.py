"""NOSMOG's parts: similarity of hidden states over all pairs of rows, adversarial noise where the worst is known."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rbm_dist.distill.nosmog import adversarial_noise, similarity_loss
from rbm_dist.models.norm import GlobalBatchNorm, keep_statistics
from rbm_dist.randomness.rows import derive_keys
from tests.gloo import run_ranks

SHARES = [slice(0, 4), slice(4, 11)]
EPSILON = 0.05


def states() -> tuple[Tensor, Tensor]:
    """Hidden states of student and teacher, of different widths; one of the student's is zero, as ReLU may make it."""
    rng = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(11, width, generator=rng, dtype=torch.float64) for width in (5, 7))
    student[2] = 0
    return student, teacher


def over_pairs(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = (x / x.norm(dim=1, keepdim=True).clamp_min(1e-12) for x in (student, teacher))
    return (s @ s.T - t @ t.T).square().mean()


def test_similarity_over_all_pairs() -> None:
    student, teacher = states()
    torch.testing.assert_close(similarity_loss(student, teacher, 11, None), over_pairs(student, teacher))
    rotation, _ = torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    assert similarity_loss(3 * teacher @ rotation, teacher, 11, None).item() == pytest.approx(0, abs=1e-15)
    some = student[3:].requires_grad_()
    assert torch.autograd.gradcheck(lambda s: similarity_loss(s, teacher[3:], 8, None), (some,))


def similarity_of_rank(rank: int) -> tuple[float, Tensor]:
    student, teacher = states()
    share = student[SHARES[rank]].requires_grad_()
    loss = similarity_loss(share, teacher[SHARES[rank]], 11, torch.distributed.group.WORLD)
    (loss / 2).backward()  # every rank has the whole value: each counts its share of it
    return loss.item(), share.grad


def test_similarity_over_ranks() -> None:
    student, teacher = states()
    loss = over_pairs(student.requires_grad_(), teacher)
    (expected,) = torch.autograd.grad(loss, student)
    ranks = run_ranks(similarity_of_rank, 2)
    assert [rank[0] for rank in ranks] == pytest.approx([loss.item()] * 2, rel=1e-12)
    torch.testing.assert_close(torch.cat([rank[1] for rank in ranks]), expected)


def test_noise_is_the_worst_for_a_linear_loss() -> None:
    x, weight = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)), torch.randn(9, 6)
    keys = derive_keys(1, torch.arange(9))
    noise = adversarial_noise(lambda z: (z * weight).sum(), x, keys, EPSILON, steps=5)
    torch.testing.assert_close(noise, EPSILON * weight.sign())


def test_noise_stays_within_bounds_and_raises_the_loss() -> None:
    torch.manual_seed(0)
    model, x, label = (
        nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)),
        torch.randn(40, 6),
        torch.arange(40) % 3,
    )
    keys = derive_keys(1, torch.arange(40))

    def loss_at(z: Tensor) -> Tensor:
        return F.cross_entropy(model(z), label[: len(z)], reduction="sum")

    noise = adversarial_noise(loss_at, x, keys, EPSILON, steps=5)
    assert not noise.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert noise.abs().max() <= EPSILON
    worst = loss_at(x + noise).item()
    for _ in range(20):  # a random corner of the box is far less bad
        assert worst > loss_at(x + EPSILON * torch.randn_like(x).sign()).item()
    (gradient,) = torch.autograd.grad(loss_at(x.requires_grad_()), x)
    assert worst == pytest.approx(loss_at(x + EPSILON * gradient.sign()).item(), rel=0.01)
    x = x.detach()
    torch.testing.assert_close(adversarial_noise(loss_at, x[:7], keys[:7], EPSILON, 5), noise[:7])
    starts = [adversarial_noise(loss_at, x, derive_keys(word, torch.arange(40)), EPSILON, 0) for word in (1, 2)]
    assert starts[0].abs().max() <= EPSILON
    assert not torch.equal(*starts)


def test_running_statistics_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 3), GlobalBatchNorm(3)).train()
    norm, x = model[1], torch.randn(12, 4)
    model(x)
    before = [norm.running_mean.clone(), norm.running_var.clone()]
    with keep_statistics(model):
        inside = model(x + 5)
        assert [*map(torch.equal, before, (norm.running_mean, norm.running_var))] == [True, True]
    torch.testing.assert_close(inside.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    with pytest.raises(RuntimeError, match="stop"), keep_statistics(model):
        raise RuntimeError("stop")
    model(x + 5)
    assert not torch.equal(norm.running_mean, before[0]), "afterwards they move again"
