"""Batch norm over all ranks against `torch.nn.BatchNorm1d` over the whole batch."""

import torch
from torch import nn

from rbm_dist.models.norm import GlobalBatchNorm
from tests.gloo import run_ranks

SHARES = [slice(0, 5), slice(5, 5), slice(5, 12)]  # one rank has no rows


def batch() -> torch.Tensor:
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def loss(y: torch.Tensor, rows: slice) -> torch.Tensor:
    return (y * torch.arange(48, dtype=torch.float64).view(12, 4)[rows]).square().sum()


def sharded(rank: int) -> dict[str, torch.Tensor]:
    norm = GlobalBatchNorm(4).double()
    norm.group = torch.distributed.group.WORLD
    x = batch()[SHARES[rank]].requires_grad_()
    y = norm(x)
    loss(y, SHARES[rank]).backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        "weight": norm.weight.grad,
        "mean": norm.running_mean,
        "var": norm.running_var,
    }


def reference() -> tuple[nn.BatchNorm1d, torch.Tensor, torch.Tensor]:
    norm, x = nn.BatchNorm1d(4).double(), batch().requires_grad_()
    y = norm(x)
    loss(y, slice(None)).backward()
    return norm, x, y.detach()


def test_one_process() -> None:
    expected, x, y = reference()
    norm, mine = GlobalBatchNorm(4).double(), batch().requires_grad_()
    out = norm(mine)
    loss(out, slice(None)).backward()
    for a, b in ((out, y), (mine.grad, x.grad), (norm.weight.grad, expected.weight.grad)):
        torch.testing.assert_close(a.detach(), b.detach())
    torch.testing.assert_close(norm.running_var, expected.running_var)
    torch.testing.assert_close(norm.eval()(x), expected.eval()(x))


def test_three_ranks() -> None:
    expected, x, y = reference()
    results = run_ranks(sharded, 3)
    torch.testing.assert_close(torch.cat([r["y"] for r in results]), y)
    torch.testing.assert_close(torch.cat([r["x"] for r in results]), x.grad)
    torch.testing.assert_close(sum(r["weight"] for r in results), expected.weight.grad)
    for result in results:
        torch.testing.assert_close(result["mean"], expected.running_mean)
        torch.testing.assert_close(result["var"], expected.running_var)
