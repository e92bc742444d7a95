"""Cosine top-k routing by a memory, the statistics of its moving average, and its auxiliary losses.

There is no learned gate: row b goes to the k experts whose memories have the highest cosine with it.
Formulas: docs/method.md; Rumiantsev & Coates, "Graph Knowledge Distillation to Mixture of Experts", 2024, section 4.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from rbm_dist.moe.collectives import Group, all_reduce_sum
from rbm_dist.moe.sparse_rows import Rows, SparseRows, lengths, matmul

_MANY = 64  # experts per chosen one, from which adding rows up is less than a product with mostly zeros


@dataclass(frozen=True)
class Routing:
    """Where the rows of one layer went."""

    experts_Bk: Tensor  # int64, best first
    weights_Bk: Tensor  # softmax over the k chosen cosines
    cosines_Bk: Tensor  # of each row with its chosen memories (which carry no gradient)


@dataclass(frozen=True)
class MemoryStatistics:
    """One layer's sums over rows, from which the moving average of its memory is made; additive over ranks."""

    sum_ED: Tensor  # Σ exp(a) · normalize(x)
    mass_E: Tensor  # Σ exp(a)

    @classmethod
    def total(cls, parts: "list[MemoryStatistics]") -> "MemoryStatistics":
        return cls(sum(part.sum_ED for part in parts), sum(part.mass_E for part in parts))  # type: ignore[arg-type]


def route(x_BD: Rows, memory_ED: Tensor, k: int, temperature: float = 1.0) -> Routing:
    """The k memories nearest to each row by cosine, with weights `softmax(cosine / temperature)` over those k."""
    # In full precision: rounding would send rows elsewhere, and other ones in evaluation.
    with torch.autocast(memory_ED.device.type, enabled=False):
        # Lengths divide the few products, not the many numbers of the rows.
        products_BE = matmul(x_BD, F.normalize(memory_ED.detach(), dim=1).T.contiguous())
        cosines_BE = products_BE / lengths(x_BD)[:, None]
    # The largest alone takes a fraction of the time, and is the first of several that are equal.
    cosines_Bk, experts_Bk = cosines_BE.max(dim=1, keepdim=True) if k == 1 else cosines_BE.topk(k, dim=1)
    return Routing(experts_Bk, (cosines_Bk / temperature).softmax(dim=1), cosines_Bk)


@torch.no_grad()
def memory_statistics(x_BD: Rows, routing: Routing, num_experts: int) -> MemoryStatistics:
    """This rank's share of the moving average: weights are a softmax over *all* rows of the step that chose an expert.

    a ≤ 1, so no maximum needs subtracting, and ranks can simply be added.
    """
    exp_Bk = routing.weights_Bk.exp()
    k = exp_Bk.shape[1]
    if isinstance(x_BD, Tensor) and x_BD.device.type == "cpu" and num_experts > _MANY * k:
        # A GPU would add in any order, and runs would differ.
        share_Bk = exp_Bk / lengths(x_BD)[:, None]
        sum_ED = x_BD.new_zeros(num_experts, x_BD.shape[1])
        for j in range(k):
            sum_ED.index_add_(0, routing.experts_Bk[:, j], x_BD * share_Bk[:, j, None])
        mass_E = exp_Bk.new_zeros(num_experts).index_add_(0, routing.experts_Bk.flatten(), exp_Bk.flatten())
        return MemoryStatistics(sum_ED, mass_E)
    exp_BE = exp_Bk.new_zeros(len(exp_Bk), num_experts).scatter_(1, routing.experts_Bk, exp_Bk)
    share_BE = exp_BE / lengths(x_BD)[:, None]
    if isinstance(x_BD, SparseRows):
        return MemoryStatistics(x_BD.transposed().matmul(share_BE).T.contiguous(), exp_BE.sum(0))
    return MemoryStatistics(share_BE.T @ x_BD, exp_BE.sum(0))


@torch.no_grad()
def moving_average(memory_ED: Tensor, statistics: MemoryStatistics, decay: float) -> Tensor:
    """`decay · normalize(M) + (1 − decay) · average`; the memory of an expert that no row chose stays as it is."""
    average_ED = statistics.sum_ED / statistics.mass_E.clamp_min(1e-12)[:, None]
    moved_ED = decay * F.normalize(memory_ED, dim=1) + (1 - decay) * average_ED
    return torch.where(statistics.mass_E[:, None] > 0, moved_ED, memory_ED)


def commitment_loss(routing: Routing, global_rows: int) -> Tensor:
    """This rank's part of `−mean_b Σ_j a_j · cos(x_b, M_j)` over the global batch."""
    return -(routing.weights_Bk * routing.cosines_Bk).sum() / global_rows


def self_similarity_loss(memory_ED: Tensor) -> Tensor:
    """`mean(normalize(M) · stopgrad(normalize(M))ᵀ)`: pushes memories apart."""
    unit_ED = F.normalize(memory_ED, dim=1)
    return (unit_ED @ unit_ED.detach().T).mean()


def load_balance_loss(routing: Routing, num_experts: int, group: Group) -> Tensor:
    """CV² of the attention mass of each expert over the global batch; the same value on every rank."""
    weights = routing.weights_Bk
    mass_E = weights.new_zeros(num_experts).index_add(0, routing.experts_Bk.flatten(), weights.flatten())
    mass_E = all_reduce_sum(mass_E, group)
    return mass_E.var(correction=0) / mass_E.mean().square().clamp_min(1e-12)
