"""`rbm-dist checkpoint`: what a run's loops have saved, whether it is whole, and one as a file of whole tensors."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rbm_dist import cli, storage
from rbm_dist.config.run import ClusterConfig
from rbm_dist.errors import InputError
from rbm_dist.models.student import make_mlp, mlp_to_rbm
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.training_checkpoints import TrainingCheckpoints
from rbm_dist.stages.local import MetricsRecorder
from rbm_dist.stages.run_checkpoints import consolidate, run_checkpoints
from tests.gloo import run_ranks

EXPERTS = 3


def train(rank: int, url: str, loop: str, token: int) -> None:
    """Two epochs of three steps, with a checkpoint after each epoch; each rank has some of the experts."""
    mesh = Mesh.init(2, torch.device("cpu"))
    local = mesh.local_experts(EXPERTS)
    mlp = make_mlp(6, 8, 3, num_layers=1, norm="layer", dropout=0.0, seed=1)
    rbm = mlp_to_rbm(mlp, [torch.ones(EXPERTS, 6)], 2, [mesh.dispatcher(EXPERTS)], len(local))
    cluster = ClusterConfig(checkpoint_every=1)
    checkpoints = TrainingCheckpoints(
        "student", loop, url, cluster, MetricsRecorder(), 3, rbm, torch.optim.Adam(rbm.parameters()), EXPERTS, mesh,
        token=token,
    )  # fmt: skip
    for epoch, _ in checkpoints.epochs(2):
        for _ in range(3):
            checkpoints.after_step(10, {})
        experts = rbm.routed_layers[0].experts
        experts.bias_LO.data.copy_((torch.tensor(local) + 10 * epoch).view(-1, 1).expand_as(experts.bias_LO))
        checkpoints.after_epoch(float(epoch), {})


@pytest.fixture
def run(url: str, tmp_path: Path) -> str:
    """A run with two loops' checkpoints, written by two ranks, on each kind of storage."""
    for loop, folder, token in (("rbm/pretrain", "rbm/pretrain", 0), ("rbm", "rbm/checkpoints", 4)):
        local = f"{tmp_path}/made/student/{folder}"
        run_ranks(train, 2, local, loop, token)
        for path in Path(local).glob("*/*"):  # ranks do not reach a memory or an S3 server of this process
            storage.copy_in(path, f"{url}/student/{folder}/{path.parent.name}/{path.name}")
    storage.write_json(f"{url}/student/config.json", {})
    return url


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rbm-dist", "checkpoint", *arguments])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_commands(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "ls", run) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][:3] == ["loop", "step", "epochs"]
    assert [(line[0], line[1], line[2], *line[7:]) for line in lines[1:]] == [
        (loop, str(step), str(step // 3), "2", token, "yes", "epoch", f"{step // 3 - 1},", f"{step // 3 - 1:.4f}")
        for loop, token in (("rbm", "4"), ("rbm/pretrain", "0"))
        for step in (3, 6)
    ]
    assert command(monkeypatch, "verify", run) == 0
    assert "4 of 4 checkpoints are whole" in capsys.readouterr().out
    out = f"{tmp_path}/whole.safetensors"
    assert command(monkeypatch, "consolidate", run, out) == 0
    tensors, facts = load_file(out), json.loads((tmp_path / "whole.json").read_text())
    (name,) = [name for name in tensors if name.startswith("model.") and name.endswith("bias_LO")]
    assert tensors[name][:, 0].tolist() == [10, 11, 12], "the experts of both ranks"
    assert {"exp_avg." + name[6:], "best." + name[6:]} <= tensors.keys()
    assert (facts["step"], facts["token"], facts["ranks"], facts["facts"]["loop"]) == (6, 4, 2, "rbm")
    assert len(facts["facts"]["history"]) == 2
    consolidate(run, f"{tmp_path}/earlier.safetensors", "rbm/pretrain", 3)
    assert load_file(f"{tmp_path}/earlier.safetensors")[name][:, 0].tolist() == [0, 1, 2]


def damaged(run: str, name: str, data: bytes) -> None:
    with storage.atomic_writer(f"{run}/student/rbm/checkpoints/{name}") as stream:
        stream.write(data)


def test_damage_is_named(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = {each.folder.rsplit("/", 1)[1]: each for each in run_checkpoints(run) if each.loop == "rbm"}
    index = whole["step-00000003.4"].index
    assert index is not None
    name = min(index["files"])
    damaged(run, f"step-00000003.4/{name}", bytes(index["files"][name]["bytes"]))
    assert [each.state for each in run_checkpoints(run)] == ["yes"] * 4, "sizes do not tell"
    assert command(monkeypatch, "verify", run) == 1
    shown = capsys.readouterr().out
    assert f"step-00000003.4/{name}: its checksum is not the one that was written" in shown
    assert "3 of 4 checkpoints are whole" in shown
    with pytest.raises(InputError, match=f"{name}: its checksum .* choose another with --step"):
        consolidate(run, f"{tmp_path}/out.safetensors", "rbm", 3)
    damaged(run, f"step-00000003.4/{name}", b"short")
    storage.remove(f"{run}/student/rbm/checkpoints/step-00000006.4/checkpoint.json")
    damaged(run, "step-00000007.4/checkpoint.json", b"{")
    states = [each.state for each in run_checkpoints(run) if each.loop == "rbm"]
    assert states == ["damaged", "unfinished", "damaged"]
    assert command(monkeypatch, "ls", run) == 0
    assert "unfinished" in capsys.readouterr().out
    assert command(monkeypatch, "consolidate", run, f"{tmp_path}/out.safetensors", "--step", "9") == 2
    assert "no such checkpoint" in capsys.readouterr().err
    assert not storage.exists(f"{tmp_path}/out.safetensors")


def test_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no checkpoints"):
        run_checkpoints(str(tmp_path))
