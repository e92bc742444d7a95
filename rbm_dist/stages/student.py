"""Stage `student`: students trained on the soft labels, the RbM's experts sharded over the workers.

A student is a row network: it never sees the graph. The RbM is first one plain network (`pretrain`); then k-means over
the inputs of each layer gives the memories, every expert starts as a copy of the plain layer, and routed training
begins. The MLP student is the first phase alone; its rivals (wider MLPs, an ensemble, the vanilla mixture of experts)
share the loop.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.distill.krd import ReliableSampling
from rbm_dist.distill.losses import Batch, Losses
from rbm_dist.graph.splits import TEST, TRAIN, UNSEEN, VAL
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.student import DenseLayer, Ensemble, Student, make_mlp, make_moe, mlp_to_rbm, rbm_to_mlp
from rbm_dist.moe.memory import MemoryStore
from rbm_dist.moe.routing import memory_statistics, self_similarity_loss
from rbm_dist.moe.sparse_rows import Rows, to_rows, unit
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.reduce import sum_figures, sum_gradients
from rbm_dist.parallel.training_checkpoints import TrainingCheckpoints
from rbm_dist.randomness.bits import generator, key
from rbm_dist.randomness.rows import derive_keys
from rbm_dist.randomness.words import Word
from rbm_dist.runtime.mailbox import Reporter
from rbm_dist.runtime.memory_store import make_memory_store
from rbm_dist.runtime.shard_servers import ShardServers, open_graph
from rbm_dist.serve.accuracy import student_accuracy
from rbm_dist.serve.artifact import empty_student, save_merged, save_student
from rbm_dist.stages.run import Files, Run
from rbm_dist.stages.training import train_on_graph
from rbm_dist.train.kmeans import kmeans_centres
from rbm_dist.train.part_batches import PartBatches


def run_student(run: Run) -> Files:
    """Train every configured student; writes `<run>/student/<model>/model.{json,safetensors}`."""
    train_on_graph(run, "student", train_students)
    folders = [f"student/{kind}{below}" for kind in run.config.student.models for below in ("", "/experts")]
    names = [f"{folder}/{file}" for folder in folders for file in ("model.json", "model.safetensors")]
    return {name: storage.file_info(run.path(name)) for name in names if storage.exists(run.path(name))}


def train_students(
    mesh: Mesh, reporter: Reporter, config: Config, graph_url: str, url: str, track_test: bool = False,
    servers: ShardServers | None = None, token: int = 0,
) -> None:  # fmt: skip
    """Train the students one after the other; those that a cut-off run finished are kept.

    `track_test` adds each epoch's accuracy on the reported nodes to the metrics; nothing is chosen by it. `token`: of
    the run's owner. Raises `Left` when the driver ordered the group to leave.
    """
    store = open_graph(graph_url, config.teacher.sampler, servers)
    store.hold(mesh.parts(store.num_parts))
    for kind in config.student.models:
        if not storage.exists(f"{url}/{kind}/model.json"):
            _Training(mesh, reporter, config, store, f"{url}/{kind}", kind, track_test, token).run()
        mesh.barrier()


class _Training:
    """One student's training, on one rank."""

    def __init__(
        self, mesh: Mesh, reporter: Reporter, config: Config, store: GraphStore, url: str, kind: str, track_test: bool,
        token: int,
    ):  # fmt: skip
        self.mesh, self.reporter, self.config, self.store, self.url = mesh, reporter, config, store, url
        self.kind, self.settings, self.token = kind, config.student, token
        self.parts = mesh.parts(store.num_parts)
        splits = [store.array("split", part) for part in range(store.num_parts)]

        def batches_of(wanted: Callable[[np.ndarray], np.ndarray]) -> PartBatches:
            nodes = [store.ids(part)[wanted(split)] for part, split in enumerate(splits)]
            return PartBatches(nodes, self.settings.batch_size)

        left_out = [UNSEEN, VAL] if self.settings.hold_out_validation else [UNSEEN]
        self.batches = batches_of(lambda split: ~np.isin(split, left_out))
        self.eval_batches = {"val": batches_of(lambda split: split == VAL)}
        if track_test:
            name, code = ("unseen", UNSEEN) if config.source.unseen_share else ("test", TEST)
            self.eval_batches[name] = batches_of(lambda split: split == code)
        # Stored at least in float32; a float64 default dtype (exactness tests) carries through everything.
        self.dtype = torch.get_default_dtype()
        self.width = store.width(self.settings.inputs)
        self.hidden = self.settings.hidden * (int(kind.removeprefix("mlp_x")) if kind.startswith("mlp_x") else 1)

    def run(self) -> None:
        settings, mesh = self.settings, self.mesh
        if self.kind == "ensemble":
            members = [
                (f"ensemble/{member}", self._mlp(key(self.config.seed, member) % 2**31))
                for member in range(settings.ensemble_size)
            ]
            checkpoints = [self._phase(name, mlp, None, settings.epochs) for name, mlp in members]
        else:
            mlp = self._mlp(self.config.seed)
            if self.kind == "moe":
                checkpoints = [self._phase(self.kind, self._to_moe(mlp), None, settings.epochs)]
            elif self.kind == "rbm":
                plain = self._optimizer(mlp)
                self._phase("rbm/pretrain", mlp, None, settings.pretrain_epochs, plain).restore_best()
                rbm, memory = self._to_rbm(mlp)
                routed = self._optimizer(rbm)
                carry_over(mlp, plain, rbm, routed)
                left = settings.epochs - settings.pretrain_epochs
                checkpoints = [self._phase("rbm", rbm, memory, left, routed, lambda: self._initial_memories(mlp))]
            else:
                checkpoints = [self._phase(self.kind, mlp, None, settings.epochs)]
        if mesh.rank == 0:
            facts: dict[str, Any] = {
                "kind": "mlp" if self.kind.startswith("mlp") else self.kind, "inputs": list(settings.inputs),
                "num_features": self.width, "num_classes": self.store.num_classes,
                "hidden": self.hidden, "num_layers": settings.num_layers, "norm": settings.norm,
                "num_experts": settings.num_experts, "top_k": settings.top_k,
                "routing": settings.routing, "routing_temperature": settings.routing_temperature,
                "input_attention": settings.input_attention, "ensemble_size": settings.ensemble_size,
            }  # fmt: skip
            best = empty_student(**facts)
            for each, student in zip(checkpoints, best.members if isinstance(best, Ensemble) else [best], strict=True):
                each.load_best(student)
            (save_merged if self._experts_are_one(best) else save_student)(self.url, best, facts)

    def _experts_are_one(self, best: Student) -> bool:
        """Whether validation hardly tells an RbM from the MLP of its averaged experts."""
        tolerance = self.settings.merge_tolerance
        if not best.routed_layers or tolerance is None:
            return False
        mixture, averaged = (
            student_accuracy(each, self.store, (VAL,))["val"] or 0.0 for each in (best, rbm_to_mlp(best))
        )
        return averaged >= mixture - tolerance

    def _mlp(self, seed: int) -> Student:
        settings, store = self.settings, self.store
        mlp = make_mlp(
            self.width, self.hidden, store.num_classes, settings.num_layers, settings.norm, settings.dropout, seed
        ).to(self.mesh.device)
        self.mesh.join_batch_norms(mlp)
        return mlp

    def _to_moe(self, mlp: Student) -> Student:
        """The vanilla mixture of the MLP's shape."""
        settings, mesh = self.settings, self.mesh
        dispatchers = [mesh.dispatcher(settings.num_experts) for _ in mlp.layers]
        local = mesh.local_experts(settings.num_experts)
        return make_moe(mlp, settings.num_experts, settings.top_k, self.config.seed, dispatchers, local).to(mesh.device)

    def _to_rbm(self, mlp: Student) -> tuple[Student, MemoryStore]:
        """The routed network that goes on from the plain one, and its memory, which is still all zeros."""
        settings, mesh = self.settings, self.mesh
        memories = self._zero_memories()
        dispatchers = [mesh.dispatcher(settings.num_experts) for _ in mlp.layers]
        rbm = mlp_to_rbm(
            mlp, memories, settings.top_k, dispatchers, len(mesh.local_experts(settings.num_experts)),
            settings.routing_temperature, settings.input_attention,
        ).to(mesh.device)  # fmt: skip
        store = make_memory_store(
            self.config.cluster.memory_store, mesh, self.config.cluster.collective_timeout_s, settings.ema_decay,
            settings.self_similarity, settings.lr, settings.reseed_after,
        )  # fmt: skip
        store.init(memories, None)
        return rbm, store

    def _initial_memories(self, mlp: Student) -> list[Tensor]:
        """Per layer the centres of k-means over its normalised inputs, from a seeded sample of rows; kept in files."""
        memories = self._zero_memories()
        urls = [f"{self.url}/centres-{layer}.npy" for layer in range(len(memories))]
        kept = None
        if self.mesh.rank == 0 and all(map(storage.exists, urls)):
            kept = [np.array(storage.open_array(url)) for url in urls]
        kept = self.mesh.broadcast(kept)
        if kept is None:
            kept = self._cluster(mlp)
            if self.mesh.rank == 0:
                for url, centres_ED in zip(urls, kept, strict=True):
                    storage.write_array(url, centres_ED)
        for memory_ED, centres_ED in zip(memories, kept, strict=True):
            memory_ED.copy_(F.normalize(torch.from_numpy(centres_ED).to(memory_ED), dim=1))
        return memories

    def _cluster(self, mlp: Student) -> list[np.ndarray]:
        settings, mesh = self.settings, self.mesh
        rows = np.concatenate(self.batches.nodes)
        ids = np.concatenate([*(self.batches.nodes[part] for part in self.parts), np.empty(0, np.int64)])
        if len(rows) > settings.kmeans_rows:
            draw = generator(self.config.seed, Word.KMEANS_ROWS)
            ids = ids[np.isin(ids, draw.choice(rows, settings.kmeans_rows, replace=False))]
        mlp.eval()
        inputs = mlp.layer_inputs(self._rows(ids.astype(np.int64)))
        routed = inputs if settings.routing == "layers" else inputs[:1]
        return [kmeans_centres(unit(x_BD), ids, settings.num_experts, self.config.seed, mesh) for x_BD in routed]

    def _zero_memories(self) -> list[Tensor]:
        settings = self.settings
        later = settings.num_layers - 1 if settings.routing == "layers" else 0
        widths = [self.width, *[self.hidden] * later]
        return [torch.zeros(settings.num_experts, width, device=self.mesh.device) for width in widths]

    def _optimizer(self, model: Student) -> torch.optim.Adam:
        return torch.optim.Adam(model.parameters(), lr=self.settings.lr, weight_decay=self.settings.weight_decay)

    def _phase(
        self, name: str, model: Student, memory: MemoryStore | None, epochs: int,
        optimizer: torch.optim.Adam | None = None, initial_memories: Callable[[], list[Tensor]] | None = None,
    ) -> TrainingCheckpoints:  # fmt: skip
        """Train for some epochs; goes on from the phase's last checkpoint.

        `initial_memories` is asked for if there is none: k-means is a long wait.
        """
        settings, mesh, steps = self.settings, self.mesh, self.batches.num_steps
        optimizer = optimizer or self._optimizer(model)
        folders = {"rbm/pretrain": "pretrain"} | {f"ensemble/{m}": f"member-{m}" for m in range(settings.ensemble_size)}
        checkpoints = TrainingCheckpoints(
            "student", name, f"{self.url}/{folders.get(name, 'checkpoints')}", self.config.cluster, self.reporter,
            steps, model, optimizer, settings.num_experts, mesh,
            extra=memory.snapshot if memory else None,
            restore_extra=(lambda state: memory.init(model.memories, state)) if memory else None,
            patience=settings.patience, average=settings.average, token=self.token,
        )  # fmt: skip
        if not checkpoints.resume() and memory and initial_memories:
            memory.init(initial_memories(), None)
        teaching = None
        if settings.objective == "krd":
            power = checkpoints.history[-1]["krd_power"] if checkpoints.history else None
            teaching = ReliableSampling(settings.krd, self.store, power)
        losses = Losses(self.config, self.store, mesh, teaching, self.dtype)
        if mesh.rank == 0:
            self.reporter.begin(name, checkpoints.history)
        for epoch, first in checkpoints.epochs(epochs):
            sums = self._epoch(name, epoch, first, model, memory, optimizer, losses, checkpoints)
            done = epoch + 1
            if memory:
                model.set_memories(memory.pull(done * steps))
            agreement = sums.pop("agreement", None)
            figures = {term: each.item() for term, each in sums.items()}
            figures = {"loss": math.fsum(figures.values()), **figures} | losses.after_epoch(epoch, agreement)
            with checkpoints.averaged():
                figures |= self._evaluate(model)
            # By accuracy; among equals by loss, which is weighed too little to overrule one node.
            score = figures["val_accuracy"] - 1e-9 * figures["val_loss"]
            row = checkpoints.after_epoch(score, figures)
            if mesh.rank == 0:
                self.reporter.metrics(name, row)
                note = f"loss {figures['loss']:.3f}, val accuracy {figures['val_accuracy']:.1%}"
                self.reporter.progress(name, done, epochs, "epochs", note)
        if mesh.rank == 0:
            self.reporter.end(name, checkpoints.history)
        return checkpoints

    def _epoch(
        self, name: str, epoch: int, first: int, model: Student, memory: MemoryStore | None,
        optimizer: torch.optim.Adam, losses: Losses, checkpoints: TrainingCheckpoints,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The epoch's steps from `first`; gives the sums over all of them."""
        settings, mesh, steps = self.settings, self.mesh, self.batches.num_steps
        model.train()
        for step, shares in enumerate(self.batches.epoch(self.parts, self.config.seed, epoch)[first:], first):
            version, load_E = epoch * steps + step, None
            batch = self._batch(shares, step, key(self.config.seed, Word.STUDENT_DROPOUT, *name.encode(), version))
            if memory:
                model.set_memories(memory.pull(version))
            terms, traces = losses(model, batch, key(self.config.seed, Word.KRD_PAIRS, *name.encode(), version))
            if memory:
                statistics = [memory_statistics(trace.x_BD, trace.routing, settings.num_experts) for trace in traces]
                memory.push(version, statistics)
                load_E = torch.stack([layer.mass_E for layer in statistics]).sum(0)
            optimizer.zero_grad()
            torch.stack(list(terms.values())).sum().backward()
            sum_gradients(model, mesh)
            optimizer.step()
            means = {term: value.detach().double() / steps for term, value in terms.items()}
            if memory:
                similarity = torch.stack([self_similarity_loss(memory_ED).detach() for memory_ED in model.memories])
                means["self_similarity"] = (
                    settings.self_similarity * similarity.double().sum() / steps / mesh.world_size
                )
            checkpoints.after_step(batch.global_rows, means | losses.take_agreement(), load_E)
        return checkpoints.epoch_sums()

    def _batch(self, shares: list[np.ndarray], step: int, draw: int) -> Batch:
        ids = np.concatenate([*shares, np.empty(0, np.int64)]).astype(np.int64)
        store, device = self.store, self.mesh.device
        label, split = store.gather("label", ids), store.gather("split", ids)
        label_B = torch.from_numpy(np.where(split == TRAIN, label, -1)).to(device)
        labelled = float((label_B >= 0).sum())
        if self.settings.label_weight > 0:
            (labelled,) = sum_figures([labelled], self.mesh)
        return Batch(
            ids=ids,
            x_BF=self._rows(ids),
            label_B=label_B,
            key_B=derive_keys(draw, torch.from_numpy(ids)).to(device),
            global_rows=self.batches.global_rows(step),
            global_labelled=int(labelled),
        )

    @torch.no_grad()
    def _evaluate(self, model: Student) -> dict[str, float]:
        """Loss and accuracy on the validation nodes; accuracy alone on others."""
        model.eval()
        figures = {}
        for split, batches in self.eval_batches.items():
            loss, correct = 0.0, 0.0
            # Every rank makes every step, with no rows if it has none: experts elsewhere wait for its message.
            for shares in batches.epoch(self.parts, self.config.seed, None):
                ids = np.concatenate([*shares, np.empty(0, np.int64)]).astype(np.int64)
                logits_BC, _ = model(self._rows(ids))
                label_B = torch.from_numpy(self.store.gather("label", ids)).to(self.mesh.device)
                loss += F.cross_entropy(logits_BC, label_B, reduction="sum").item()
                correct += (logits_BC.argmax(1) == label_B).sum().item()
            loss, correct = sum_figures([loss, correct], self.mesh)
            rows = sum(map(len, batches.nodes))
            if split == "val":
                figures["val_loss"] = loss / rows
            if rows:
                figures[f"{split}_accuracy"] = correct / rows
        return figures

    def _rows(self, ids: np.ndarray) -> Rows:
        return to_rows(self.store.inputs(ids, self.settings.inputs), self.mesh.device, self.dtype)


def carry_over(mlp: Student, plain: torch.optim.Adam, rbm: Student, routed: torch.optim.Adam) -> None:
    """Give the experts the Adam moments of the layers that they are copies of.

    A fresh Adam moves every weight by the learning rate in its first steps, which undoes what was learned before.
    """
    pairs: list[tuple[Tensor, Tensor]] = list(zip(mlp.norms.parameters(), rbm.norms.parameters(), strict=True))
    for dense, layer in zip(mlp.layers, rbm.routed_layers, strict=True):
        assert isinstance(dense, DenseLayer)
        pairs += [(dense.linear.weight, layer.experts.weight_LDO), (dense.linear.bias, layer.experts.bias_LO)]
    for before, after in pairs:
        state = plain.state[before]
        routed.state[after] = {"step": state["step"].clone()} | {
            name: torch.empty_like(after).copy_(state[name].T if before.dim() == 2 else state[name])
            for name in ("exp_avg", "exp_avg_sq")
        }
