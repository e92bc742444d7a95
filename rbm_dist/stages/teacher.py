"""Stage `teacher`: GraphSAGE on neighbour-sampled mini-batches, data parallel, chosen by validation loss."""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.graph.loader import Prefetch
from rbm_dist.graph.splits import TRAIN, VAL
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.sage import Sage, init_sage
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.reduce import sum_figures, sum_gradients
from rbm_dist.parallel.training_checkpoints import TrainingCheckpoints
from rbm_dist.randomness.bits import key
from rbm_dist.randomness.words import Word
from rbm_dist.runtime.mailbox import Reporter
from rbm_dist.runtime.shard_servers import ShardServers, open_graph
from rbm_dist.serve.artifact import save_weights
from rbm_dist.stages.run import Files, Run
from rbm_dist.stages.training import train_on_graph
from rbm_dist.train.part_batches import PartBatches
from rbm_dist.train.sampled_rows import SampledRows, keep_hot, read_sample, states

_PENALTY = 0.3  # of the summed loss: times half the weights' square
_COUNTS = ("edges", "asked", "hits")  # of what is read; the latter two as in `SampledRows`
_LOG_TEMPERATURES = (math.log(0.05), math.log(20))


def run_teacher(run: Run) -> Files:
    """Train the teacher; writes `<run>/teacher/model.safetensors`."""
    train_on_graph(run, "teacher", train_teacher)
    return {"teacher/model.safetensors": storage.file_info(run.path("teacher", "model.safetensors"))}


def build_teacher(config: Config, store: GraphStore) -> Sage:
    """The untrained teacher of a configuration; equal on every rank."""
    teacher = config.teacher
    return init_sage(
        store.num_features, teacher.hidden, store.num_classes, len(teacher.fanout), teacher.dropout, config.seed,
        teacher.norm,
    )  # fmt: skip


Labelled = tuple[SampledRows, torch.Tensor]
"""Some seeds and their labels `[seeds]`."""


def train_teacher(
    mesh: Mesh, reporter: Reporter, config: Config, graph_url: str, url: str, servers: ShardServers | None = None,
    token: int = 0,
) -> None:  # fmt: skip
    """Train on this rank's parts, together with the other ranks. Goes on from the last checkpoint below `url`.

    `token`: of the run's owner. Raises `Left` when the driver ordered the group to leave.
    """
    settings = config.teacher
    store = open_graph(graph_url, config.teacher.sampler, servers)
    model = build_teacher(config, store).to(mesh.device)
    splits = [store.array("split", part) for part in range(store.num_parts)]
    train, val = (
        PartBatches([store.ids(part)[split == code] for part, split in enumerate(splits)], settings.batch_size)
        for code in (TRAIN, VAL)
    )
    # The loss is a mean: a fixed decay, right for 140 labels, leaves a teacher with 30,000 too little to learn with.
    decay = _PENALTY / sum(map(len, train.nodes)) if settings.weight_decay is None else settings.weight_decay
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=decay)
    checkpoints = TrainingCheckpoints(
        "teacher", "teacher", f"{url}/checkpoints", config.cluster, reporter, train.num_steps, model, optimizer,
        num_experts=0, mesh=mesh, patience=settings.patience, token=token,
    )  # fmt: skip
    parts = mesh.parts(store.num_parts)
    store.hold(parts)
    steps = [*train.epoch(parts, config.seed, 0), *val.epoch(parts, config.seed, None)]
    keep_hot(store, config, steps, config.teacher.fanout)
    checkpoints.resume()
    if mesh.rank == 0:
        reporter.begin("teacher", checkpoints.history)
    for epoch, first in checkpoints.epochs(settings.epochs):
        model.train()
        steps = train.epoch(parts, config.seed, epoch)[first:]
        draws = (key(config.seed, Word.TEACHER_TRAINING, epoch, step) for step in itertools.count(first))
        loader = _ahead("training", store, steps, draws, config, mesh)
        with loader as batches:
            for step, shares in enumerate(steps, first):
                optimizer.zero_grad()
                terms: dict[str, Any] = dict.fromkeys(("loss", *_COUNTS), 0.0)
                for _ in filter(len, shares):
                    sampled, label = next(batches)
                    logits, _ = states(model, sampled, training=True)
                    loss = F.cross_entropy(logits, label.to(mesh.device), reduction="sum")
                    loss = loss / train.global_rows(step)
                    loss.backward()
                    terms["loss"] += loss.detach().double()
                    _count(sampled, terms)
                sum_gradients(model, mesh)
                optimizer.step()
                checkpoints.after_step(train.global_rows(step), terms | {"wait_s": loader.take_wait_s()})
        counts: dict[str, Any] = dict.fromkeys(_COUNTS, 0.0)
        val_loader = _val_ahead(store, val, parts, config, mesh)
        with val_loader as batches:
            val_loss, val_accuracy = _validate(model, batches, sum(map(len, val.nodes)), mesh, counts)
        sums = checkpoints.epoch_sums(counts | {"wait_s": val_loader.take_wait_s()})
        figures = {
            "loss": sums["loss"].item() / train.num_steps, "val_loss": val_loss, "val_accuracy": val_accuracy,
            "wait_s": round(sums["wait_s"].item() / mesh.world_size, 3),  # a worker's mean wait for batches
        }  # fmt: skip
        if sums["asked"]:
            figures["cache_hit_rate"] = (sums["hits"] / sums["asked"]).item()  # of the rows of other hosts' nodes
        # By accuracy: among equals by loss, which is weighed too little to overrule one node.
        score = -val_loss if settings.select == "loss" else val_accuracy - 1e-9 * val_loss
        row = checkpoints.after_epoch(score, figures)
        if mesh.rank == 0:
            reporter.metrics("teacher", row)
            note = f"val loss {val_loss:.3f}, accuracy {val_accuracy:.1%}"
            reporter.progress("teacher", epoch + 1, settings.epochs, "epochs", note)
    if mesh.rank == 0:
        reporter.end("teacher", checkpoints.history)
    checkpoints.restore_best()
    if settings.calibrate:
        with _val_ahead(store, val, parts, config, mesh) as batches:
            _calibrate(model, batches, mesh)
    if mesh.rank == 0:
        save_weights(f"{url}/model.safetensors", model)
    mesh.barrier()


