"""Sharded checkpoints: any number of ranks to any other, complete or not there, damage passed over."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rbm_dist import storage
from rbm_dist.models.student import Student, make_mlp, mlp_to_rbm
from rbm_dist.parallel import checkpoint
from rbm_dist.parallel.mesh import Mesh
from tests.gloo import run_ranks

EXPERTS = 5


def build(mesh: Mesh, seed: int) -> tuple[Student, torch.optim.Adam]:
    """An RbM with this rank's experts, trained by one step so that Adam has a state."""
    mlp = make_mlp(6, 8, 3, num_layers=2, norm="layer", dropout=0.0, seed=seed)
    memories = [torch.ones(EXPERTS, width) for width in (6, 8)]
    local = len(mesh.local_experts(EXPERTS))
    student = mlp_to_rbm(mlp, memories, 2, [mesh.dispatcher(EXPERTS) for _ in memories], local)
    adam = torch.optim.Adam(student.parameters(), lr=0.1)
    first = mesh.rank % mesh.expert_parallel * -(-EXPERTS // mesh.expert_parallel)
    number = {3: (torch.arange(local) + first).view(-1, 1, 1), 2: (torch.arange(local) + first).view(-1, 1)}
    experts = {id(p): number[p.dim()] for layer in student.routed_layers for p in layer.experts.parameters()}
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter) * (experts.get(id(parameter), 0) + 1 + seed)
    adam.step()
    for layer in student.routed_layers:
        for parameter in layer.experts.parameters():  # every expert differs from the others
            parameter.data += number[parameter.dim()]
    return student, adam


def mesh_of(expert_parallel: int) -> Mesh:
    return Mesh.init(expert_parallel, torch.device("cpu"))


def save(rank: int, expert_parallel: int, url: str) -> None:
    mesh = mesh_of(expert_parallel)
    checkpoint.save(url, 3, checkpoint.training_state(*build(mesh, seed=1), EXPERTS, mesh), {"epochs": 3}, mesh)


def load(rank: int, expert_parallel: int, url: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a rank that began differently holds after loading, and what it should hold."""
    mesh = mesh_of(expert_parallel)
    found, expected = build(mesh, seed=2), build(mesh, seed=1)
    folder, facts = checkpoint.latest(url) or ("", {})
    assert facts == {"epochs": 3}
    checkpoint.load(folder, checkpoint.training_state(*found, EXPERTS, mesh), mesh)
    whole = Mesh.single()  # plain tensors, to compare this rank's own
    return tuple(  # type: ignore[return-value]
        {name: tensor.clone() for name, tensor in checkpoint.training_state(*each, EXPERTS, whole).items()}
        for each in (found, expected)
    )


@pytest.mark.parametrize(("world", "expert_parallel"), [(1, 1), (4, 2), (3, 3)])
def test_any_layout_to_any_other(tmp_path: Path, world: int, expert_parallel: int) -> None:
    run_ranks(save, world, expert_parallel, str(tmp_path))
    for new_world, new_expert_parallel in ((1, 1), (2, 2), (4, 2), (5, 5)):
        for found, expected in run_ranks(load, new_world, new_expert_parallel, str(tmp_path)):
            assert found.keys() == expected.keys()
            for name, tensor in found.items():
                assert torch.equal(tensor, expected[name]), name


def one(url: str, step: int, value: float) -> None:
    checkpoint.save(url, step, {"w": torch.full((3,), value)}, {"value": value}, Mesh.single())


@pytest.mark.parametrize("where", ["local", "memory"])
def test_the_newest_whole_one_counts(tmp_path: Path, where: str) -> None:
    url = str(tmp_path) if where == "local" else f"memory://{tmp_path.name}"
    assert checkpoint.latest(url) is None
    for step in (1, 2, 3):
        one(url, step, float(step))
    assert storage.listdir(url) == ["step-00000002", "step-00000003"], "two are kept"
    folder, facts = checkpoint.latest(url) or ("", {})
    state = {"w": torch.zeros(3)}
    checkpoint.load(folder, state)
    assert facts == {"value": 3.0}
    assert state["w"].tolist() == [3.0] * 3


def test_an_unfinished_or_damaged_one_is_passed_over(tmp_path: Path) -> None:
    for step in (1, 2):
        one(str(tmp_path), step, float(step))
    newest = tmp_path / "step-00000002"
    index = newest / "checkpoint.json"
    text = index.read_text()
    index.unlink()
    assert (checkpoint.latest(str(tmp_path)) or ("", {}))[1] == {"value": 1.0}, "no index, no checkpoint"
    index.write_text(text)
    file = newest / next(iter(json.loads(text)["files"]))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    assert (checkpoint.latest(str(tmp_path)) or ("", {}))[1] == {"value": 1.0}, "one flipped bit"


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    one(str(tmp_path), 1, 1.0)
    assert {path.suffix for path in (tmp_path / "step-00000001").iterdir()} == {".safetensors", ".json"}
