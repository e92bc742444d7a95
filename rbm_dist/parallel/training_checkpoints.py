"""What every training loop needs to be killed and go on: its last state, its best state, and where it was."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rbm_dist.errors import InputError
from rbm_dist.parallel import checkpoint
from rbm_dist.parallel.mesh import Mesh


class Left(Exception):  # noqa: N818
    """A training loop saved a checkpoint and left, as it was ordered to."""


_NO_SCORE = -math.inf


class TrainingCheckpoints:
    """Checkpoints of one training loop, every few epochs, on any number of ranks.

    `loop` is its name for people, which starts with the section of its configuration. `extra` gives further tensors to
    save (the routing memory); `restore_extra` takes them back. The best state, by a score that is higher for better, is
    kept in memory and saved with every checkpoint under `best.`. Training is `stopped` after `patience` epochs without
    a better one. With `average`, a moving average of the weights (of that decay, shorter at the start) is what is
    evaluated and kept as the best.
    """

    def __init__(
        self, loop: str, url: str, every: int, model: nn.Module, optimizer: torch.optim.Adam, num_experts: int,
        mesh: Mesh,
        extra: Callable[[], dict[str, Tensor]] | None = None,
        restore_extra: Callable[[dict[str, Tensor]], None] | None = None,
        patience: int | None = None, average: float = 0.0,
    ):  # fmt: skip
        self._loop, self._url, self._every, self._mesh = loop, url, every, mesh
        self._model, self._optimizer, self._num_experts = model, optimizer, num_experts
        self._extra, self._restore_extra = extra, restore_extra
        self._decay, self._steps = average, 0
        parameters = dict(model.named_parameters()) if average else {}
        self._average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._best = self._copy_of_model()
        self._best_score, self._best_epoch, self._patience = _NO_SCORE, 0, patience
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
        self._best_score, self._best_epoch = facts["best_score"], facts["best_epoch"]
        self._steps = facts["steps"]
        self.history = facts["history"]
        return len(self.history)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the average towards the weights."""
        self._steps += 1
        decay = min(self._decay, self._steps / (self._steps + 10))
        for name, parameter in self._model.named_parameters():
            if name in self._average:
                self._average[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """In this block the model has the averaged weights, if there are any."""
        swapped = {name: p for name, p in self._model.named_parameters() if name in self._average}
        own = {name: parameter.data for name, parameter in swapped.items()}
        for name, parameter in swapped.items():
            parameter.data = self._average[name]
        try:
            yield
        finally:
            for name, parameter in swapped.items():
                parameter.data = own[name]

    def after_epoch(self, last: bool, score: float, figures: dict[str, float]) -> dict[str, Any]:
        """Keep the state if its score is the best so far; save a checkpoint if one is due. Gives the epoch's row.

        Raises `InputError` if the score or a figure is not finite: such an epoch is no better than another, nor worse.
        """
        self._require_finite({**figures, "score": score})
        row = {"epoch": len(self.history), "time": round(time.time(), 3), **figures}
        self.history.append(row)
        if score > self._best_score:
            self._best, self._best_score, self._best_epoch = self._copy_of_model(), score, len(self.history)
        if last or self.stopped or len(self.history) % self._every == 0:
            state = self._state(self._extra() if self._extra else {})
            facts = {
                "best_score": self._best_score, "best_epoch": self._best_epoch, "steps": self._steps,
                "history": self.history,
            }  # fmt: skip
            checkpoint.save(self._url, len(self.history), state, facts, self._mesh)
        return row

    @property
    def stopped(self) -> bool:
        """Whether the last `patience` epochs brought nothing better."""
        return self._patience is not None and len(self.history) - self._best_epoch >= self._patience

    def restore_best(self) -> None:
        """Go on from the best state."""
        self._model.load_state_dict(self._best)

    def load_best(self, model: nn.Module) -> None:
        """Load the best state of the newest checkpoint into a whole (unsharded) model. Ranks may do so alone."""
        found = checkpoint.latest(self._url)
        assert found is not None, "load_best before any checkpoint"
        state = {f"best.{name}": tensor for name, tensor in model.state_dict().items()}
        checkpoint.load(found[0], state)

    def _require_finite(self, figures: dict[str, float]) -> None:
        wrong = ", ".join(name for name, value in figures.items() if not math.isfinite(value))
        if not wrong:
            return
        epoch, section = len(self.history), self._loop.split()[0]
        smaller = f"try a smaller {section}.lr than {self._optimizer.param_groups[0]['lr']:g}"
        if epoch == 0:  # nothing was learned yet that could have gone astray
            smaller = (
                "the features, or what the teacher makes of them, are not finite or too large: look at the source's "
                f"summary for columns of a huge range, and scale them. If there are none, {smaller}"
            )
        raise InputError(f"{self._loop}: not finite in epoch {epoch}: {wrong}; {smaller}")

    def _copy_of_model(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in {**self._model.state_dict(), **self._average}.items()}

    def _state(self, extra: dict[str, Tensor]) -> dict[str, Tensor]:
        model, mesh = self._model, self._mesh
        kept = {"best": self._best, "average": self._average}
        sharded = {key: checkpoint.sharded(model, each, self._num_experts, mesh) for key, each in kept.items()}
        return (
            checkpoint.training_state(model, self._optimizer, self._num_experts, mesh)
            | {f"{key}.{name}": tensor for key, each in sharded.items() for name, tensor in each.items()}
            | {f"extra.{name}": tensor for name, tensor in extra.items()}
        )
