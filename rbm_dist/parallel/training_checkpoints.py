"""What every training loop needs to be killed and go on: its last state, its best state, and where it was."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rbm_dist.parallel import checkpoint
from rbm_dist.parallel.mesh import Mesh

_NO_SCORE = -math.inf


class TrainingCheckpoints:
    """Checkpoints of one training loop, every few epochs, on any number of ranks.

    `extra` gives further tensors to save (the routing memory); `restore_extra` takes them back. The best state, by a
    score that is higher for better, is kept in memory and saved with every checkpoint under `best.`.
    """

    def __init__(
        self, url: str, every: int, model: nn.Module, optimizer: torch.optim.Adam, num_experts: int, mesh: Mesh,
        extra: Callable[[], dict[str, Tensor]] | None = None,
        restore_extra: Callable[[dict[str, Tensor]], None] | None = None,
    ):  # fmt: skip
        self._url, self._every, self._mesh = url, every, mesh
        self._model, self._optimizer, self._num_experts = model, optimizer, num_experts
        self._extra, self._restore_extra = extra, restore_extra
        self._best = self._copy_of_model()
        self._best_score = _NO_SCORE
        self.history: list[dict[str, Any]] = []  # a row per epoch: its number, the time, its figures

    def resume(self) -> int:
        """Load the newest checkpoint, if there is one. Gives the number of epochs that are done."""
        found = checkpoint.latest(self._url)
        if found is None:
            return 0
        folder, facts = found
        extra = self._extra() if self._extra else {}
        checkpoint.load(folder, self._state(extra), self._mesh)
        if self._restore_extra:
            self._restore_extra(extra)
        self._best_score = facts["best_score"]
        self.history = facts["history"]
        return len(self.history)

    def after_epoch(self, last: bool, score: float, figures: dict[str, float]) -> dict[str, Any]:
        """Keep the state if its score is the best so far; save a checkpoint if one is due. Gives the epoch's row."""
        row = {"epoch": len(self.history), "time": round(time.time(), 3), **figures}
        self.history.append(row)
        if score > self._best_score:
            self._best, self._best_score = self._copy_of_model(), score
        if last or len(self.history) % self._every == 0:
            state = self._state(self._extra() if self._extra else {})
            facts = {"best_score": self._best_score, "history": self.history}
            checkpoint.save(self._url, len(self.history), state, facts, self._mesh)
        return row

    def load_best(self, model: nn.Module) -> None:
        """Load the best state of the newest checkpoint into a whole (unsharded) model. For one rank alone."""
        found = checkpoint.latest(self._url)
        assert found is not None, "load_best before any checkpoint"
        state = {f"best.{name}": tensor for name, tensor in model.state_dict().items()}
        checkpoint.load(found[0], state)

    def _copy_of_model(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._model.state_dict().items()}

    def _state(self, extra: dict[str, Tensor]) -> dict[str, Tensor]:
        model, mesh = self._model, self._mesh
        best = checkpoint.sharded(model, self._best, self._num_experts, mesh)
        return (
            checkpoint.training_state(model, self._optimizer, self._num_experts, mesh)
            | {f"best.{name}": tensor for name, tensor in best.items()}
            | {f"extra.{name}": tensor for name, tensor in extra.items()}
        )
