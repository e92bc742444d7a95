"""Stage `teacher`: GraphSAGE on neighbour-sampled mini-batches, data parallel, chosen by validation loss."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar

from rbm_dist import storage
from rbm_dist.config import Config
from rbm_dist.distill.batches import PartBatches
from rbm_dist.errors import InputError
from rbm_dist.graph.random_bits import key
from rbm_dist.graph.source import TRAIN, VAL
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.sage import Neighbourhood, Sage, init_sage
from rbm_dist.moe.keyed_dropout import derive_keys, keyed_normal
from rbm_dist.moe.sparse_rows import Rows, dense, to_rows
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.reduce import sum_figures, sum_gradients
from rbm_dist.parallel.training_checkpoints import TrainingCheckpoints
from rbm_dist.runtime.progress import Reporter
from rbm_dist.runtime.training import run_training
from rbm_dist.serve.artifact import save_weights
from rbm_dist.stages.run import Files, Run

_TRAINING, _VALIDATION = 1, 2  # words of the random keys
_LOG_TEMPERATURES = (math.log(0.05), math.log(20))


def run_teacher(run: Run) -> Files:
    """Train the teacher; writes `<run>/teacher/model.safetensors`."""
    arguments = {"config": run.config, "graph_url": run.graph_url, "url": run.path("teacher")}
    run_training(
        "teacher", train_teacher, arguments, run.config.cluster, run.reporter, run.path("teacher", "ray_train")
    )
    return {"teacher/model.safetensors": storage.file_info(run.path("teacher", "model.safetensors"))}


def build_teacher(config: Config, store: GraphStore) -> Sage:
    """The untrained teacher of a configuration; equal on every rank."""
    teacher = config.teacher
    return init_sage(
        store.num_features, teacher.hidden, store.num_classes, len(teacher.fanout), teacher.dropout, config.seed
    )


def sample_logits(
    model: Sage, store: GraphStore, seeds: np.ndarray, fanout: tuple[int, ...], sample_key: int, training: bool
) -> torch.Tensor:
    """Logits of some nodes from their sampled neighbourhood, `[len(seeds), classes]`."""
    return sample_states(model, store, seeds, fanout, sample_key, training)[0]


def sample_states(
    model: Sage,
    store: GraphStore,
    seeds: np.ndarray,
    fanout: tuple[int, ...],
    sample_key: int,
    training: bool = False,
    noise_key: int | None = None,
) -> tuple[torch.Tensor, Rows]:
    """As `sample_logits`, and the seeds' states before the last layer. `noise_key` adds noise to all features."""
    device = next(model.parameters()).device
    sample = store.sample(seeds, fanout, sample_key)
    feat_nF = to_rows(store.inputs(sample.nodes), device, torch.float32)
    if noise_key is not None:
        feat_nF = add_noise(feat_nF, sample.nodes, noise_key)
    neighbourhood = Neighbourhood(
        torch.from_numpy(sample.nodes).to(device),
        torch.from_numpy(np.stack([sample.src, sample.dst])).to(device),
        sample.nodes_per_hop,
        sample.edges_per_hop,
    )
    return model.forward_hidden(feat_nF, neighbourhood, sample_key if training else None)


def add_noise(feat_nF: Rows, nodes: np.ndarray, noise_key: int) -> torch.Tensor:
    """Features plus unit Gaussian noise that belongs to each node, whoever asks for it."""
    feat_nF = dense(feat_nF)
    keys = derive_keys(noise_key, torch.from_numpy(nodes).to(feat_nF.device))
    return feat_nF + keyed_normal(keys, feat_nF.shape[1], feat_nF.dtype)


