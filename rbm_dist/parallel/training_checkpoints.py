"""What every training loop needs to be killed and go on: its last state, its best state, and where it was.

Checkpoints are made between epochs and in the middle of them; what an epoch has summed so far is in them, so that its
figures do not tell whether it was cut off. They are written while training goes on.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rbm_dist.config.run import ClusterConfig
from rbm_dist.errors import InputError, RunError
from rbm_dist.parallel import checkpoint
from rbm_dist.parallel.background_save import BackgroundSave
from rbm_dist.parallel.epoch_sums import EpochSums
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.newest_checkpoint import newest
from rbm_dist.parallel.pace import Pace, Reports

_NO_SCORE = -math.inf
_GRACE_S = 10.0  # longest wait for a checkpoint that is being written when the loop breaks off: others may be gone


def copies_of_parameters(average: bool) -> int:
    """How often a loop holds a model's parameters: they, gradients, Adam's two, the best, and a checkpoint's of these.

    average: with a moving average of the weights.
    """
    return 8 + 2 * average


class Left(Exception):  # noqa: N818 - no error
    """The driver ordered the group to leave; a checkpoint of where it was is written."""


class TrainingCheckpoints:
    """Where one training loop is, and its checkpoints, on any number of ranks.

    `section` is that of its configuration, `loop` its name in metrics. It has `steps` steps per epoch. `cluster` says
    how often there are checkpoints: by epochs, steps and minutes; there is one when the driver orders it, too.
    `extra` gives further tensors to save (the routing memory), after so many steps; `restore_extra` takes them back.
    The best state, by a score that is higher for better, is kept in memory and saved with every checkpoint under
    `best.`. Training is `stopped` after `patience` epochs without a better one. With `average`, a moving average of the
    weights (of that decay, shorter at the start) is what is evaluated and kept as the best. `token`: the run owner's.
    """

    def __init__(
        self, section: str, loop: str, url: str, cluster: ClusterConfig, reports: Reports, steps: int,
        model: nn.Module, optimizer: torch.optim.Adam, num_experts: int, mesh: Mesh,
        extra: Callable[[int], dict[str, Tensor]] | None = None,
        restore_extra: Callable[[dict[str, Tensor]], None] | None = None,
        patience: int | None = None, average: float = 0.0, token: int = 0,
    ):  # fmt: skip
        self._what = loop if loop == section else f"{section} {loop}"
        self._loop, self._section, self._url, self._cluster, self._mesh = loop, section, url, cluster, mesh
        self._model, self._optimizer, self._num_experts = model, optimizer, num_experts
        self._extra, self._restore_extra, self._token = extra, restore_extra, token
        self._steps, self.steps_per_epoch, self._epochs = 0, steps, 0
        self._decay = average
        parameters = dict(model.named_parameters()) if average else {}
        self._average = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self._best = self._copy_of_model()
        self._best_score, self._best_epoch, self._patience = _NO_SCORE, 0, patience
        self._best_checkpoint: str | None = None  # the first that holds the best state
        self._sums, self._pace = EpochSums(), Pace(loop, reports, mesh, cluster.checkpoint_minutes)
        self._reports, self._writer = reports, BackgroundSave(self._what, cluster.collective_timeout_s)
        self._saved_at = 0  # steps
        self.history: list[dict[str, Any]] = []  # a row per epoch: its number, the time, its figures

    def resume(self) -> bool:
        """Load the newest whole checkpoint, the same on all ranks. Gives whether there is one.

        Raises `InputError` or `RunError`, on all ranks, if one of them cannot load it.
        """
        with newest(self._url, self._mesh) as found:
            if found is None:
                return False
            extra = self._extra(0) if self._extra else {}
            checkpoint.load(found.local, self._state(extra), self._mesh)
        if self._restore_extra:
            self._restore_extra(extra)
        facts = found.facts
        self._best_epoch, self._best_checkpoint = facts["best_epoch"], facts["best_checkpoint"]
        self._best_score = facts["best_score"] if self._best_epoch else _NO_SCORE
        self._steps = self._saved_at = found.index["step"]
        self._sums.restore(facts["own"], self._mesh)
        self.history = facts["history"]
        return True

    def epochs(self, count: int) -> Iterator[tuple[int, int]]:
        """The epochs that are left of `count`, until training is stopped, each with its first step that is left.

        When they end, the last checkpoint is whole. Raises what went wrong while it was written.
        """
        self._epochs = count
        try:
            while len(self.history) < count and not self.stopped:
                epoch = len(self.history)
                yield epoch, self._steps - epoch * self.steps_per_epoch
        except GeneratorExit:  # the loop was left by an error
            self._writer.linger(_GRACE_S)
            raise
        self._writer.wait()

    @torch.no_grad()
    def after_step(self, rows: int, terms: Mapping[str, Tensor | float], load_E: Tensor | None = None) -> None:
        """A step of so many rows, over all ranks, is done; `terms` are added to the epoch's sums.

        Moves the average towards the weights. Among the terms, `wait_s` and `edges` are shown as the loop's speed, and
        so is load_E, how much went to each expert. Raises `Left` when the driver ordered that.
        """
        self._steps += 1
        decay = min(self._decay, self._steps / (self._steps + 10))
        for name, parameter in self._model.named_parameters():
            if name in self._average:
                self._average[name].lerp_(parameter, 1 - decay)
        self._sums.add(terms)
        self._pace.after_step(rows, float(terms.get("wait_s", 0.0)), float(terms.get("edges", 0.0)), load_E)
        if self._steps % self.steps_per_epoch:  # after its last step an epoch is about to end
            self._save_if_due(False)

    def epoch_sums(self, terms: Mapping[str, Tensor | float] | None = None) -> dict[str, Tensor]:
        """The terms of all of the epoch's steps and ranks, summed; with some that come after the steps."""
        self._sums.add(terms or {})
        return self._sums.total(self._mesh)

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

    def after_epoch(self, score: float, figures: dict[str, float]) -> dict[str, Any]:
        """Keep the state if its score is the best so far; save a checkpoint if one is due. Gives the epoch's row.

        Raises `InputError` if the score or a figure is not finite: such an epoch is no better than another, nor worse.
        """
        self._require_finite({**figures, "score": score})
        row = {"epoch": len(self.history), "time": round(time.time(), 3), **figures}
        self.history.append(row)
        self._sums.clear()
        if score > self._best_score:
            self._best, self._best_score, self._best_epoch = self._copy_of_model(), score, len(self.history)
            self._best_checkpoint = None
        done = len(self.history)
        self._save_if_due(done == self._epochs or self.stopped or done % self._cluster.checkpoint_every == 0)
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
        alone = Mesh.single()
        with newest(self._url, alone) as found:
            assert found is not None, "load_best before any checkpoint"
            state = {f"best.{name}": tensor for name, tensor in model.state_dict().items()}
            checkpoint.load(found.local, state, alone)

    def _save_if_due(self, due: bool) -> None:
        """Save where all ranks know that it is time; ask whether to where it is time to ask."""
        by_steps, order, failed = self._cluster.checkpoint_steps, "go", False
        if self._pace.due:
            all_steps = self._epochs * self.steps_per_epoch
            order, failed = self._pace.ask(
                len(self.history), self._steps, all_steps, self._writer.writing, self._writer.failed
            )
        if failed:
            self._writer.wait()  # every rank's thread has been told of it, or is about to be
            raise RunError(f"{self._what}: a rank could not write its checkpoint")
        if due or order != "go" or (by_steps and self._steps % by_steps == 0):
            self._save()
        if order == "leave":
            self._writer.wait()
            raise Left(f"{self._what}: left after {self._steps} steps, as ordered")

    def _save(self) -> None:
        step = self._steps
        if self._saved_at == step:
            return
        self._writer.wait()
        if self._best_epoch and self._best_checkpoint is None:
            self._best_checkpoint = checkpoint.name_of(step, self._token)
        facts = {
            "loop": self._loop, "epochs": len(self.history), "steps_per_epoch": self.steps_per_epoch,
            "best_score": self._best_score if self._best_epoch else None, "best_epoch": self._best_epoch,
            "best_checkpoint": self._best_checkpoint, "history": list(self.history),
        }  # fmt: skip
        own = self._sums.state()

        def save(state: dict[str, Tensor]) -> None:
            keep = self._cluster.keep_checkpoints
            checkpoint.save(self._url, step, state, facts, self._mesh, self._token, keep, own)
            if self._mesh.rank == 0:
                self._reports.saved(self._loop, step)

        self._writer.start(self._state(self._extra(step) if self._extra else {}), save)
        self._saved_at = step
        self._pace.saving()

    def _require_finite(self, figures: dict[str, float]) -> None:
        wrong = ", ".join(name for name, value in figures.items() if not math.isfinite(value))
        if not wrong:
            return
        epoch = len(self.history)
        smaller = f"try a smaller {self._section}.lr than {self._optimizer.defaults['lr']:g}"
        if epoch == 0:  # nothing was learned yet that could have gone astray
            smaller = (
                "the features, or what the teacher makes of them, are not finite or too large: look at the source's "
                f"summary for columns of a huge range, and scale them. If there are none, {smaller}"
            )
        raise InputError(f"{self._what}: not finite in epoch {epoch}: {wrong}; {smaller}")

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
