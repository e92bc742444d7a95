"""Students, batches and steps of training, for the benchmarks that measure them."""

import torch
from torch import Tensor

from rbm_dist.config.run import Config, StudentConfig
from rbm_dist.distill.losses import Batch, Losses
from rbm_dist.models.student import Student, Trace, make_mlp, mlp_to_rbm
from rbm_dist.moe.memory import InProcessMemoryStore
from rbm_dist.moe.routing import memory_statistics
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.reduce import sum_gradients
from rbm_dist.train.student import bf16

CPU = torch.device("cpu")


def settings_of(**student: object) -> StudentConfig:
    return Config.model_validate({"run_dir": "-", "student": student}).student


def rbm_of(
    widths: tuple[int, ...], experts: int, k: int = 1, routing: str = "input", device: torch.device = CPU
) -> Student:
    """An RbM whose layers have these widths, the inner ones equal, with dropout 0.1."""
    rng = torch.Generator().manual_seed(0)
    memories = [torch.randn(experts, d, generator=rng) for d in (widths[:-1] if routing == "layers" else widths[:1])]
    mlp = make_mlp(widths[0], widths[1], widths[-1], len(widths) - 1, "layer", 0.1, 0)
    return mlp_to_rbm(mlp, memories, k).to(device).train()


def batch_of(rows: int, width: int, classes: int, mesh: Mesh) -> Batch:
    """Random rows of one rank."""
    rng = torch.Generator().manual_seed(mesh.rank)
    x_BF, soft_BC = (torch.randn(rows, each, generator=rng).to(mesh.device) for each in (width, classes))
    index_B = torch.arange(rows, device=mesh.device)
    return Batch(x_BF, torch.full_like(index_B, -1), index_B, soft_BC.softmax(1), rows * mesh.world_size)


class Step:
    """A step of a student on a batch: forward, losses, backward, sums over ranks, Adam. Gives what its layers saw."""

    def __init__(self, student: Student, settings: StudentConfig, mesh: Mesh, precision: str = "auto"):
        self._student, self._mesh, self._precision = student, mesh, precision
        self._losses, self._optimizer = Losses(settings, mesh), torch.optim.Adam(student.parameters())

    def __call__(self, batch: Batch) -> list[Trace]:
        with bf16(self._mesh.device, self._precision):
            terms, traces, _ = self._losses(self._student, batch)
        total: Tensor = torch.stack(list(terms.values())).sum()
        total.backward()
        sum_gradients(self._student, self._mesh)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return traces


class Memory:
    """What a step does for the routing memory, which is kept in each rank."""

    def __init__(self, student: Student, settings: StudentConfig, mesh: Mesh):
        self._student, self._version = student, 0
        self._store = InProcessMemoryStore(mesh.world_group, settings.ema_decay, settings.self_similarity, settings.lr)
        self._store.init(student.memories, None)

    def __call__(self, traces: list[Trace]) -> None:
        experts = len(self._student.memories[0])
        self._store.push(self._version, [memory_statistics(each.x_BD, each.routing, experts) for each in traces])
        self._version += 1
        self._student.set_memories(self._store.pull(self._version))
