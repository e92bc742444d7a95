"""Differentiable collectives of `torch.distributed`. A group of None is a single process: nothing is sent.

Every rank of the group must call them in the same order, forward and backward, with no rows if it has none.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None


@dataclass
class Traffic:
    """What this process has sent to others since it began, for who wants to know how busy the network is."""

    sent: float = 0.0  # bytes, of all kinds
    routed: float = 0.0  # bytes of them for rows to their experts and back
    least: float = 0.0  # what these would be of rows and sums alone, each once for each other rank
    copies: int = 0  # rows that went to experts, once for each rank; those that stay on theirs included
    stayed: int = 0  # of them, those that stayed

    def since(self, before: "Traffic") -> dict[str, float]:
        """What came since a copy was made."""
        return {name: value - getattr(before, name) for name, value in vars(self).items()}


traffic = Traffic()


def all_reduce_sum(x: Tensor, group: Group) -> Tensor:
    """The sum of `x` over the ranks. Its gradient is the sum of the ranks' gradients."""
    return x if group is None else _AllReduceSum.apply(x, group)


def all_to_all_rows(
    x_BD: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, wire: torch.dtype | None = None,
    needed: bool = False,
) -> Tensor:  # fmt: skip
    """Send `send[w]` consecutive rows to each rank w and receive `receive[w]` from it, in rank order.

    wire: type in which rows and their gradients travel, default theirs. needed: count them among the least to be sent.
    """
    return _AllToAllRows.apply(x_BD, send, receive, group, wire or x_BD.dtype, needed)


def summed(total: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum a tensor in place over the ranks, without a gradient."""
    dist.all_reduce(total, group=group)
    others = dist.get_world_size(group) - 1
    traffic.sent += 2 * others / (others + 1) * total.numel() * total.element_size()  # in a ring
    return total


class _AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return summed(x.clone(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return summed(grads[0].clone(), ctx.group), None


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], *more: Any) -> Tensor:
        ctx.send, ctx.receive, ctx.more = send, receive, more
        return _exchange(x, send, receive, *more)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _exchange(grads[0], ctx.receive, ctx.send, *ctx.more), None, None, None, None, None


def _exchange(
    x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup, wire: torch.dtype, needed: bool
) -> Tensor:  # fmt: skip
    sent = x.to(wire).contiguous()
    received = sent.new_empty((sum(receive), *x.shape[1:]))
    others = sum(send) - send[dist.get_rank(group)]
    count = others * sent.element_size() * math.prod(x.shape[1:])
    traffic.sent += count
    traffic.routed += count
    traffic.least += count * needed
    dist.all_to_all_single(received, sent, receive, send, group=group)
    return received.to(x.dtype)
