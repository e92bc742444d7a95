"""The teacher's training: mini-batches, sampled or of rows over hops, data parallel, chosen by validation."""

import itertools
from collections.abc import Generator, Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rbm_dist.config.run import Config
from rbm_dist.config.teacher import GCN
from rbm_dist.graph.loader import Prefetch
from rbm_dist.graph.splits import TRAIN, VAL
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.gnn import Gnn
from rbm_dist.models.hop_networks import HopNetwork
from rbm_dist.models.teacher import Teacher, build_teacher
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.reduce import sum_figures
from rbm_dist.parallel.training_checkpoints import TrainingCheckpoints
from rbm_dist.randomness.bits import key
from rbm_dist.randomness.words import Word
from rbm_dist.train.hop_rows import HopRows, hop_states, read_hops
from rbm_dist.train.loop import Evaluation, Listener, Step, train
from rbm_dist.train.part_batches import PartBatches
from rbm_dist.train.sampled_rows import SampledRows, keep_hot, read_sample, states
from rbm_dist.train.temperature import best_temperature

_PENALTY = 0.3  # of the summed loss: times half the weights' square
_COUNTS = ("edges", "asked", "hits")  # of what is read; the latter two as in `SampledRows`
Labelled = tuple[SampledRows | HopRows, Tensor]
"""Some seeds and their labels `[seeds]`."""


def trained_teacher(
    mesh: Mesh, listener: Listener, config: Config, store: GraphStore, url: str, token: int = 0
) -> Teacher:  # fmt: skip
    """The teacher with the weights of its best epoch. Goes on from the last checkpoint below `url`.

    Every rank calls it, with its own store. `token`: of the run's owner. Raises `Left` when ordered to leave.
    """
    settings = config.teacher
    model = build_teacher(config, store.num_features, store.num_classes).to(mesh.device)
    parts = mesh.parts(store.num_parts)
    store.hold(parts)
    batches = {
        code: PartBatches.of(store, parts, partial(np.equal, code), settings.batch_size) for code in (TRAIN, VAL)
    }
    task = _TeacherTask(mesh, config, store, model, batches[TRAIN], batches[VAL])
    # The loss is a mean: a fixed decay, right for 140 labels, leaves a teacher with 30,000 too little to learn with.
    decay = _PENALTY / batches[TRAIN].num_nodes if settings.weight_decay is None else settings.weight_decay
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=decay)
    checkpoints = TrainingCheckpoints(
        "teacher", "teacher", f"{url}/checkpoints", config.cluster, listener, batches[TRAIN].num_steps, model,
        optimizer, num_experts=0, mesh=mesh, patience=settings.patience, token=token,
    )  # fmt: skip
    if settings.model == "gnn":
        steps = [*batches[TRAIN].epoch(config.seed, 0), *batches[VAL].epoch(config.seed, None)]
        keep_hot(store, config, steps, settings.fanout)
    checkpoints.resume()
    train(task, model, optimizer, checkpoints, settings.epochs, settings, mesh, listener)
    checkpoints.restore_best()
    if settings.calibrate:
        task.calibrate()
    return model


