"""Knowledge-inspired reliable distillation (KRD; Wu et al., 2023): reliable neighbours teach a node as well.

A node j is the less reliable the more the entropy of its soft labels changes under feature noise. With that change δ
scaled to at most 1 over the nodes that training sees, j teaches each neighbour i with probability `1 − δ_j^q`; q is
fitted to where student and teacher agree. A node always teaches itself.

Published, every neighbour can teach, and the loss is a mean over pairs. Where edges join different classes, nodes are
taught the classes of others, and hubs outweigh all else. By default only neighbours teach to which the teacher gives
the same class, and rows weigh the same: the mean of a row's teachers then has the class of the row's own soft labels.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor

from rbm_dist.config.run import KrdConfig
from rbm_dist.distill.kd import soften

_LOG_POWERS = (math.log(1e-2), math.log(1e2))


@dataclass(frozen=True)
class Pairs:
    """Teachers j of the batch's rows i."""

    soft_nC: Tensor  # soft labels of all teachers; the batch's own first
    teacher_m: Tensor  # int64, position of j among the teachers
    row_m: Tensor  # int64, the row of i
    weight_B: Tensor  # what each pair of a row counts
    bin_B: Tensor  # int64, the row's bin of δ


class Reliability:
    """How much nodes are to be believed: q, fitted to where student and teacher agree."""

    def __init__(self, settings: KrdConfig, power: float | None = None):
        self._settings = settings
        self.power = settings.initial_power if power is None else power

    def agreement(self, bin_B: Tensor, agrees_B: Tensor) -> Tensor:
        """A histogram over δ, `[2, bins]` in float64: how many rows, and how many where student and teacher agree."""
        one_B = torch.ones_like(bin_B, dtype=torch.float64)
        empty = one_B.new_zeros(self._settings.bins)
        return torch.stack([empty.index_add(0, bin_B, each) for each in (one_B, agrees_B.double())])

    def fit(self, histogram: np.ndarray) -> None:
        """Move q towards the least-squares fit of `1 − δ^q` to the share of agreement per bin."""
        nodes, agrees = histogram
        filled = nodes > 0
        centre = ((np.arange(len(nodes)) + 0.5) / len(nodes))[filled]
        share, weight = agrees[filled] / nodes[filled], nodes[filled]

        def error(log_power: float) -> float:
            return float(np.sum(weight * (1 - centre ** math.exp(log_power) - share) ** 2))

        fitted = math.exp(minimize_scalar(error, bounds=_LOG_POWERS, method="bounded").x)
        self.power = self._settings.momentum * self.power + (1 - self._settings.momentum) * fitted


def krd_loss(
    logits_BC: Tensor, soft_nC: Tensor, teacher_m: Tensor, row_m: Tensor, weight_B: Tensor,
    global_weight: float | Tensor, temperature: float,
) -> Tensor:  # fmt: skip
    """This rank's share of the weighted mean over the global batch's pairs of `τ²·KL(teacher_j ‖ student_i)`.

    weight_B: what each pair of a row counts. global_weight: the sum over all pairs of all ranks.
    """
    teacher_nC = soften(soft_nC, temperature)
    student_BC = F.log_softmax(logits_BC / temperature, dim=1)
    probability_nC = teacher_nC.exp()
    # Σ over pairs of p_j·log p_j, less Σ p_j·log s_i; the latter by row: no [pairs, C] of the student.
    information = ((probability_nC * teacher_nC).sum(1)[teacher_m] * weight_B[row_m]).sum()
    taught_BC = torch.zeros_like(student_BC).index_add_(0, row_m, probability_nC[teacher_m]) * weight_B[:, None]
    return (information - (taught_BC * student_BC).sum()) * (temperature**2 / global_weight)
