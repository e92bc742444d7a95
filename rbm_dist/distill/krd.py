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
from rbm_dist.graph.splits import UNSEEN
from rbm_dist.graph.store import GraphStore
from rbm_dist.randomness.rows import derive_keys

_LOG_POWERS = (math.log(1e-2), math.log(1e2))


@dataclass(frozen=True)
class Pairs:
    """Teachers j of the batch's rows i."""

    nodes: np.ndarray  # [n] ids; the batch's own first
    soft_nC: np.ndarray  # their soft labels
    teacher_m: Tensor  # int64, position of j in `nodes`
    row_m: Tensor  # int64, the row of i
    weight_B: Tensor  # float64, what each pair of a row counts


class ReliableSampling:
    """Draws the pairs of a batch, and fits q. Everything but q is the same for all epochs."""

    def __init__(self, settings: KrdConfig, store: GraphStore, power: float | None = None):
        self.settings, self._store = settings, store
        self.power = settings.initial_power if power is None else power
        parts = range(store.num_parts)
        # Unseen nodes are hidden from training: how far theirs change must not scale the others'.
        seen = [store.array("entropy_change", part)[store.array("split", part) != UNSEEN] for part in parts]
        self._highest = max((float(change.max()) for change in seen if len(change)), default=0.0)

    def change(self, ids: np.ndarray) -> np.ndarray:
        """δ of some nodes that training sees, `[n]`, in [0, 1]."""
        change_n = self._store.gather("entropy_change", ids).astype(np.float64)
        return change_n / self._highest if self._highest > 0 else change_n

    def pairs(self, ids: np.ndarray, draw: int) -> Pairs:
        """The pairs of some rows. A pair's draw depends on (draw, i, j) alone."""
        sample = self._store.sample(ids, (self.settings.fanout,), draw)
        keep_probability_n = 1 - self.change(sample.nodes) ** self.power
        keys_m = derive_keys(
            derive_keys(draw, torch.from_numpy(ids[sample.dst])), torch.from_numpy(sample.nodes[sample.src])
        )
        uniform_m = (keys_m.numpy() >> 11 & (2**53 - 1)) / 2**53
        kept_m = uniform_m < keep_probability_n[sample.src]
        soft_nC = self._store.gather("soft", sample.nodes)
        agreeing = self.settings.neighbours == "agreeing"
        if agreeing:
            class_n = soft_nC.argmax(1)
            kept_m &= class_n[sample.src] == class_n[sample.dst]
        own = np.arange(len(ids))
        teacher_m, row_m = (torch.from_numpy(np.concatenate([own, each[kept_m]])) for each in (sample.src, sample.dst))
        pairs_B = torch.bincount(row_m, minlength=len(ids)).double()
        return Pairs(sample.nodes, soft_nC, teacher_m, row_m, 1 / pairs_B if agreeing else torch.ones_like(pairs_B))

    def agreement(self, ids: np.ndarray, agrees: np.ndarray) -> np.ndarray:
        """A histogram over δ, `[2, bins]`: how many of some nodes, and how many where student and teacher agree."""
        bins, change_n = self.settings.bins, self.change(ids)
        at = np.minimum((change_n * bins).astype(np.int64), bins - 1)
        return np.stack([np.bincount(at, minlength=bins), np.bincount(at, weights=agrees, minlength=bins)])

    def fit(self, histogram: np.ndarray) -> None:
        """Move q towards the least-squares fit of `1 − δ^q` to the share of agreement per bin."""
        nodes, agrees = histogram
        filled = nodes > 0
        centre = ((np.arange(len(nodes)) + 0.5) / len(nodes))[filled]
        share, weight = agrees[filled] / nodes[filled], nodes[filled]

        def error(log_power: float) -> float:
            return float(np.sum(weight * (1 - centre ** math.exp(log_power) - share) ** 2))

        fitted = math.exp(minimize_scalar(error, bounds=_LOG_POWERS, method="bounded").x)
        self.power = self.settings.momentum * self.power + (1 - self.settings.momentum) * fitted


def krd_loss(
    logits_BC: Tensor, soft_nC: Tensor, teacher_m: Tensor, row_m: Tensor, weight_B: Tensor,
    global_weight: float, temperature: float,
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
