"""Sharded checkpoints: any number of ranks to any other, complete or not there, damage passed over."""

import errno
import logging
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rbm_dist import storage
from rbm_dist.errors import InputError, RunError
from rbm_dist.models.student import Student, make_mlp, mlp_to_rbm
from rbm_dist.parallel import checkpoint
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.newest_checkpoint import newest
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
    with newest(url, mesh) as last:
        assert last is not None
        assert last.facts["epochs"] == 3
        checkpoint.load(last.local, checkpoint.training_state(*found, EXPERTS, mesh), mesh)
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


def one(url: str, step: int, value: float, **options: Any) -> None:
    checkpoint.save(url, step, {"w": torch.full((3,), value)}, {"value": value}, Mesh.single(), **options)


def value(url: str) -> float | None:
    """What the newest whole checkpoint holds."""
    with newest(url, Mesh.single()) as found:
        if found is None:
            return None
        state = {"w": torch.zeros(3)}
        checkpoint.load(found.local, state, Mesh.single())
        assert state["w"].tolist() == [found.facts["value"]] * 3
        return found.facts["value"]


def test_the_newest_whole_one_counts(url: str) -> None:
    assert value(url) is None
    for step in (1, 2, 3):
        one(url, step, float(step))
    assert checkpoint.names(url) == ["step-00000002.0", "step-00000003.0"], "two are kept"
    assert value(url) == 3.0


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    url = str(tmp_path)
    for step in range(1, 8):
        facts = {"best_checkpoint": "step-00000002.0" if step >= 2 else None}
        checkpoint.save(url, step, {"w": torch.zeros(3)}, facts, Mesh.single(), keep=3)
    assert checkpoint.names(url) == [f"step-0000000{step}.0" for step in (2, 5, 6, 7)]


def test_an_owner_that_still_lives_neither_displaces_nor_deletes_its_successors(tmp_path: Path) -> None:
    url = str(tmp_path)
    for step in (10, 20):
        one(url, step, float(step), token=1)
    one(url, 15, 15.0, token=2)
    for step in (30, 40, 50):
        one(url, step, float(step), token=1)
    assert checkpoint.names(url) == ["step-00000040.1", "step-00000050.1", "step-00000015.2"]
    assert value(url) == 15.0
    one(url, 16, 16.0, token=2)
    assert checkpoint.names(url) == ["step-00000015.2", "step-00000016.2"]


def flip_a_bit(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_unfinished_or_damaged_one_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2):
        one(str(tmp_path), step, float(step))
    newest = tmp_path / "step-00000002.0"
    index = newest / "checkpoint.json"
    text = index.read_text()
    index.unlink()
    assert value(str(tmp_path)) == 1.0, "no index, no checkpoint"
    assert not warnings_in(caplog), "nothing was lost"
    index.write_text(text[:-20])
    assert value(str(tmp_path)) == 1.0, "half an index"
    index.write_text(text)
    flip_a_bit(newest)
    assert value(str(tmp_path)) == 1.0, "one flipped bit"
    next(newest.glob("*.safetensors")).unlink()
    assert value(str(tmp_path)) == 1.0, "a missing file"
    passed_over = warnings_in(caplog)
    assert len(passed_over) == 3
    assert all(f"checkpoint passed over: {newest}" in message for message in passed_over)


def test_what_was_passed_over_is_deleted_and_pushes_out_nothing(tmp_path: Path) -> None:
    url = str(tmp_path)
    for step in (1, 2, 3):
        one(url, step, float(step), keep=5)
    flip_a_bit(tmp_path / "step-00000003.0")
    (tmp_path / "step-00000002.0" / "checkpoint.json").unlink()
    one(url, 2, 2.5)
    assert checkpoint.names(url) == ["step-00000001.0", "step-00000002.0"]
    assert value(url) == 2.5


def test_nothing_in_a_checkpoint_is_pickled(tmp_path: Path) -> None:
    one(str(tmp_path), 1, 1.0)
    assert {path.suffix for path in (tmp_path / "step-00000001.0").iterdir()} == {".safetensors", ".json"}


