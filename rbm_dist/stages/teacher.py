"""Stage `teacher`: GraphSAGE on neighbour-sampled mini-batches, data parallel, chosen by validation loss."""

import numpy as np
import torch
import torch.nn.functional as F

from rbm_dist import storage
from rbm_dist.config import Config
from rbm_dist.distill.batches import PartBatches
from rbm_dist.graph.random_bits import key
from rbm_dist.graph.source import TRAIN, VAL
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.sage import Neighbourhood, Sage, init_sage
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.reduce import sum_figures, sum_gradients
from rbm_dist.parallel.training_checkpoints import TrainingCheckpoints
from rbm_dist.runtime.progress import Reporter
from rbm_dist.runtime.training import run_training
from rbm_dist.serve.artifact import save_weights
from rbm_dist.stages.run import Files, Run

_TRAINING, _VALIDATION = 1, 2  # words of the random keys


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
    device = next(model.parameters()).device
    sample = store.sample(seeds, fanout, sample_key)
    feat_nF = torch.from_numpy(store.gather("feat", sample.nodes)).to(device)
    neighbourhood = Neighbourhood(
        torch.from_numpy(sample.nodes).to(device),
        torch.from_numpy(np.stack([sample.src, sample.dst])).to(device),
        sample.nodes_per_hop,
        sample.edges_per_hop,
    )
    return model(feat_nF, neighbourhood, sample_key if training else None)


def train_teacher(mesh: Mesh, reporter: Reporter, config: Config, graph_url: str, url: str) -> None:
    """Train on this rank's parts, together with the other ranks. Goes on from the last checkpoint below `url`."""
    settings = config.teacher
    store = GraphStore.open(graph_url, config.teacher.sampler)
    model = build_teacher(config, store).to(mesh.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    checkpoints = TrainingCheckpoints(
        f"{url}/checkpoints", config.cluster.checkpoint_every, model, optimizer, num_experts=0, mesh=mesh
    )
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
        row = checkpoints.after_epoch(epoch + 1 == settings.epochs, score=-val_loss, figures=figures)
        if mesh.rank == 0:
            reporter.metrics("teacher", row)
            note = f"val loss {val_loss:.3f}, accuracy {val_accuracy:.1%}"
            reporter.progress("teacher", epoch + 1, settings.epochs, "epochs", note)
    if mesh.rank == 0:
        checkpoints.load_best(model)
        save_weights(f"{url}/model.safetensors", model)
    mesh.barrier()


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
