"""What a batch is, what its loss is: the objectives of distillation, put together as configured.

Every term is this rank's share of a mean over the global batch, so that the sum over ranks is the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rbm_dist.config.run import Config
from rbm_dist.distill.kd import kd_loss, label_loss
from rbm_dist.distill.krd import ReliableSampling, krd_loss
from rbm_dist.distill.nosmog import adversarial_noise, similarity_loss
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.norm import keep_statistics
from rbm_dist.models.student import Student, Trace
from rbm_dist.moe.routing import commitment_loss, load_balance_loss
from rbm_dist.moe.sparse_rows import Rows, dense
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.reduce import sum_figures


@dataclass(frozen=True)
class Batch:
    """The rows that this rank's parts give to one step, and counts over all ranks."""

    ids: np.ndarray
    x_BF: Rows
    label_B: Tensor  # -1 where the node is not a training node
    key_B: Tensor
    global_rows: int
    global_labelled: int


class Losses:
    """The loss of a student on a batch, term by term. With `teaching`, reliable neighbours teach too (KRD)."""

    def __init__(
        self, config: Config, store: GraphStore, mesh: Mesh, teaching: ReliableSampling | None, dtype: torch.dtype
    ):
        self._settings, self._store, self._mesh, self._dtype = config.student, store, mesh, dtype
        self._teaching = teaching
        self._histogram = np.zeros((2, config.student.krd.bins))

    def __call__(self, model: Student, batch: Batch, draw: int) -> tuple[dict[str, Tensor], list[Trace]]:
        """Weighted terms, and what the layers of experts saw. `draw`: 64 random bits of this step."""
        settings, mesh = self._settings, self._mesh
        teach = self._pairs(batch, draw) if self._teaching else self._own(batch)
        logits_BC, hidden_BH, traces = model.forward_hidden(batch.x_BF, batch.key_B)
        terms = {"distillation": (1 - settings.label_weight) * teach(logits_BC)}
        if settings.label_weight > 0:
            terms["label"] = settings.label_weight * label_loss(logits_BC, batch.label_B, batch.global_labelled)
        if settings.similarity > 0:
            teacher_BT = self._array("hidden", batch.ids)
            similarity = similarity_loss(dense(hidden_BH), teacher_BT, batch.global_rows, mesh.world_group)
            terms["similarity"] = settings.similarity * similarity / mesh.world_size
        if settings.adversarial.weight > 0:
            terms["adversarial"] = settings.adversarial.weight * self._adversarial(model, batch, teach)
        routed_by_memory = bool(model.routed_layers)
        for trace in traces:
            if settings.load_balance > 0:
                balance = load_balance_loss(trace.routing, settings.num_experts, mesh.world_group) / mesh.world_size
                terms["load_balance"] = terms.get("load_balance", 0.0) + settings.load_balance * balance
            if routed_by_memory and settings.commitment > 0:
                commitment = commitment_loss(trace.routing, batch.global_rows)
                terms["commitment"] = terms.get("commitment", 0.0) + settings.commitment * commitment
        if self._teaching:
            predicted_B = logits_BC.detach().argmax(1).cpu().numpy()
            right_B = predicted_B == self._store.gather("soft", batch.ids).argmax(1)
            self._histogram += self._teaching.agreement(batch.ids, right_B)
        return terms, traces

    def take_agreement(self) -> dict[str, Tensor]:
        """What KRD is fitted to, a histogram of this rank's batches since the last call; nothing without KRD."""
        if self._teaching is None:
            return {}
        histogram, self._histogram = self._histogram, np.zeros_like(self._histogram)
        return {"agreement": torch.from_numpy(histogram)}

    def after_epoch(self, epoch: int, agreement: Tensor | None) -> dict[str, float]:
        """Fit what is fitted between epochs, to the agreement of all ranks' batches; figures for the metrics."""
        if self._teaching is None or agreement is None:
            return {}
        if epoch >= self._settings.krd.min_update_epoch:
            self._teaching.fit(agreement.numpy())
        return {"krd_power": self._teaching.power}

    def _own(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        soft_BC = self._array("soft", batch.ids)
        return lambda logits_BC: kd_loss(logits_BC, soft_BC, batch.global_rows, self._settings.temperature)

    def _pairs(self, batch: Batch, draw: int) -> Callable[[Tensor], Tensor]:
        assert self._teaching is not None
        pairs = self._teaching.pairs(batch.ids, draw)
        (global_weight,) = sum_figures([pairs.weight_B[pairs.row_m].sum().item()], self._mesh)
        soft_nC, weight_B = (self._floats(each) for each in (torch.from_numpy(pairs.soft_nC), pairs.weight_B))
        teacher_m, row_m = (each.to(self._mesh.device) for each in (pairs.teacher_m, pairs.row_m))
        return lambda logits_BC: krd_loss(
            logits_BC, soft_nC, teacher_m, row_m, weight_B, global_weight, self._settings.temperature
        )

    def _adversarial(self, model: Student, batch: Batch, teach: Callable[[Tensor], Tensor]) -> Tensor:
        settings, x_BF = self._settings.adversarial, dense(batch.x_BF)

        def loss_at(noisy_BF: Tensor) -> Tensor:
            return teach(model(noisy_BF, batch.key_B)[0])

        # These rows are made up: neither running statistics nor the memory's moving average may see them.
        with keep_statistics(model):
            noise_BF = adversarial_noise(loss_at, x_BF, batch.key_B, settings.epsilon, settings.steps)
            return loss_at(x_BF + noise_BF)

    def _array(self, name: str, ids: np.ndarray) -> Tensor:
        return self._floats(torch.from_numpy(self._store.gather(name, ids)))

    def _floats(self, array: Tensor) -> Tensor:
        return array.to(self._mesh.device, self._dtype)
