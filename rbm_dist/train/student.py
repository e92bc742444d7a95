"""Students' training: on the soft labels, the RbM's experts sharded over the ranks.

A student is a row network: it never sees the graph. The RbM is first one plain network (`pretrain`); then k-means over
the inputs of each layer gives the memories, every expert starts as a copy of the plain layer, and routed training
begins. The MLP student is the first phase alone; its rivals (wider MLPs, an ensemble, the vanilla mixture of experts)
share the loop.
"""

import math
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.distill.krd import Reliability
from rbm_dist.distill.losses import Losses
from rbm_dist.graph.reach import LEARN
from rbm_dist.graph.splits import TEST, UNSEEN, VAL
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.student import DenseLayer, Ensemble, Student, make_mlp, make_moe, mlp_to_rbm
from rbm_dist.moe.dispatch import Dispatcher
from rbm_dist.moe.experts import StackedExperts
from rbm_dist.moe.memory import MemoryStore
from rbm_dist.moe.routing import memory_statistics, self_similarity_loss
from rbm_dist.moe.sparse_rows import unit
from rbm_dist.parallel.expert_layout import share_experts
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.reduce import sum_figures
from rbm_dist.parallel.training_checkpoints import TrainingCheckpoints
from rbm_dist.randomness.bits import generator, key
from rbm_dist.randomness.words import Word
from rbm_dist.train.external_teacher import TAUGHT, leaves_out
from rbm_dist.train.kmeans import kmeans_centres
from rbm_dist.train.loop import Evaluation, Listener, Step, train
from rbm_dist.train.part_batches import PartBatches
from rbm_dist.train.reliable_pairs import ReliablePairs
from rbm_dist.train.student_rows import Drawn, StudentRows

_TUNED_LR = 10  # how much lower the learning rate is of a student that is trained further


def bf16(device: torch.device, precision: str) -> torch.autocast:
    """In this block products on a GPU are in bfloat16, if `cluster.precision` says so, or leaves it to the GPU."""
    chosen = precision == "bf16" or (precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported())
    return torch.autocast(device.type, torch.bfloat16, enabled=chosen and device.type != "cpu")


