"""One loop that trains teachers and students: steps, epochs, what is chosen, what is kept, and who is told."""

import math
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from rbm_dist.config.training import TrainingConfig
from rbm_dist.moe.collectives import traffic
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.pace import Reports
from rbm_dist.parallel.reduce import clip_gradients, sum_gradients
from rbm_dist.parallel.training_checkpoints import TrainingCheckpoints

History = list[dict[str, Any]]


class Listener(Reports, Protocol):
    """Who is told how training goes."""

    def begin(self, loop: str, history: History) -> None:
        """A loop begins, after these epochs."""
        ...

    def metrics(self, loop: str, row: dict[str, Any]) -> None:
        """An epoch is done."""
        ...

    def progress(self, loop: str, done: int, total: int, unit: str, note: str = "") -> None:
        """So much of the loop is done."""
        ...

    def end(self, loop: str, history: History) -> None:
        """The loop is done."""
        ...


@dataclass(frozen=True)
class Step:
    """What one step was; its gradients are in the parameters, of this rank's rows alone."""

    rows: int  # over all ranks
    terms: Mapping[str, Tensor | float]  # summed over steps and ranks
    load_E: Tensor | None = None  # how much went to each expert


@dataclass(frozen=True)
class Evaluation:
    """What the model does on validation: figures that have `val_loss` and `val_accuracy`, and more to sum."""

    figures: dict[str, float]
    terms: Mapping[str, Tensor | float] = field(default_factory=dict)


class Task(Protocol):
    """What is trained, and on what."""

    name: str  # of the loop in metrics
    select: Literal["loss", "accuracy"]  # on validation, by which the best epoch is chosen

    def steps(self, epoch: int, first: int) -> Generator[Step, None, None]:
        """The epoch's steps from `first`: forward and backward, into gradients that are zero or None before."""
        ...

    def evaluate(self, epoch: int) -> Evaluation:
        """The model after an epoch, on validation."""
        ...

    def figures(self, epoch: int, sums: dict[str, Tensor]) -> dict[str, float]:
        """The epoch's row, of which `loss` is one, of the sums over all terms. Fits what is fitted between epochs."""
        ...


def learning_rate(settings: TrainingConfig, step: int, steps: int) -> float:
    """What `lr` is multiplied with at a step, from 0, of so many."""
    risen = min(1.0, (step + 1) / (settings.warmup_steps + 1))
    if settings.lr_schedule == "constant":
        return risen
    after = max(0, step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    return risen * (1 + math.cos(math.pi * after)) / 2


def train(
    task: Task, model: nn.Module, optimizer: torch.optim.Adam, checkpoints: TrainingCheckpoints, epochs: int,
    settings: TrainingConfig, mesh: Mesh, listener: Listener,
) -> None:  # fmt: skip
    """Train from where the checkpoints are up to so many epochs, or until nothing gets better.

    Raises `Left` when the driver ordered the group to leave, `InputError` when a figure is not finite.
    """
    name, tells = task.name, mesh.rank == 0
    (group,) = optimizer.param_groups
    highest, per_epoch = group["lr"], checkpoints.steps_per_epoch
    if tells:
        listener.begin(name, checkpoints.history)
    for epoch, first in checkpoints.epochs(epochs):
        model.train()
        with closing(task.steps(epoch, first)) as steps:
            before = replace(traffic)
            for number, step in enumerate(steps, epoch * per_epoch + first):
                sum_gradients(model, mesh)
                if settings.clip_norm is not None:
                    clip_gradients(model, mesh, settings.clip_norm)
                group["lr"] = highest * learning_rate(settings, number, epochs * per_epoch)
                optimizer.step()
                optimizer.zero_grad()
                sent = traffic.since(before) if mesh.world_size > 1 else {}
                checkpoints.after_step(step.rows, {**step.terms, **sent}, step.load_E)
                before = replace(traffic)
        model.eval()
        with checkpoints.averaged(), torch.no_grad():
            evaluation = task.evaluate(epoch)
        sums = checkpoints.epoch_sums(evaluation.terms)
        exchanged = _exchanged(sums)
        figures = task.figures(epoch, sums) | evaluation.figures | exchanged
        loss, accuracy = figures["val_loss"], figures["val_accuracy"]
        # By accuracy: among equals by loss, which is weighed too little to overrule one node.
        row = checkpoints.after_epoch(-loss if task.select == "loss" else accuracy - 1e-9 * loss, figures)
        if tells:
            listener.metrics(name, row)
            note = f"loss {figures['loss']:.3f}, val loss {loss:.3f}, accuracy {accuracy:.1%}"
            listener.progress(name, epoch + 1, epochs, "epochs", note)
    if tells:
        listener.end(name, checkpoints.history)


def _exchanged(sums: dict[str, Tensor]) -> dict[str, float]:
    """What all ranks sent in the epoch's steps, in megabytes; taken out of the sums.

    `sent_mb`: in all. Where experts are sharded, of them `routed_mb`: rows to their experts and back; `least_mb`: what
    these are without anything that goes with them; `stayed`: the share of rows whose experts are on their own rank.
    """
    taken = {name: sums.pop(name).item() for name in vars(traffic) if name in sums}
    figures = {"sent_mb": taken["sent"] / 1e6} if taken else {}
    if taken.get("copies"):
        figures |= {"routed_mb": taken["routed"] / 1e6, "least_mb": taken["least"] / 1e6}
        figures["stayed"] = taken["stayed"] / taken["copies"]
    return {name: round(value, 6) for name, value in figures.items()}
