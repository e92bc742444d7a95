"""Dispatch: bring each row to the experts it was routed to, and the weighted sum of their outputs back.

`LocalDispatcher` for experts that are all here; `AllToAllDispatcher` for experts sharded over a group of ranks,
which sends a row once per rank (not once per expert) and returns one sum per rank.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rbm_dist.moe.collectives import all_to_all_rows
from rbm_dist.moe.sparse_rows import Rows, dense


@dataclass(frozen=True)
class Dispatched:
    """Rows grouped by local expert."""

    rows_RD: Rows
    counts_L: Tensor  # int64, rows of each local expert
    expert_R: Tensor  # int64, the expert of each row, numbered over all ranks
    key_R: Tensor | None  # int64, the dropout key of each row
    meta: Any  # what `combine` needs; the dispatcher's own


class Dispatcher(Protocol):
    def dispatch(self, rows_BD: Rows, experts_Bk: Tensor, weights_Bk: Tensor, key_B: Tensor | None) -> Dispatched:
        """Group rows by expert. `weights_Bk` weigh the experts' outputs in `combine`."""
        ...

    def combine(self, outputs_RO: Tensor, meta: Any) -> Tensor:
        """The weighted sum over each row's experts, `[B, O]`, in the order the rows came."""
        ...


@dataclass(frozen=True)
class _LocalMeta:
    row_R: Tensor
    weight_R: Tensor
    num_rows: int


class LocalDispatcher:
    """All of experts `first` to `first + num_local` are here; an expert of -1 is skipped."""

    def __init__(self, num_local: int, first: int = 0):
        self.num_local, self.first = num_local, first

    def dispatch(self, rows_BD: Rows, experts_Bk: Tensor, weights_Bk: Tensor, key_B: Tensor | None) -> Dispatched:
        row_R, slot_R = (experts_Bk >= 0).nonzero(as_tuple=True)
        expert_R = experts_Bk[row_R, slot_R]
        order = expert_R.argsort(stable=True)
        row_R, slot_R, expert_R = row_R[order], slot_R[order], expert_R[order]
        return Dispatched(
            rows_RD=rows_BD[row_R],
            counts_L=torch.bincount(expert_R - self.first, minlength=self.num_local),
            expert_R=expert_R,
            key_R=None if key_B is None else key_B[row_R],
            meta=_LocalMeta(row_R, weights_Bk[row_R, slot_R], len(rows_BD)),
        )

    def combine(self, outputs_RO: Tensor, meta: _LocalMeta) -> Tensor:
        weighted_RO = outputs_RO * meta.weight_R[:, None]
        return outputs_RO.new_zeros(meta.num_rows, outputs_RO.shape[1]).index_add(0, meta.row_R, weighted_RO)


@dataclass(frozen=True)
class _AllToAllMeta:
    local: _LocalMeta
    row_S: Tensor  # the row that each sent copy belongs to
    sent: list[int]  # copies sent to each rank
    received: list[int]
    num_rows: int


class AllToAllDispatcher:
    """Experts in equal consecutive shards over the ranks of a group (the last ranks may hold fewer, or none)."""

    def __init__(self, num_experts: int, group: dist.ProcessGroup):
        self.group = group
        self.world, rank = dist.get_world_size(group), dist.get_rank(group)
        self.per_rank = -(-num_experts // self.world)
        first = min(rank * self.per_rank, num_experts)
        self.local = LocalDispatcher(min(first + self.per_rank, num_experts) - first, first)

    def dispatch(self, rows_BD: Rows, experts_Bk: Tensor, weights_Bk: Tensor, key_B: Tensor | None) -> Dispatched:
        rows_BD = dense(rows_BD)  # one message of one shape
        rank_Bk = experts_Bk.div(self.per_rank, rounding_mode="floor")
        goes_BW = torch.zeros(len(rows_BD), self.world, dtype=torch.bool, device=rows_BD.device)
        goes_BW.scatter_(1, rank_Bk, True)
        rank_S, row_S = goes_BW.T.nonzero(as_tuple=True)  # ordered by receiving rank
        counts_W = torch.bincount(rank_S, minlength=self.world)
        receive_W = torch.empty_like(counts_W)
        dist.all_to_all_single(receive_W, counts_W, group=self.group)
        sent, received = counts_W.tolist(), receive_W.tolist()

        def exchange(x: Tensor) -> Tensor:
            return all_to_all_rows(x, sent, received, self.group)

        here_Sk = rank_Bk[row_S] == rank_S[:, None]
        experts_Tk = exchange(torch.where(here_Sk, experts_Bk[row_S], -1))
        weights_Tk = exchange(weights_Bk[row_S])
        key_T = None if key_B is None else exchange(key_B[row_S])
        dispatched = self.local.dispatch(exchange(rows_BD[row_S]), experts_Tk, weights_Tk, key_T)
        meta = _AllToAllMeta(dispatched.meta, row_S, sent, received, len(rows_BD))
        return Dispatched(dispatched.rows_RD, dispatched.counts_L, dispatched.expert_R, dispatched.key_R, meta)

    def combine(self, outputs_RO: Tensor, meta: _AllToAllMeta) -> Tensor:
        summed_TO = self.local.combine(outputs_RO, meta.local)
        returned_SO = all_to_all_rows(summed_TO, meta.received, meta.sent, self.group)
        return returned_SO.new_zeros(meta.num_rows, returned_SO.shape[1]).index_add(0, meta.row_S, returned_SO)
