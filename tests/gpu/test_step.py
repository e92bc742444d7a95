"""A step of training and an evaluation of every student and of the teacher on a GPU: devices, types, and no waiting."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rbm_dist.config.run import Config
from rbm_dist.distill.krd import Pairs, Reliability
from rbm_dist.distill.losses import Batch, Losses
from rbm_dist.models.gnn import Gnn, Neighbourhood, seeded
from rbm_dist.models.student import Student, make_mlp, make_moe, mlp_to_rbm
from rbm_dist.moe.memory import InProcessMemoryStore
from rbm_dist.moe.routing import memory_statistics
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.reduce import clip_gradients, sum_gradients
from rbm_dist.train.kmeans import assigned_sums
from rbm_dist.train.student import bf16
from tests.gpu.fake import on, on_fake_gpu

B, F_IN, C, T, PAIRS = 64, 20, 5, 9, 150
KRD = {"objective": "krd"}
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp": ("mlp", {"norm": "batch", "label_weight": 0.3}),
    "rbm, one choice": ("rbm", {"norm": "layer"}),
    "rbm, by layers": ("rbm", {"routing": "layers", "norm": "batch", "input_attention": True, "reseed_after": None}),
    "krd": ("rbm", {"norm": "layer"} | KRD),
    "krd, all neighbours": ("rbm", {"krd": {"neighbours": "all"}} | KRD),
    "moe": ("moe", {"norm": "layer"}),
    "nosmog": ("rbm", {"similarity": 0.5, "adversarial": {"weight": 0.5, "steps": 2}}),
}


def student_of(kind: str, settings: Any, device: torch.device) -> Student:
    mlp = make_mlp(F_IN, 16, C, 3, settings.norm, 0.1, 0)
    student = on(make_moe(mlp, 4, 2, 0) if kind == "moe" else mlp, device)
    assert isinstance(student, Student)
    if kind == "rbm":
        widths = (F_IN, 16, 16) if settings.routing == "layers" else (F_IN,)
        memories = [torch.empty(4, width, device=device) for width in widths]
        return mlp_to_rbm(student, memories, 2, input_attention=settings.input_attention)
    return student


def step(device: torch.device, kind: str, chosen: dict[str, Any]) -> None:
    config = {"run_dir": "-", "student": {"num_experts": 4, "top_k": 2, **chosen}, "soft_labels": {"hidden": True}}
    settings = Config.model_validate(config | {"soft_labels": {"hidden": True, "entropy_change": True}}).student
    student, mesh = student_of(kind, settings, device), Mesh.single(device)

    def ids(count: int) -> torch.Tensor:
        return torch.empty(count, dtype=torch.int64, device=device)

    def floats(*shape: int) -> torch.Tensor:
        return torch.empty(shape, device=device)

    krd = settings.objective == "krd"
    pairs = Pairs(floats(B + 30, C), ids(PAIRS), ids(PAIRS), floats(B), ids(B)) if krd else None
    batch = Batch(floats(B, F_IN), ids(B), ids(B), floats(B, C), B, floats(B, T), pairs)
    losses = Losses(settings, mesh, Reliability(settings.krd) if krd else None)
    student.train()
    with bf16(device, "bf16"):
        terms, traces, more = losses(student, batch)
    if kind == "rbm":
        store = InProcessMemoryStore(None, settings.ema_decay, 0.0, settings.lr)
        store.init(student.memories, None)
        store.push(0, [memory_statistics(trace.x_BD, trace.routing, 4) for trace in traces])
        student.set_memories(store.pull(1))
    torch.stack(list(terms.values())).sum().backward()
    sum_gradients(student, mesh)
    clip_gradients(student, mesh, 1.0)
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad.device, parameter.grad.dtype) == (device, torch.float32), name
    assert all(term.device == device for term in (*terms.values(), *more.values()))
    student.eval()
    with torch.no_grad(), bf16(device, "bf16"):
        assert student(batch.x_BF)[0].device == device


@pytest.mark.parametrize("name", STUDENTS)
def test_a_student(name: str) -> None:
    on_fake_gpu(step, *STUDENTS[name])


def teacher_step(device: torch.device) -> None:
    model = on(seeded(0, lambda: Gnn(F_IN, 16, C, 2, 0.3, "layer")), device)
    edges = torch.empty(2, 90, dtype=torch.int64, device=device)
    near = Neighbourhood(torch.empty(70, dtype=torch.int64, device=device), edges, [8, 22, 40], [30, 60])
    model.train()
    logits, _ = model.forward_hidden(torch.empty(70, F_IN, device=device), near, 5)
    F.cross_entropy(logits, torch.empty(8, dtype=torch.int64, device=device)).backward()
    sum_gradients(model, Mesh.single(device))
    assert all(p.grad is not None and p.grad.device == device for p in model.parameters())


def test_a_teacher() -> None:
    on_fake_gpu(teacher_step)


def clusters(device: torch.device) -> None:
    sums, counts = assigned_sums(torch.empty(50, 8, device=device), torch.empty(4, 8, device=device))
    assert (sums.device, counts.device, sums.dtype) == (device, device, torch.float64)


def test_a_pass_of_k_means() -> None:
    on_fake_gpu(clusters)


def waits(device: torch.device) -> None:
    torch.empty(3, device=device).sum().item()


def comes_back(device: torch.device) -> None:
    torch.empty(3, device=device).cpu()


def mixes(device: torch.device) -> None:
    torch.empty(3, device=device) + torch.empty(3)


@pytest.mark.parametrize("mistake", [waits, comes_back, mixes])
def test_mistakes_are_found(mistake: Any) -> None:
    with pytest.raises(Exception, match=r"_local_scalar_dense|CPU memory|at least two devices"):
        on_fake_gpu(mistake)
