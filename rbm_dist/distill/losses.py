"""What a batch is, what its loss is: the objectives of distillation, put together as configured.

Every term is this rank's share of a mean over the global batch, so that the sum over ranks is the loss.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rbm_dist.config.run import StudentConfig
from rbm_dist.distill.kd import kd_loss, label_loss
from rbm_dist.distill.krd import Pairs, Reliability, krd_loss
from rbm_dist.distill.nosmog import adversarial_noise, similarity_loss
from rbm_dist.models.norm import keep_statistics
from rbm_dist.models.student import Student, Trace
from rbm_dist.moe.routing import commitment_loss, load_balance_loss
from rbm_dist.moe.sparse_rows import Rows, dense
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.reduce import sum_tensor


@dataclass(frozen=True)
class Batch:
    """The rows that this rank's parts give to one step, and all that is known of them, where the model is."""

    x_BF: Rows
    label_B: Tensor  # -1 where the node is not a training node
    key_B: Tensor
    soft_BC: Tensor  # the teacher's probabilities
    global_rows: int
    hidden_BT: Tensor | None = None  # the teacher's states, for the similarity
    pairs: Pairs | None = None  # for KRD


class Losses:
    """The loss of a student on a batch, term by term. With `reliability`, reliable neighbours teach too (KRD)."""

    def __init__(self, settings: StudentConfig, mesh: Mesh, reliability: Reliability | None = None):
        self._settings, self._mesh, self._reliability = settings, mesh, reliability

    def __call__(self, model: Student, batch: Batch) -> tuple[dict[str, Tensor], list[Trace], dict[str, Tensor]]:
        """Weighted terms, what the layers of experts saw, and what `after_epoch` wants summed."""
        settings, mesh = self._settings, self._mesh
        teach = self._pairs(batch) if self._reliability else self._own(batch)
        logits_BC, hidden_BH, traces = model.forward_hidden(batch.x_BF, batch.key_B)
        terms = {"distillation": (1 - settings.label_weight) * teach(logits_BC)}
        if settings.label_weight > 0:
            labelled = sum_tensor((batch.label_B >= 0).sum(), mesh)
            terms["label"] = settings.label_weight * label_loss(logits_BC, batch.label_B, labelled)
        if settings.similarity > 0:
            assert batch.hidden_BT is not None
            similarity = similarity_loss(dense(hidden_BH), batch.hidden_BT, batch.global_rows, mesh.world_group)
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
        if self._reliability is None or batch.pairs is None:
            return terms, traces, {}
        agrees_B = logits_BC.detach().argmax(1) == batch.soft_BC.argmax(1)
        return terms, traces, {"agreement": self._reliability.agreement(batch.pairs.bin_B, agrees_B)}

    def after_epoch(self, epoch: int, sums: dict[str, Tensor]) -> dict[str, float]:
        """Fit what is fitted between epochs, to the sums over all ranks' batches; figures for the metrics."""
        if self._reliability is None:
            return {}
        if epoch >= self._settings.krd.min_update_epoch:
            self._reliability.fit(sums["agreement"].numpy())
        return {"krd_power": self._reliability.power}

    def _own(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        return lambda logits_BC: kd_loss(logits_BC, batch.soft_BC, batch.global_rows, self._settings.temperature)

    def _pairs(self, batch: Batch) -> Callable[[Tensor], Tensor]:
        pairs = batch.pairs
        assert pairs is not None
        weight = sum_tensor(pairs.weight_B[pairs.row_m].sum(), self._mesh)
        return lambda logits_BC: krd_loss(
            logits_BC, pairs.soft_nC, pairs.teacher_m, pairs.row_m, pairs.weight_B, weight, self._settings.temperature
        )

    def _adversarial(self, model: Student, batch: Batch, teach: Callable[[Tensor], Tensor]) -> Tensor:
        settings, x_BF = self._settings.adversarial, dense(batch.x_BF)

        def loss_at(noisy_BF: Tensor) -> Tensor:
            return teach(model(noisy_BF, batch.key_B)[0])

        # These rows are made up: neither running statistics nor the memory's moving average may see them.
        with keep_statistics(model):
            noise_BF = adversarial_noise(loss_at, x_BF, batch.key_B, settings.epsilon, settings.steps)
            return loss_at(x_BF + noise_BF)
