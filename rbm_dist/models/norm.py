"""Normalisation between the layers of students and teacher."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rbm_dist.moe.collectives import Group, all_reduce_sum


class GlobalBatchNorm(nn.Module):
    """Batch normalisation over the rows of all ranks: the same as over one large batch (and fine with no rows here).

    `torch.nn.SyncBatchNorm` needs a GPU; the formula, parameters and buffers are those of `torch.nn.BatchNorm1d`.
    """

    def __init__(self, width: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.running_mean: Tensor
        self.running_var: Tensor
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.eps, self.momentum = eps, momentum
        self.group: Group = None
        self.updates_statistics = True  # whether training forwards count for the running statistics

    def forward(self, x_BD: Tensor) -> Tensor:
        x_BD = x_BD.to(self.running_mean.dtype)  # sums of many rows in bfloat16 would be far off
        if not self.training:
            mean, var = self.running_mean, self.running_var
        else:
            rows = all_reduce_sum(x_BD.new_full((), len(x_BD)), self.group).clamp_min(1)
            mean = all_reduce_sum(x_BD.sum(0), self.group) / rows
            var = all_reduce_sum((x_BD - mean).square().sum(0), self.group) / rows
            if self.updates_statistics:
                with torch.no_grad():
                    self.running_mean.lerp_(mean, self.momentum)
                    self.running_var.lerp_(var * rows / (rows - 1).clamp_min(1), self.momentum)
        return (x_BD - mean) * (var + self.eps).rsqrt() * self.weight + self.bias


@contextmanager
def keep_statistics(model: nn.Module) -> Iterator[None]:
    """Training forwards in this block leave the running statistics as they are."""
    norms = [module for module in model.modules() if isinstance(module, GlobalBatchNorm)]
    for norm in norms:
        norm.updates_statistics = False
    try:
        yield
    finally:
        for norm in norms:
            norm.updates_statistics = True


def make_norm(name: str, width: int) -> nn.Module:
    """`layer`, `batch` or `none`."""
    if name == "none":
        return nn.Identity()
    return nn.LayerNorm(width) if name == "layer" else GlobalBatchNorm(width)
