"""Stage `student`: students trained on the soft labels, the RbM's experts sharded over the workers.

A student is a row network: it never sees the graph. The RbM is first one plain network (`pretrain`); then k-means over
the inputs of each layer gives the memories, every expert starts as a copy of the plain layer, and routed training
begins. The MLP student is the first phase alone.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rbm_dist import storage
from rbm_dist.config import Config
from rbm_dist.distill.batches import PartBatches
from rbm_dist.distill.kd import kd_loss
from rbm_dist.graph.random_bits import generator, key
from rbm_dist.graph.source import TRAIN, VAL
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.student import Student, make_mlp, mlp_to_rbm
from rbm_dist.moe.keyed_dropout import derive_keys
from rbm_dist.moe.memory import MemoryStore
from rbm_dist.moe.routing import commitment_loss, load_balance_loss, memory_statistics, self_similarity_loss
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.reduce import sum_figures, sum_gradients
from rbm_dist.parallel.training_checkpoints import TrainingCheckpoints
from rbm_dist.runtime.memory_store import make_memory_store
from rbm_dist.runtime.progress import Reporter
from rbm_dist.runtime.training import run_training
from rbm_dist.serve.artifact import empty_student, save_student
from rbm_dist.stages.run import Files, Run

_KMEANS, _DROPOUT = 5, 6  # words of the random keys
_KMEANS_STARTS = 10


def run_student(run: Run) -> Files:
    """Train every configured student; writes `<run>/student/<model>/model.{json,safetensors}`."""
    arguments = {"config": run.config, "graph_url": run.graph_url, "url": run.path("student")}
    run_training(
        "student", train_students, arguments, run.config.cluster, run.reporter, run.path("student", "ray_train")
    )
    names = [
        f"student/{kind}/{file}" for kind in run.config.student.models for file in ("model.json", "model.safetensors")
    ]
    return {name: storage.file_info(run.path(name)) for name in names}


def train_students(mesh: Mesh, reporter: Reporter, config: Config, graph_url: str, url: str) -> None:
    """Train the students one after the other; those that a cut-off run finished are kept."""
    store = GraphStore.open(graph_url)
    for kind in config.student.models:
        if not storage.exists(f"{url}/{kind}/model.json"):
            _Training(mesh, reporter, config, store, f"{url}/{kind}", kind).run()
        mesh.barrier()


@dataclass(frozen=True)
class _Batch:
    """The rows that this rank's parts give to one step, and counts over all ranks."""

    x_BF: Tensor
    soft_BC: Tensor
    label_B: Tensor  # -1 where the node is not a training node
    key_B: Tensor
    global_rows: int
    global_labelled: int