def where_each_loads(rank: int, url: str, blind: int | None) -> tuple[float | None, str]:
    """What a rank's newest checkpoint holds, or its error. One rank sees every file short, or cannot load it."""
    mesh = mesh_of(1)
    if rank == blind:
        whole = storage.file_info
        storage.file_info = lambda url: whole(url) | {"bytes": 7} if "step-00000002" in url else whole(url)
    with newest(url, mesh) as found:
        assert found is not None
        return found.facts["value"], found.name


def on_ranks(rank: int, url: str, step: int) -> None:
    mesh = mesh_of(1)
    state = {name: torch.full((3,), float(step)) for name in ("w", "v", "u")}  # a tensor, and a file, of each rank
    checkpoint.save(url, step, state, {"value": float(step)}, mesh)


def test_all_ranks_load_the_same_one_whoever_sees_damage(tmp_path: Path) -> None:
    for step in (1, 2):
        run_ranks(on_ranks, 3, str(tmp_path), step)
    assert run_ranks(where_each_loads, 3, str(tmp_path), None) == [(2.0, "step-00000002.0")] * 3
    for blind in (0, 2):
        assert run_ranks(where_each_loads, 3, str(tmp_path), blind) == [(1.0, "step-00000001.0")] * 3


def load_or_fail(rank: int, url: str, unlucky: int) -> str:
    """The error with which a rank ends whose file goes away after it was verified, or another's does."""
    mesh = mesh_of(1)
    with newest(url, mesh) as found:
        assert found is not None
        mesh.barrier()
        if rank == unlucky:
            for file in Path(found.local).glob("*.safetensors"):
                file.write_bytes(file.read_bytes()[:9])
        mesh.barrier()
        with pytest.raises(RunError) as error:
            checkpoint.load(found.local, {"w": torch.zeros(3), "v": torch.zeros(3)}, mesh)
    return str(error.value)


def test_what_one_rank_cannot_load_is_an_error_on_all(tmp_path: Path) -> None:
    run_ranks(on_ranks, 2, str(tmp_path), 1)
    found = run_ranks(load_or_fail, 3, str(tmp_path), 1)
    assert len(set(found)) == 1
    assert re.search(r"step-00000001.0: rank \d on \S+: ", found[0])


def write_or_fail(rank: int, url: str, unlucky: int) -> str:
    mesh = mesh_of(1)
    if rank == unlucky:
        storage.copy_in = full
    with pytest.raises(InputError) as error:
        checkpoint.save(url, 2, {"w": torch.zeros(3), "v": torch.zeros(3)}, {}, mesh)
    return str(error.value)


def full(path: Path, url: str) -> storage.FileInfo:
    raise OSError(errno.ENOSPC, "No space left on device", url)


def test_a_disk_that_is_full_on_one_rank_is_an_error_on_all_and_the_last_good_one_stays(tmp_path: Path) -> None:
    run_ranks(on_ranks, 2, str(tmp_path), 1)
    found = run_ranks(write_or_fail, 2, str(tmp_path), 1)
    assert found == [found[0]] * 2
    assert f"rank 1 on {socket.gethostname()}: {tmp_path}/step-00000002.0/" in found[0]
    assert "no space left on the device" in found[0]
    assert checkpoint.names(str(tmp_path)) == ["step-00000001.0"]
    assert value(str(tmp_path)) == 1.0


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    url = str(small_disk)
    one(url, 1, 1.0)
    state = {"w": torch.zeros(1 << 20)}
    with pytest.raises(InputError, match=r"rank 0 on .*: no space left on the device"):
        checkpoint.save(url, 2, state, {}, Mesh.single())
    assert checkpoint.names(url) == ["step-00000001.0"]
    assert value(url) == 1.0


def test_a_full_disk_of_temporary_files_is_named(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    with pytest.raises(InputError, match=rf"rank 0 on .*: {small_disk}/\S+: no space left on the device"):
        checkpoint.save(str(tmp_path), 2, {"w": torch.zeros(1 << 20)}, {}, Mesh.single())
    assert checkpoint.names(str(tmp_path)) == []
