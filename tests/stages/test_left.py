"""Training that is ordered to leave in the middle of an epoch, and goes on: its figures and weights do not tell."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rbm_dist.config.run import Config
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.newest_checkpoint import newest
from rbm_dist.parallel.pace import Order
from rbm_dist.parallel.training_checkpoints import Left
from rbm_dist.report.metrics import Row
from rbm_dist.stages.local import MetricsRecorder
from rbm_dist.stages.student import train_students
from rbm_dist.stages.teacher import train_teacher
from tests.curves import computed
from tests.gloo import run_ranks
from tests.small_graph import small_store

KRD = {"objective": "krd", "krd": {"min_update_epoch": 0}}
# By the loop that is left, which has 5 epochs of 6 steps (the teacher: 2), what its configuration has.
LOOPS: dict[str, dict[str, Any]] = {
    "teacher": {},
    "mlp": {"models": ["mlp"], "norm": "batch", "dropout": 0.3, "average": 0.9},
    "rbm": {"models": ["rbm"], "reseed_after": 2, "routing": "layers", "self_similarity": 0.1},
    "moe": {"models": ["moe"], "dropout": 0.2},
    "krd": {"models": ["rbm"], "norm": "batch", "similarity": 0.5} | KRD,
}


class Leaver(MetricsRecorder):
    """The driver that orders a loop to leave when it asks for the n-th time; keeps the loop's last history."""

    def __init__(self, loop: str, ask: int | None) -> None:
        super().__init__()
        self.loop, self.ask, self.now, self.asked = loop, ask, "", 0
        self.history: list[Row] = []

    def begin(self, loop: str, history: list[Row]) -> None:
        self.now = loop

    def order(self) -> Order:  # type: ignore[override]
        self.asked += self.now == self.loop
        return "leave" if self.asked == self.ask else "go"

    def end(self, loop: str, history: list[Row]) -> None:
        if loop == self.loop:
            self.history = [computed(row) for row in history]


def config(url: str, student: dict[str, Any], **cluster: Any) -> Config:
    settings = {
        "hidden": 16, "epochs": 6 if "rbm" in student.get("models", []) else 5, "pretrain_epochs": 1,
        "batch_size": 40, "num_experts": 5, "top_k": 2, "merge_tolerance": None, "dropout": 0.0,
    }  # fmt: skip
    own = {"memory_store": "in_process", "checkpoint_every": 100, "checkpoint_minutes": None}
    return Config.model_validate(
        {
            "run_dir": url,
            "partition": {"num_parts": 4},
            "soft_labels": {"entropy_change": True, "hidden": True},
            "teacher": {"hidden": 16, "fanout": [4, 3], "epochs": 5, "batch_size": 40, "dropout": 0.3},
            "student": settings | student,
            "cluster": own | cluster,
        }
    )


def train(mesh: Mesh, graph: str, url: str, name: str, ask: int | None) -> list[Row] | None:
    """The history of a loop; None if it left. `ask`: when it is to."""
    loop = {"krd": "rbm"}.get(name, name)
    recorder = Leaver(loop, ask)
    torch.set_default_dtype(torch.float32 if name == "teacher" else torch.float64)
    try:
        if name == "teacher":
            train_teacher(mesh, recorder, config(url, {}), graph, f"{url}/teacher")
        else:
            train_students(mesh, recorder, config(url, LOOPS[name]), graph, url)
    except Left:
        return None
    finally:
        torch.set_default_dtype(torch.float32)
    return recorder.history


def train_each(rank: int, graph: str, url: str, ask: int | None, expert_parallel: int) -> dict[str, list[Row] | None]:
    mesh = Mesh.init(expert_parallel, torch.device("cpu"))
    return {name: train(mesh, graph, f"{url}/{name}", name, ask) for name in LOOPS}


def weights(url: str, name: str) -> dict[str, torch.Tensor]:
    return load_file(f"{url}/{name}/{'rbm' if name == 'krd' else name}/model.safetensors")


def step_of(url: str, name: str) -> int:
    """Where the loop left."""
    below = "" if name == "teacher" else {"krd": "rbm"}.get(name, name)
    folder = f"{url}/{name}/teacher/checkpoints" if name == "teacher" else f"{url}/{name}/{below}/checkpoints"
    with newest(folder, Mesh.single()) as found:
        assert found is not None
        return found.index["step"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, dict[str, list[Row]]]:
    """A graph, the folder of what one process makes of it, and the loops' histories."""
    folder = str(tmp_path_factory.mktemp("left"))
    small_store(folder)
    graph, url = f"{folder}/graph", f"{folder}/undisturbed"
    histories = {name: train(Mesh.single(), graph, f"{url}/{name}", name, None) for name in LOOPS}
    assert all(histories.values())
    return graph, url, histories  # type: ignore[return-value]


@pytest.mark.parametrize("name", LOOPS)
def test_one_process_goes_on_to_the_last_digit(
    undisturbed: tuple[str, str, dict[str, list[Row]]], tmp_path: Path, name: str
) -> None:
    graph, reference, histories = undisturbed
    url, left = f"{tmp_path}/{name}", []
    for ask in (1, 2, 3, 4):
        if train(Mesh.single(), graph, url, name, ask) is None:
            left.append(step_of(str(tmp_path), name))
    assert left[0] == 1
    assert left == sorted(set(left)), "each time it has come farther"
    history = train(Mesh.single(), graph, url, name, None)
    assert history == histories[name]
    expected = weights(reference, name)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in weights(str(tmp_path), name).items())


def test_any_number_of_ranks_goes_on(undisturbed: tuple[str, str, dict[str, list[Row]]], tmp_path: Path) -> None:
    graph, reference, histories = undisturbed
    url, steps = str(tmp_path), []
    for ask, world, expert_parallel in ((2, 2, 2), (1, 4, 2), (2, 3, 1)):
        left = run_ranks(train_each, world, graph, url, ask, expert_parallel)
        assert left == [dict.fromkeys(LOOPS)] * world, "all ranks of all loops leave"
        steps.append({name: step_of(url, name) for name in LOOPS})
    for name in LOOPS:
        assert steps[0][name] < steps[1][name] < steps[2][name]
        assert steps[1][name] == steps[0][name] + 1 + ((steps[0][name] + 1) % 6 == 0 and name != "teacher")
    for name, history in run_ranks(train_each, 2, graph, url, None, 1)[0].items():
        assert history is not None
        float64 = name != "teacher"
        for row, expected in zip(history, histories[name], strict=True):
            assert row == pytest.approx(expected, rel=1e-9 if float64 else 1e-4, abs=1e-12), name
        expected_weights = weights(reference, name)
        for key, tensor in weights(url, name).items():
            tolerance = {"rtol": 1e-8, "atol": 1e-11} if float64 else {"rtol": 1e-3, "atol": 1e-4}
            np.testing.assert_allclose(tensor, expected_weights[key], **tolerance, err_msg=f"{name}: {key}")


def test_checkpoints_by_steps(undisturbed: tuple[str, str, dict[str, list[Row]]], tmp_path: Path) -> None:
    graph, url = undisturbed[0], str(tmp_path)
    settings = config(url, LOOPS["mlp"], checkpoint_steps=7, keep_checkpoints=100)
    train_students(Mesh.single(), MetricsRecorder(), settings, graph, url)
    found = sorted(path.name for path in Path(url, "mlp", "checkpoints").iterdir())
    assert found == [f"step-{step:08d}.0" for step in (7, 14, 21, 28, 30)], "the last ends the loop"