class _Training:
    """One student's training, on one rank."""

    def __init__(self, mesh: Mesh, reporter: Reporter, config: Config, store: GraphStore, url: str, kind: str):
        self.mesh, self.reporter, self.config, self.store, self.url = mesh, reporter, config, store, url
        self.kind, self.settings = kind, config.student
        self.parts = mesh.parts(store.num_parts)
        splits = [store.array("split", part) for part in range(store.num_parts)]
        every = [store.ids(part) for part in range(store.num_parts)]
        val = [ids[split == VAL] for ids, split in zip(every, splits, strict=True)]
        self.batches = PartBatches(every, self.settings.batch_size)
        self.val_batches = PartBatches(val, self.settings.batch_size)
        # Stored at least in float32; a float64 default dtype (exactness tests) carries through everything.
        self.dtype = torch.get_default_dtype()

    def run(self) -> None:
        settings, store, mesh = self.settings, self.store, self.mesh
        mlp = make_mlp(
            store.num_features, settings.hidden, store.num_classes, settings.num_layers, settings.norm,
            settings.dropout, self.config.seed,
        ).to(mesh.device)  # fmt: skip
        mesh.join_batch_norms(mlp)
        if self.kind == "mlp":
            checkpoints = self._phase("mlp", mlp, None, settings.epochs)
        else:
            self._phase("rbm/pretrain", mlp, None, settings.pretrain_epochs)
            rbm, memory = self._to_rbm(mlp)
            checkpoints = self._phase("rbm", rbm, memory, settings.epochs - settings.pretrain_epochs)
        if mesh.rank == 0:
            facts: dict[str, Any] = {
                "kind": self.kind, "num_features": store.num_features, "num_classes": store.num_classes,
                "hidden": settings.hidden, "num_layers": settings.num_layers, "norm": settings.norm,
                "num_experts": settings.num_experts, "top_k": settings.top_k,
            }  # fmt: skip
            best = empty_student(**facts)
            checkpoints.load_best(best)
            save_student(self.url, best, facts)

    def _to_rbm(self, mlp: Student) -> tuple[Student, MemoryStore]:
        """The routed network that goes on from the plain one, and its memory."""
        settings, mesh = self.settings, self.mesh
        memories = self._initial_memories(mlp)
        dispatchers = [mesh.dispatcher(settings.num_experts) for _ in memories]
        local = mesh.num_local_experts(settings.num_experts)
        rbm = mlp_to_rbm(mlp, memories, settings.top_k, dispatchers, local).to(mesh.device)
        store = make_memory_store(
            self.config.cluster.memory_store, mesh, settings.ema_decay, settings.self_similarity, settings.lr,
            self.config.cluster.timeout_s,
        )  # fmt: skip
        store.init(memories, None)
        return rbm, store

    def _initial_memories(self, mlp: Student) -> list[Tensor]:
        """Per layer the centres of k-means over its normalised inputs, from a seeded sample of rows; on rank 0."""
        settings, store, mesh = self.settings, self.store, self.mesh
        mlp.eval()
        widths = [store.num_features, *[settings.hidden] * (settings.num_layers - 1)]
        memories = [torch.zeros(settings.num_experts, width, device=mesh.device) for width in widths]
        if mesh.rank == 0:
            rows = np.arange(store.num_nodes)
            if len(rows) > settings.kmeans_rows:
                draw = generator(self.config.seed, _KMEANS)
                rows = np.sort(draw.choice(store.num_nodes, settings.kmeans_rows, replace=False))
            inputs = mlp.layer_inputs(self._to(store.gather("feat", rows)))
            for memory_ED, x_BD in zip(memories, inputs, strict=True):
                unit_BD = F.normalize(x_BD, dim=1).cpu().numpy()
                centres = _centres(unit_BD, settings.num_experts, self.config.seed)
                memory_ED.copy_(F.normalize(torch.from_numpy(centres), dim=1))
        if mesh.world_group is not None:
            for memory in memories:
                dist.broadcast(memory, src=0, group=mesh.world_group)
        return memories

    def _phase(self, name: str, model: Student, memory: MemoryStore | None, epochs: int) -> TrainingCheckpoints:
        """Train for some epochs; goes on from the phase's last checkpoint."""
        settings, mesh, steps = self.settings, self.mesh, self.batches.num_steps
        optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        done = 0
        checkpoints = TrainingCheckpoints(
            f"{self.url}/{'pretrain' if name.endswith('pretrain') else 'checkpoints'}",
            self.config.cluster.checkpoint_every, model, optimizer, settings.num_experts, mesh,
            extra=(lambda: memory.snapshot(done * steps)) if memory else None,
            restore_extra=(lambda state: memory.init(model_memories(model), state)) if memory else None,
        )  # fmt: skip
        first = done = checkpoints.resume()
        if mesh.rank == 0:
            self.reporter.begin(name, checkpoints.history)
        for epoch in range(first, epochs):
            figures = self._epoch(name, epoch, model, memory, optimizer)
            done = epoch + 1
            if memory:
                model.set_memories(memory.pull(done * steps))
            val_loss, val_accuracy = self._validate(model)
            figures |= {"val_loss": val_loss, "val_accuracy": val_accuracy}
            # By accuracy; among equals by loss, which is weighed too little to overrule one node.
            score = val_accuracy - 1e-9 * val_loss
            row = checkpoints.after_epoch(done == epochs, score, figures)
            if mesh.rank == 0:
                self.reporter.metrics(name, row)
                note = f"loss {figures['loss']:.3f}, val accuracy {val_accuracy:.1%}"
                self.reporter.progress(name, done, epochs, "epochs", note)
        return checkpoints

    def _epoch(
        self, name: str, epoch: int, model: Student, memory: MemoryStore | None, optimizer: torch.optim.Adam
    ) -> dict[str, float]:
        settings, mesh, steps = self.settings, self.mesh, self.batches.num_steps
        sums: dict[str, float] = {}
        model.train()
        for step, shares in enumerate(self.batches.epoch(self.parts, self.config.seed, epoch)):
            version = epoch * steps + step
            batch = self._batch(shares, step, key(self.config.seed, _DROPOUT, *name.encode(), version))
            if memory:
                model.set_memories(memory.pull(version))
            logits_BC, traces = model(batch.x_BF, batch.key_B)
            losses = {
                "kd": kd_loss(
                    logits_BC, batch.soft_BC, batch.label_B, batch.global_rows, batch.global_labelled,
                    settings.temperature, settings.label_weight,
                )
            }  # fmt: skip
            experts = settings.num_experts
            for trace in traces:
                balance = load_balance_loss(trace.routing, experts, mesh.world_group) / mesh.world_size
                commitment = commitment_loss(trace.routing, batch.global_rows)
                losses["commitment"] = losses.get("commitment", 0.0) + settings.commitment * commitment
                losses["load_balance"] = losses.get("load_balance", 0.0) + settings.load_balance * balance
            if memory:
                memory.push(version, [memory_statistics(trace.x_BD, trace.routing, experts) for trace in traces])
            loss = torch.stack(list(losses.values())).sum()
            optimizer.zero_grad()
            loss.backward()
            sum_gradients(model, mesh)
            optimizer.step()
            for loss_name, value in losses.items():
                sums[loss_name] = sums.get(loss_name, 0.0) + value.item() / steps
            if memory:
                similarity = sum(self_similarity_loss(layer.memory_ED).item() for layer in model.routed_layers)
                share = settings.self_similarity * similarity / steps / mesh.world_size
                sums["self_similarity"] = sums.get("self_similarity", 0.0) + share
        means = dict(zip(sums, sum_figures(list(sums.values()), mesh), strict=True))
        return {"loss": sum(means.values()), **means}

    def _batch(self, shares: list[np.ndarray], step: int, draw: int) -> _Batch:
        ids = np.concatenate([*shares, np.empty(0, np.int64)]).astype(np.int64)
        store, device = self.store, self.mesh.device
        label, split = store.gather("label", ids), store.gather("split", ids)
        label_B = torch.from_numpy(np.where(split == TRAIN, label, -1)).to(device)
        labelled = float((label_B >= 0).sum())
        if self.settings.label_weight > 0:
            (labelled,) = sum_figures([labelled], self.mesh)
        return _Batch(
            x_BF=self._to(store.gather("feat", ids)),
            soft_BC=self._to(store.gather("soft", ids)),
            label_B=label_B,
            key_B=derive_keys(draw, torch.from_numpy(ids)).to(device),
            global_rows=self.batches.global_rows(step),
            global_labelled=int(labelled),
        )

    @torch.no_grad()
    def _validate(self, model: Student) -> tuple[float, float]:
        model.eval()
        loss, correct = 0.0, 0.0
        # Every rank makes every step, with no rows if it has none: experts elsewhere wait for its message.
        for shares in self.val_batches.epoch(self.parts, self.config.seed, None):
            ids = np.concatenate([*shares, np.empty(0, np.int64)]).astype(np.int64)
            logits_BC, _ = model(self._to(self.store.gather("feat", ids)))
            label_B = torch.from_numpy(self.store.gather("label", ids)).to(self.mesh.device)
            loss += F.cross_entropy(logits_BC, label_B, reduction="sum").item()
            correct += (logits_BC.argmax(1) == label_B).sum().item()
        loss, correct = sum_figures([loss, correct], self.mesh)
        rows = sum(map(len, self.val_batches.nodes))
        return loss / rows, correct / rows

    def _to(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.mesh.device, self.dtype)


def model_memories(model: Student) -> list[Tensor]:
    """The memories that a model routes with."""
    return [layer.memory_ED for layer in model.routed_layers]


def _centres(unit_BD: np.ndarray, num_experts: int, seed: int) -> np.ndarray:
    """k-means centres, `[E, D]`. Fewer distinct rows than experts: the rows there are, again and again."""
    from sklearn.cluster import KMeans  # takes seconds to import, and one rank needs it

    distinct = np.unique(unit_BD, axis=0) if len(unit_BD) <= num_experts * 100 else unit_BD
    if len(distinct) <= num_experts:
        return distinct[np.arange(num_experts) % len(distinct)]
    return KMeans(num_experts, n_init=_KMEANS_STARTS, random_state=seed).fit(unit_BD).cluster_centers_
