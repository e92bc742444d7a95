"""Differentiable collectives of `torch.distributed`. A group of None is a single process: nothing is sent.

Every rank of the group must call them in the same order, forward and backward, with no rows if it has none.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


def all_reduce_sum(x: Tensor, group: Group) -> Tensor:
    """The sum of `x` over the ranks. Its gradient is the sum of the ranks' gradients."""
    return x if group is None else _AllReduceSum.apply(x, group)


def all_to_all_rows(x_BD: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send `send[w]` consecutive rows to each rank w and receive `receive[w]` from it, in rank order."""
    return _AllToAllRows.apply(x_BD, send, receive, group)


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = grads[0].clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _exchange(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grads[0], ctx.receive, ctx.send, ctx.group), None, None, None


def _exchange(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    received = x.new_empty((sum(receive), *x.shape[1:]))
    dist.all_to_all_single(received, x.contiguous(), receive, send, group=group)
    return received
