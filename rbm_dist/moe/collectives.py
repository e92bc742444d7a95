"""Differentiable collectives of `torch.distributed`. A group of None is a single process: nothing is sent.

Every rank of the group must call them in the same order, forward and backward, with no rows if it has none.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


class Traffic:
    """Counts the bytes that this process sends to others, for who wants to know how busy the network is."""

    def __init__(self) -> None:
        self._bytes = 0

    def add(self, count: int) -> None:
        self._bytes += count

    def take(self) -> int:
        """The bytes since this was last asked."""
        count, self._bytes = self._bytes, 0
        return count


traffic = Traffic()
"""Rows of experts elsewhere, there and back, and what is pushed to the routing memory."""


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
    row = x.element_size() * math.prod(x.shape[1:])
    traffic.add(row * (sum(send) - send[dist.get_rank(group)]))
    dist.all_to_all_single(received, x.contiguous(), receive, send, group=group)
    return received