class StudentTraining:
    """One student's training, on one rank. `make_memory` makes the store of the routing memory, on all ranks at once.

    `track_test` adds each epoch's accuracy on the reported nodes to the metrics; nothing is chosen by it. `token`: of
    the run's owner. `before`: a whole (unsharded) student that is trained further, as `update` says.
    """

    def __init__(
        self, mesh: Mesh, listener: Listener, config: Config, store: GraphStore, url: str, kind: str,
        make_memory: Callable[[], MemoryStore], track_test: bool = False, token: int = 0, before: Student | None = None,
    ):  # fmt: skip
        self._before = before
        if before is not None:
            assert config.update is not None
            tuned = {"lr": config.student.lr / _TUNED_LR, "epochs": config.update.epochs, "warmup_steps": 0}
            config = config.model_copy(update={"student": config.student.model_copy(update=tuned)})
        self.mesh, self.listener, self.config, self.store, self.url = mesh, listener, config, store, url
        self.kind, self.settings, self.make_memory, self.token = kind, config.student, make_memory, token
        parts = mesh.parts(store.num_parts)

        def batches_of(wanted: Callable[[np.ndarray], np.ndarray], only: str | None = None) -> PartBatches:
            return PartBatches.of(store, parts, wanted, self.settings.batch_size, only)

        left_out = [UNSEEN, VAL] if self.settings.hold_out_validation else [UNSEEN]
        taught = TAUGHT if leaves_out(config.teacher.external) else LEARN if before is not None else None
        self.batches = batches_of(lambda split: ~np.isin(split, left_out), taught)
        self.eval_batches = {"val": batches_of(lambda split: split == VAL)}
        if track_test:
            name, code = ("unseen", UNSEEN) if config.source.unseen_share else ("test", TEST)
            self.eval_batches[name] = batches_of(lambda split: split == code)
        # Stored at least in float32; a float64 default dtype (exactness tests) carries through everything.
        self.dtype = torch.get_default_dtype()
        self.width = store.width(self.settings.inputs)
        self.hidden = self.settings.hidden * (int(kind.removeprefix("mlp_x")) if kind.startswith("mlp_x") else 1)
        krd = self.settings.objective == "krd"
        self.reliability = Reliability(self.settings.krd) if krd else None
        pairs = ReliablePairs(self.settings.krd, store, self.reliability) if self.reliability else None
        timeout_s = config.cluster.collective_timeout_s
        self.rows = StudentRows(store, self.settings, mesh.device, self.dtype, timeout_s, pairs)
        self.rows.keep(self.batches.ids, *(each.ids for each in self.eval_batches.values()))
        if kind in ("rbm", "moe"):
            widths = [self.width, *[self.hidden] * (self.settings.num_layers - 1), store.num_classes]
            self.mesh = share_experts(mesh, config, list(pairwise(widths)))

    def run(self) -> list[TrainingCheckpoints]:
        """Train, or go on; gives where the best state is, of each member of an ensemble.

        Every rank calls it. Raises `Left` when the driver ordered the group to leave.
        """
        settings = self.settings
        if self._before is not None:
            return self._tune(self._before)
        if self.kind == "ensemble":
            members = [
                (f"ensemble/{member}", self._mlp(key(self.config.seed, member) % 2**31))
                for member in range(settings.ensemble_size)
            ]
            return [self._phase(name, mlp, None, settings.epochs) for name, mlp in members]
        mlp = self._mlp(self.config.seed)
        if self.kind == "moe":
            return [self._phase(self.kind, self._to_moe(mlp), None, settings.epochs)]
        if self.kind != "rbm":
            return [self._phase(self.kind, mlp, None, settings.epochs)]
        plain = self._optimizer(mlp)
        self._phase("rbm/pretrain", mlp, None, settings.pretrain_epochs, plain).restore_best()
        rbm, memory = self._to_rbm(mlp)
        routed = self._optimizer(rbm)
        carry_over(mlp, plain, rbm, routed)
        left = settings.epochs - settings.pretrain_epochs
        return [self._phase("rbm", rbm, memory, left, routed, lambda: self._initial_memories(mlp))]

    def _tune(self, before: Student) -> list[TrainingCheckpoints]:
        """Train a student further."""
        found = []
        for number, whole in enumerate(before.members if isinstance(before, Ensemble) else [before]):
            assert isinstance(whole, Student)
            model, memory = self._mlp(self.config.seed), None
            if self.kind == "rbm":
                model, memory = self._to_rbm(model)
            elif self.kind == "moe":
                model = self._to_moe(model)
            load_share(model, whole, self.mesh.local_experts(self.settings.num_experts))
            name = f"ensemble/{number}" if self.kind == "ensemble" else self.kind
            memories = partial(getattr, whole, "memories")
            found.append(self._phase(name, model, memory, self.settings.epochs, initial_memories=memories))
        return found

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
        dispatchers = self._dispatchers(mlp)
        local = mesh.local_experts(settings.num_experts)
        return make_moe(mlp, settings.num_experts, settings.top_k, self.config.seed, dispatchers, local).to(mesh.device)

    def _to_rbm(self, mlp: Student) -> tuple[Student, MemoryStore]:
        """The routed network that goes on from the plain one, and its memory, which is still all zeros."""
        settings, mesh = self.settings, self.mesh
        memories = self._zero_memories()
        dispatchers = self._dispatchers(mlp)
        rbm = mlp_to_rbm(
            mlp, memories, settings.top_k, dispatchers, len(mesh.local_experts(settings.num_experts)),
            settings.routing_temperature, settings.input_attention,
        ).to(mesh.device)  # fmt: skip
        store = self.make_memory()
        store.init(memories, None)
        return rbm, store

    def _dispatchers(self, mlp: Student) -> list[Dispatcher]:
        wire = {"auto": None, "float32": torch.float32, "bf16": torch.bfloat16}[self.config.cluster.exchange_precision]
        return [self.mesh.dispatcher(self.settings.num_experts, wire) for _ in mlp.layers]

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
        settings, mesh, ids = self.settings, self.mesh, self.batches.ids
        if self.batches.num_nodes > settings.kmeans_rows:
            draw = generator(self.config.seed, Word.KMEANS_ROWS)
            chosen = draw.choice(self.batches.num_nodes, settings.kmeans_rows, replace=False)
            ids = ids[np.isin(self.batches.positions, chosen)]
        mlp.eval()
        inputs = mlp.layer_inputs(self.rows.inputs(ids))
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
        settings, mesh = self.settings, self.mesh
        optimizer = optimizer or self._optimizer(model)
        folders = {"rbm/pretrain": "pretrain"} | {f"ensemble/{m}": f"member-{m}" for m in range(settings.ensemble_size)}
        checkpoints = TrainingCheckpoints(
            "student", name, f"{self.url}/{folders.get(name, 'checkpoints')}", self.config.cluster, self.listener,
            self.batches.num_steps, model, optimizer, settings.num_experts, mesh,
            extra=memory.snapshot if memory else None,
            restore_extra=(lambda state: memory.init(model.memories, state)) if memory else None,
            patience=settings.patience, average=settings.average, token=self.token,
        )  # fmt: skip
        if not checkpoints.resume() and memory and initial_memories:
            memory.init(initial_memories(), None)
        if self.reliability:
            history, initial = checkpoints.history, settings.krd.initial_power
            self.reliability.power = history[-1]["krd_power"] if history else initial
        task = _StudentTask(name, self, model, memory)
        train(task, model, optimizer, checkpoints, epochs, settings, mesh, self.listener)
        return checkpoints