def train_teacher(mesh: Mesh, reporter: Reporter, config: Config, graph_url: str, url: str) -> None:
    """Train on this rank's parts, together with the other ranks. Goes on from the last checkpoint below `url`."""
    settings = config.teacher
    store = GraphStore.open(graph_url, config.teacher.sampler)
    model = build_teacher(config, store).to(mesh.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    checkpoints = TrainingCheckpoints(
        f"{url}/checkpoints", config.cluster.checkpoint_every, model, optimizer, num_experts=0, mesh=mesh,
        patience=settings.patience,
    )  # fmt: skip
    splits = [store.array("split", part) for part in range(store.num_parts)]
    train, val = (
        PartBatches([store.ids(part)[split == code] for part, split in enumerate(splits)], settings.batch_size)
        for code in (TRAIN, VAL)
    )
    parts = mesh.parts(store.num_parts)
    first = checkpoints.resume()
    if mesh.rank == 0:
        reporter.begin("teacher", checkpoints.history)
    for epoch in range(first, settings.epochs):
        if checkpoints.stopped:
            break
        model.train()
        loss_sum = 0.0
        for step, shares in enumerate(train.epoch(parts, config.seed, epoch)):
            optimizer.zero_grad()
            for seeds in shares:
                if len(seeds):
                    draw = key(config.seed, _TRAINING, epoch, step)
                    logits = sample_logits(model, store, seeds, settings.fanout, draw, training=True)
                    loss = F.cross_entropy(logits, _labels(store, seeds, mesh), reduction="sum")
                    loss = loss / train.global_rows(step)
                    loss.backward()
                    loss_sum += loss.item()
            sum_gradients(model, mesh)
            optimizer.step()
        val_loss, val_accuracy = _validate(model, store, val, parts, config, mesh)
        (loss_sum,) = sum_figures([loss_sum], mesh)
        figures = {"loss": loss_sum / train.num_steps, "val_loss": val_loss, "val_accuracy": val_accuracy}
        # By accuracy: among equals by loss, which is weighed too little to overrule one node.
        score = -val_loss if settings.select == "loss" else val_accuracy - 1e-9 * val_loss
        if not math.isfinite(figures["loss"]):
            raise InputError(
                f"teacher: the loss is not a number in epoch {epoch}; try a smaller teacher.lr than {settings.lr:g}"
            )
        row = checkpoints.after_epoch(epoch + 1 == settings.epochs, score, figures)
        if mesh.rank == 0:
            reporter.metrics("teacher", row)
            note = f"val loss {val_loss:.3f}, accuracy {val_accuracy:.1%}"
            reporter.progress("teacher", epoch + 1, settings.epochs, "epochs", note)
    checkpoints.load_best(model)
    if settings.calibrate:
        _calibrate(model, store, val, parts, config, mesh)
    if mesh.rank == 0:
        save_weights(f"{url}/model.safetensors", model)
    mesh.barrier()


@torch.no_grad()
def _calibrate(model: Sage, store: GraphStore, val: PartBatches, parts: list[int], config: Config, mesh: Mesh) -> None:
    """Set the temperature of the logits that minimises the validation loss (Guo et al., 2017)."""
    model.eval()
    logits_and_labels = [
        (
            sample_logits(model, store, seeds, config.teacher.fanout, key(config.seed, _VALIDATION), training=False),
            seeds,
        )
        for shares in val.epoch(parts, config.seed, None)
        for seeds in shares
        if len(seeds)
    ]

    def loss(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        here = sum(
            F.cross_entropy(logits / temperature, _labels(store, seeds, mesh), reduction="sum").item()
            for logits, seeds in logits_and_labels
        )
        return sum_figures([here], mesh)[0]  # equal on all ranks, which therefore search alike

    model.temperature.fill_(math.exp(minimize_scalar(loss, bounds=_LOG_TEMPERATURES, method="bounded").x))


@torch.no_grad()
def _validate(
    model: Sage, store: GraphStore, val: PartBatches, parts: list[int], config: Config, mesh: Mesh
) -> tuple[float, float]:
    model.eval()
    loss, correct = 0.0, 0.0
    for shares in val.epoch(parts, config.seed, None):
        for seeds in shares:
            if len(seeds):
                # The same neighbours in every epoch: epochs are compared by this figure.
                draw = key(config.seed, _VALIDATION)
                logits = sample_logits(model, store, seeds, config.teacher.fanout, draw, training=False)
                label = _labels(store, seeds, mesh)
                loss += F.cross_entropy(logits, label, reduction="sum").item()
                correct += (logits.argmax(1) == label).sum().item()
    loss, correct = sum_figures([loss, correct], mesh)
    rows = sum(map(len, val.nodes))
    return loss / rows, correct / rows


def _labels(store: GraphStore, ids: np.ndarray, mesh: Mesh) -> torch.Tensor:
    return torch.from_numpy(store.gather("label", ids)).to(mesh.device)
