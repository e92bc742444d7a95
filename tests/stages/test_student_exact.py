"""Exact when sharded: the loss curve and the weights do not depend on how many ranks carry the work."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rbm_dist.config import Config
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.stages.student import train_students
from tests.gloo import run_ranks
from tests.small_graph import small_store

CUT_OFF = "cut off|Connection closed by peer"  # on the rank that fails, on the others


class Recorder:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, dict[str, float]]] = []

    def begin(self, loop: str, history: list[dict[str, float]]) -> None:
        self.rows.append((f"begin {loop}", len(history), {}))

    def progress(self, *_: Any) -> None: ...

    def metrics(self, loop: str, row: dict[str, float]) -> None:
        self.rows.append((loop, int(row["epoch"]), {name: value for name, value in row.items() if name != "time"}))


def config(url: str, **student: Any) -> Config:
    settings = {
        "models": ["rbm"], "hidden": 16, "epochs": 10, "pretrain_epochs": 2, "batch_size": 40, "num_experts": 5,
        "top_k": 2, "label_weight": 0.3, "temperature": 2.0, "dropout": 0.0,
    }  # fmt: skip
    return Config.model_validate(
        {
            "run_dir": url,
            "partition": {"num_parts": 4},
            "student": settings | student,
            "cluster": {"memory_store": "in_process", "checkpoint_every": 3},
        }
    )


def train(rank: int, expert_parallel: int, graph: str, url: str, student: dict[str, Any]) -> list[Any]:
    torch.set_default_dtype(torch.float64)
    mesh = Mesh.init(expert_parallel, torch.device("cpu"))
    recorder = Recorder()
    train_students(mesh, recorder, config(url, **student), f"{graph}/graph", url)
    return recorder.rows


def final_weights(url: str) -> dict[str, torch.Tensor]:
    return load_file(f"{url}/rbm/model.safetensors")


# Layouts: ranks, and ranks per set of experts. Five ranks for four parts and five experts: one rank has no rows.
@pytest.mark.parametrize(
    ("student", "layouts"),
    [
        ({"norm": "batch"}, [(2, 1), (2, 2), (3, 3), (5, 5)]),
        ({"norm": "layer", "dropout": 0.4}, [(4, 2)]),
    ],
    ids=["batch norm", "dropout"],
)
def test_curves_of_all_layouts_agree(tmp_path: Path, student: dict[str, Any], layouts: list[tuple[int, int]]) -> None:
    graph = str(tmp_path)
    small_store(graph)
    reference = run_ranks(train, 1, 1, graph, f"{tmp_path}/1x1", student)[0]
    weights = final_weights(f"{tmp_path}/1x1")
    losses = [row[2]["loss"] for row in reference if row[2]]
    assert len(losses) == 10
    assert losses[-1] < losses[2], "the routed network learns"
    for world, expert_parallel in layouts:
        url = f"{tmp_path}/{world}x{expert_parallel}"
        rows = run_ranks(train, world, expert_parallel, graph, url, student)[0]
        assert [row[:2] for row in rows] == [row[:2] for row in reference]
        for (_, _, found), (_, _, expected) in zip(rows, reference, strict=True):
            assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
        for name, tensor in final_weights(url).items():
            assert tensor.dtype == torch.float64
            where = f"{world} ranks, {expert_parallel} per set of experts: {name}"
            np.testing.assert_allclose(tensor, weights[name], rtol=1e-8, atol=1e-11, err_msg=where)


def test_a_run_cut_off_goes_on_along_the_same_curve_on_other_layouts(tmp_path: Path) -> None:
    graph, student = str(tmp_path), {"dropout": 0.2, "norm": "batch"}
    small_store(graph)
    reference = run_ranks(train, 1, 1, graph, f"{tmp_path}/undisturbed", student)[0]
    url = f"{tmp_path}/cut"
    with pytest.raises(Exception, match=CUT_OFF):
        run_ranks(train_until, 2, 2, graph, url, student, ("rbm/pretrain", 1))
    with pytest.raises(Exception, match=CUT_OFF):
        run_ranks(train_until, 4, 4, graph, url, student, ("rbm", 4))
    with pytest.raises(Exception, match=CUT_OFF):
        run_ranks(train_until, 1, 1, graph, url, student, ("rbm", 6))
    rows = run_ranks(train, 3, 3, graph, url, student)[0]
    assert ("begin rbm", 6, {}) in rows, "it goes on from the checkpoint after six routed epochs"
    assert rows[-1][:2] == reference[-1][:2]
    for (_, epoch, found), (_, expected_epoch, expected) in zip(rows[-2:], reference[-2:], strict=True):
        assert epoch == expected_epoch
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    weights = final_weights(f"{tmp_path}/undisturbed")
    for name, tensor in final_weights(url).items():
        np.testing.assert_allclose(tensor, weights[name], rtol=1e-8, atol=1e-11, err_msg=name)


def train_until(rank: int, expert_parallel: int, graph: str, url: str, student: dict[str, Any], at: tuple) -> None:
    """Train, and fail after one loop's epoch, as a killed process would."""

    class Cutter(Recorder):
        def metrics(self, loop: str, row: dict[str, float]) -> None:
            if (loop, row["epoch"]) == at:
                raise RuntimeError("cut off")

    torch.set_default_dtype(torch.float64)
    mesh = Mesh.init(expert_parallel, torch.device("cpu"))
    train_students(mesh, Cutter(), config(url, **student), f"{graph}/graph", url)