class _StudentTask:
    """One phase of a student's training."""

    select: Literal["loss", "accuracy"] = "accuracy"

    def __init__(self, name: str, training: StudentTraining, model: Student, memory: MemoryStore | None):
        self.name, self._training, self._model, self._memory = name, training, model, memory
        self._losses = Losses(training.settings, training.mesh, training.reliability)

    def steps(self, epoch: int, first: int) -> Generator[Step, None, None]:
        training, memory, model = self._training, self._memory, self._model
        experts, count = training.settings.num_experts, training.batches.num_steps
        loader = training.rows.batches(f"student {self.name}", training.batches, self._drawn(epoch, first))
        with loader as batches:
            for version, batch in enumerate(batches, epoch * count + first):
                if memory:
                    model.set_memories(memory.pull(version))
                with bf16(training.mesh.device, training.config.cluster.precision):
                    terms, traces, more = self._losses(model, batch)
                load_E = None
                if memory:
                    statistics = [memory_statistics(trace.x_BD, trace.routing, experts) for trace in traces]
                    memory.push(version, statistics)
                    load_E = torch.stack([layer.mass_E for layer in statistics]).sum(0)
                torch.stack(list(terms.values())).sum().backward()
                means = {term: value.detach().double() / count for term, value in terms.items()}
                if memory:
                    similarity = torch.stack([self_similarity_loss(each_ED).detach() for each_ED in model.memories])
                    weight = training.settings.self_similarity / count / training.mesh.world_size
                    means["self_similarity"] = weight * similarity.double().sum()
                yield Step(batch.global_rows, means | more | {"wait_s": loader.take_wait_s()}, load_E)

    def _drawn(self, epoch: int, first: int) -> Iterator[Drawn]:
        """The epoch's steps from `first`, with their keys."""
        batches, seed = self._training.batches, self._training.config.seed
        for step, shares in list(enumerate(batches.epoch(seed, epoch)))[first:]:
            at = (*self.name.encode(), epoch * batches.num_steps + step)
            yield Drawn(step, shares, key(seed, Word.STUDENT_DROPOUT, *at), key(seed, Word.KRD_PAIRS, *at))

    def evaluate(self, epoch: int) -> Evaluation:
        """Loss and accuracy on the validation nodes; accuracy alone on others."""
        training, figures, wait_s = self._training, {}, 0.0
        if self._memory:
            self._model.set_memories(self._memory.pull((epoch + 1) * training.batches.num_steps))
        for split, of in training.eval_batches.items():
            loss = correct = torch.zeros((), dtype=torch.float64, device=training.mesh.device)
            # Every rank makes every step, with no rows if it has none: experts elsewhere wait for its message.
            loader = training.rows.labelled(f"student {self.name}", of)
            with loader as batches:
                for x_BF, label_B in batches:
                    with bf16(training.mesh.device, training.config.cluster.precision):
                        logits_BC, _ = self._model(x_BF)
                    loss = loss + F.cross_entropy(logits_BC.to(training.dtype), label_B, reduction="sum")
                    correct = correct + (logits_BC.argmax(1) == label_B).sum()
            wait_s += loader.take_wait_s()
            summed_loss, summed_correct = sum_figures([loss.item(), correct.item()], training.mesh)
            if split == "val":
                figures["val_loss"] = summed_loss / of.num_nodes
            if of.num_nodes:
                figures[f"{split}_accuracy"] = summed_correct / of.num_nodes
        return Evaluation(figures, {"wait_s": wait_s})

    def figures(self, epoch: int, sums: dict[str, Tensor]) -> dict[str, float]:
        """`loss` and its terms, `wait_s`, a worker's mean wait for batches, and what was fitted."""
        wait_s = sums.pop("wait_s").item() / self._training.mesh.world_size
        fitted = self._losses.after_epoch(epoch, sums)
        sums.pop("agreement", None)
        terms = {term: each.item() for term, each in sums.items()}
        return {"loss": math.fsum(terms.values()), **terms, **fitted, "wait_s": round(wait_s, 3)}


def load_share(model: Student, whole: Student, local: range) -> None:
    """Fill a student, of whose experts those numbered `local` are here, with the weights of a whole one."""
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, StackedExperts))
    weights = whole.state_dict()
    model.load_state_dict(
        {name: each[local.start : local.stop] if name.startswith(prefixes) else each for name, each in weights.items()}
    )


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