def _ahead(
    what: str, store: GraphStore, steps: list[list[np.ndarray]], draws: Iterable[int], config: Config, mesh: Mesh
) -> Prefetch[Labelled]:
    """The batches of every step's shares that have any seeds, drawn with the step's key."""

    def read(seeds: np.ndarray, draw: int) -> Labelled:
        sampled = read_sample(store, seeds, config.teacher.fanout, draw, mesh.device)
        return sampled, torch.from_numpy(store.gather("label", seeds))

    jobs = (
        functools.partial(read, seeds, draw)
        for shares, draw in zip(steps, draws, strict=False)
        for seeds in filter(len, shares)
    )
    return Prefetch(f"teacher: {what} batches", jobs, config.cluster.collective_timeout_s)


def _val_ahead(store: GraphStore, val: PartBatches, parts: list[int], config: Config, mesh: Mesh) -> Prefetch[Labelled]:
    # The same neighbours in every epoch: epochs are compared by this figure.
    draws = itertools.repeat(key(config.seed, Word.TEACHER_VALIDATION))
    return _ahead("validation", store, val.epoch(parts, config.seed, None), draws, config, mesh)


@torch.no_grad()
def _calibrate(model: Sage, val_batches: Iterator[Labelled], mesh: Mesh) -> None:
    """Set the temperature of the logits that minimises the validation loss (Guo et al., 2017)."""
    model.eval()
    logits_and_labels = [(states(model, sampled)[0], label.to(mesh.device)) for sampled, label in val_batches]

    def loss(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        here = sum(
            F.cross_entropy(logits / temperature, label, reduction="sum").item() for logits, label in logits_and_labels
        )
        return sum_figures([here], mesh)[0]  # equal on all ranks, which therefore search alike

    model.temperature.fill_(math.exp(minimize_scalar(loss, bounds=_LOG_TEMPERATURES, method="bounded").x))


@torch.no_grad()
def _validate(
    model: Sage, val_batches: Iterator[Labelled], rows: int, mesh: Mesh, terms: dict[str, Any]
) -> tuple[float, float]:
    """Loss and accuracy over the `rows` validation nodes of all ranks; what was read is counted in `terms`."""
    model.eval()
    loss, correct = 0.0, 0.0
    for sampled, label in val_batches:
        logits, label = states(model, sampled)[0], label.to(mesh.device)
        loss += F.cross_entropy(logits, label, reduction="sum").item()
        correct += (logits.argmax(1) == label).sum().item()
        _count(sampled, terms)
    loss, correct = sum_figures([loss, correct], mesh)
    return loss / rows, correct / rows


def _count(sampled: SampledRows, terms: dict[str, Any]) -> None:
    terms["edges"] += sampled.neighbourhood.edge_2m.shape[1]
    terms["asked"] += sampled.asked
    terms["hits"] += sampled.hits
