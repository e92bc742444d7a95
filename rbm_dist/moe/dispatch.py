"""Dispatch: bring each row to the ranks of the experts it was routed to, and the weighted sums of their outputs back.

`LocalDispatcher` for experts that are all here; `AllToAllDispatcher` for experts sharded over a group of ranks,
which sends a row once per rank (not once per expert) and returns one sum per rank.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from rbm_dist.moe.collectives import all_to_all_rows, traffic
from rbm_dist.moe.sparse_rows import Rows, dense
from rbm_dist.randomness.rows import derive_keys


@dataclass(frozen=True)
class Dispatched:
    """The rows T that experts here were chosen for, and their places R among the rows grouped by local expert."""

    rows_TD: Rows
    experts_Tk: Tensor  # int64, numbered from the first one here; -1: an expert elsewhere
    weights_Tk: Tensor  # of the experts' outputs
    key_Tk: Tensor | None  # int64, the dropout key of each row for each expert
    place_Tk: Tensor  # int64, where the row is among those grouped by expert; -1 as above
    at_R: Tensor  # int64, what has each place, in the flattened `[T, k]`
    counts_L: Tensor  # int64, places of each local expert
    meta: Any  # what `combine` needs; the dispatcher's own


class Dispatcher(Protocol):
    def dispatch(self, rows_BD: Rows, experts_Bk: Tensor, weights_Bk: Tensor, key_B: Tensor | None) -> Dispatched:
        """Bring rows to their experts, with the weights of their outputs; each has a key for each of its experts."""
        ...

    def combine(self, sums_TO: Tensor, meta: Any) -> Tensor:
        """The sums over all ranks, `[B, O]`, in the order the rows came."""
        ...


class LocalDispatcher:
    """All experts are here, or with `first` those from `first` to `first + num_local`; then one of -1 is elsewhere."""

    def __init__(self, num_local: int, first: int | None = None):
        self.num_local, self.first, self._all = num_local, first or 0, first is None

    def dispatch(self, rows_BD: Rows, experts_Bk: Tensor, weights_Bk: Tensor, key_B: Tensor | None) -> Dispatched:
        local_n = experts_Bk.flatten() - self.first
        if self._all:  # no question whose answer a GPU would have to be waited for
            expert_R, at_R = local_n.sort(stable=True)
        else:
            here_n = (experts_Bk >= 0).flatten().nonzero().squeeze(1)
            expert_R, order_R = local_n[here_n].sort(stable=True)
            at_R = here_n[order_R]
        place_n = torch.full_like(local_n, -1)
        place_n[at_R] = torch.arange(len(at_R), device=at_R.device)
        counts_L = expert_R.new_zeros(self.num_local).index_add_(0, expert_R, torch.ones_like(expert_R))
        return Dispatched(
            rows_TD=rows_BD,
            experts_Tk=torch.where(experts_Bk >= 0, experts_Bk - self.first, -1),
            weights_Tk=weights_Bk,
            key_Tk=None if key_B is None else derive_keys(key_B[:, None], experts_Bk),
            place_Tk=place_n.view_as(experts_Bk),
            at_R=at_R,
            counts_L=counts_L,
            meta=None,
        )

    def combine(self, sums_TO: Tensor, meta: None) -> Tensor:
        return sums_TO


@dataclass(frozen=True)
class _AllToAllMeta:
    row_S: Tensor  # the row that each sent copy belongs to
    sent: list[int]  # copies sent to each rank
    received: list[int]
    num_rows: int


class AllToAllDispatcher:
    """Experts in equal consecutive shards over the ranks of a group (the last ranks may hold fewer, or none).

    wire: type in which rows, sums and their gradients travel; default that of autocast, or theirs.
    """

    def __init__(self, num_experts: int, group: dist.ProcessGroup, wire: torch.dtype | None = None):
        self.group, self.wire = group, wire
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
        traffic.copies += len(row_S)
        traffic.stayed += sent[dist.get_rank(self.group)]

        def exchange(x: Tensor) -> Tensor:
            return all_to_all_rows(x, sent, received, self.group)

        def exchange_rows(x: Tensor) -> Tensor:
            return all_to_all_rows(x, sent, received, self.group, self._wire(x), needed=True)

        here_Sk = rank_Bk[row_S] == rank_S[:, None]
        experts_Tk = exchange(torch.where(here_Sk, experts_Bk[row_S], -1))
        weights_Tk = exchange(weights_Bk[row_S])
        key_T = None if key_B is None else exchange(key_B[row_S])
        dispatched = self.local.dispatch(exchange_rows(rows_BD[row_S]), experts_Tk, weights_Tk, key_T)
        return replace(dispatched, meta=_AllToAllMeta(row_S, sent, received, len(rows_BD)))

    def combine(self, sums_TO: Tensor, meta: _AllToAllMeta) -> Tensor:
        wire = self._wire(sums_TO)
        returned_SO = all_to_all_rows(sums_TO, meta.received, meta.sent, self.group, wire, needed=True)
        return returned_SO.new_zeros(meta.num_rows, returned_SO.shape[1]).index_add(0, meta.row_S, returned_SO)

    def _wire(self, x: Tensor) -> torch.dtype | None:
        kind = x.device.type
        return self.wire or (torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