class _TeacherTask:
    """One rank's part of the training."""

    name = "teacher"

    def __init__(
        self,
        mesh: Mesh,
        config: Config,
        store: GraphStore,
        model: Teacher,
        training: PartBatches,
        validation: PartBatches,
    ):
        self._mesh, self._config, self._store, self._model = mesh, config, store, model
        self._training, self._validation = training, validation
        self.select = config.teacher.select

    def steps(self, epoch: int, first: int) -> Generator[Step, None, None]:
        """Each part's share is a batch of its own, whose gradients add up."""
        seed, training = self._config.seed, self._training
        steps = training.epoch(seed, epoch)[first:]
        draws = (key(seed, Word.TEACHER_TRAINING, epoch, step) for step in itertools.count(first))
        loader = self._ahead("training", steps, draws)
        with loader as batches:
            for step, shares in enumerate(steps, first):
                rows = training.global_rows(step)
                terms: dict[str, Any] = dict.fromkeys(("loss", *_COUNTS), 0.0)
                for _ in filter(len, shares):
                    sampled, label = next(batches)
                    logits = logits_of(self._model, sampled, training=True)
                    loss = F.cross_entropy(logits, label.to(self._mesh.device), reduction="sum") / rows
                    loss.backward()
                    terms["loss"] += loss.detach().double()
                    _count(sampled, terms)
                yield Step(rows, terms | {"wait_s": loader.take_wait_s()})

    def evaluate(self, epoch: int) -> Evaluation:
        """Loss and accuracy on the validation nodes of all ranks."""
        counts: dict[str, Any] = dict.fromkeys(_COUNTS, 0.0)
        loss, correct, loader = torch.zeros(()), torch.zeros(()), self._val_ahead()
        with loader as batches:
            for sampled, label in batches:
                logits, label = logits_of(self._model, sampled), label.to(self._mesh.device)
                loss = loss + F.cross_entropy(logits, label, reduction="sum").double()
                correct = correct + (logits.argmax(1) == label).sum()
                _count(sampled, counts)
        summed_loss, summed_correct = sum_figures([loss.item(), correct.item()], self._mesh)
        rows = self._validation.num_nodes
        figures = {"val_loss": summed_loss / rows, "val_accuracy": summed_correct / rows}
        return Evaluation(figures, counts | {"wait_s": loader.take_wait_s()})

    def figures(self, epoch: int, sums: dict[str, Tensor]) -> dict[str, float]:
        """`wait_s` is a worker's mean wait for batches, `cache_hit_rate` of the rows of other hosts' nodes."""
        figures = {
            "loss": sums["loss"].item() / self._training.num_steps,
            "wait_s": round(sums["wait_s"].item() / self._mesh.world_size, 3),
        }
        if sums["asked"]:
            figures["cache_hit_rate"] = (sums["hits"] / sums["asked"]).item()
        return figures

    @torch.no_grad()
    def calibrate(self) -> None:
        """Set the temperature of the logits that minimises the validation loss."""
        self._model.eval()
        with self._val_ahead() as batches:
            pairs = [(logits_of(self._model, sampled), label.to(self._mesh.device)) for sampled, label in batches]

        def loss(temperature: float) -> float:
            here = sum(F.cross_entropy(logits / temperature, label, reduction="sum").item() for logits, label in pairs)
            return sum_figures([here], self._mesh)[0]  # equal on all ranks, which therefore search alike

        self._model.temperature.fill_(best_temperature(loss))

    def _ahead(self, what: str, steps: list[list[np.ndarray]], draws: Iterable[int]) -> Prefetch[Labelled]:
        """The batches of every step's shares that have any seeds, drawn with the step's key."""
        shares = ((seeds, draw) for each, draw in zip(steps, draws, strict=False) for seeds in filter(len, each))
        jobs = (partial(self._read, seeds, draw) for seeds, draw in shares)
        return Prefetch(f"teacher: {what} batches", jobs, self._config.cluster.collective_timeout_s)

    def _read(self, seeds: np.ndarray, draw: int) -> Labelled:
        settings = self._config.teacher
        sampled: SampledRows | HopRows
        if settings.reads_hops:
            sampled = read_hops(self._store, seeds, settings.hops, draw, self._mesh.device)
        else:
            degrees = settings.conv == GCN
            sampled = read_sample(self._store, seeds, settings.fanout, draw, self._mesh.device, degrees=degrees)
        return sampled, torch.from_numpy(self._store.gather("label", seeds))

    def _val_ahead(self) -> Prefetch[Labelled]:
        # The same neighbours in every epoch: epochs are compared by this figure.
        draws: Iterator[int] = itertools.repeat(key(self._config.seed, Word.TEACHER_VALIDATION))
        return self._ahead("validation", self._validation.epoch(self._config.seed, None), draws)


def logits_of(model: Teacher, batch: SampledRows | HopRows, training: bool = False) -> Tensor:
    """Logits of a batch's nodes `[n, classes]`."""
    if isinstance(batch, HopRows):
        assert isinstance(model, HopNetwork)
        return hop_states(model, batch, training)[0]
    assert isinstance(model, Gnn)
    return states(model, batch, training)[0]


def _count(sampled: SampledRows | HopRows, terms: dict[str, Any]) -> None:
    terms["edges"] += sampled.num_edges
    terms["asked"] += sampled.asked
    terms["hits"] += sampled.hits
