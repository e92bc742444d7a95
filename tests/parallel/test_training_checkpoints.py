"""When a training loop stops, which state it keeps, and the moving average of its weights."""

import errno
import math
import socket
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from rbm_dist import storage
from rbm_dist.config.run import ClusterConfig
from rbm_dist.errors import InputError, RunError
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.training_checkpoints import TrainingCheckpoints
from rbm_dist.stages.local import MetricsRecorder
from tests.gloo import run_ranks


class Loop:
    """A loop whose one weight is the number of the epoch, with given scores."""

    def __init__(self, url: Path, patience: int | None, every: int = 100):
        self.model = nn.Linear(1, 1, bias=False)
        optimizer = torch.optim.Adam(self.model.parameters())
        self.checkpoints = TrainingCheckpoints(
            "student", "mlp", str(url), ClusterConfig(checkpoint_every=every), MetricsRecorder(), 1, self.model,
            optimizer, num_experts=0, mesh=Mesh.single(), patience=patience,
        )  # fmt: skip
        self.checkpoints.resume()
        self.done = len(self.checkpoints.history)

    def run(self, scores: list[float]) -> int:
        """Epochs until it stops, or the scores end."""
        for epoch, _ in self.checkpoints.epochs(len(scores)):
            self.model.weight.data.fill_(epoch)
            self.checkpoints.after_step(1, {})
            self.checkpoints.after_epoch(scores[epoch], {"score": scores[epoch]})
        return len(self.checkpoints.history)

    def best(self) -> int:
        model = nn.Linear(1, 1, bias=False)
        self.checkpoints.load_best(model)
        return int(model.weight.item())


@pytest.mark.parametrize(
    ("patience", "epochs", "best"),
    [(None, 9, 7), (1, 3, 1), (2, 6, 3), (3, 7, 3), (4, 9, 7)],
)
def test_patience(tmp_path: Path, patience: int | None, epochs: int, best: int) -> None:
    scores = [1.0, 2.0, 1.5, 3.0, 3.0, 2.9, 1.0, 4.0, 0.0]  # an equal one is not better
    loop = Loop(tmp_path, patience)
    assert loop.run(scores) == epochs
    assert loop.best() == best
    assert Loop(tmp_path, patience).run(scores) == epochs, "what has stopped goes no further"


def test_a_loop_cut_off_stops_where_it_would_have(tmp_path: Path) -> None:
    scores = [1.0, 3.0, 2.0, 2.0, 2.0, 2.0, 5.0]
    for cut in (2, 3, 4):
        url = tmp_path / str(cut)
        assert Loop(url, 4, every=1).run(scores[:cut]) == cut
        loop = Loop(url, 4, every=1)
        assert loop.done == cut
        assert loop.run(scores) == 6
        assert loop.best() == 1


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("epoch", "advice"),
    [(0, "look at the source's summary for columns of a huge range"), (2, "; try a smaller student.lr than 0.001")],
)
def test_an_epoch_without_a_score_ends_the_loop(tmp_path: Path, score: float, epoch: int, advice: str) -> None:
    loop = Loop(tmp_path, patience=None, every=1)
    with pytest.raises(InputError, match=f"^student mlp: not finite in epoch {epoch}: score") as error:
        loop.run([*[1.0] * epoch, score, 3.0])
    assert advice in str(error.value)
    assert Loop(tmp_path, None).done == epoch, "nor is there a checkpoint of it"


def test_figures_that_are_not_finite_are_named(tmp_path: Path) -> None:
    figures = {"loss": 1.0, "distillation": math.nan, "val_loss": math.inf}
    with pytest.raises(InputError, match="in epoch 0: distillation, val_loss; the features"):
        Loop(tmp_path, None).checkpoints.after_epoch(0.5, figures)


class Averaging:
    """A loop of three steps an epoch, whose weight before every step is the number of the step."""

    def __init__(self, url: Path, decay: float):
        self.model = nn.BatchNorm1d(1)  # a model with a buffer too, which is not averaged
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0)
        self.checkpoints = TrainingCheckpoints(
            "student", "mlp", str(url), ClusterConfig(checkpoint_every=1), MetricsRecorder(), 3, self.model,
            self.optimizer, num_experts=0, mesh=Mesh.single(), average=decay,
        )  # fmt: skip
        self.checkpoints.resume()

    def run(self, epochs: int) -> list[float]:
        """The averaged weight after each epoch; the best epoch is the last but one."""
        found = []
        for epoch, _ in self.checkpoints.epochs(epochs):
            for step in range(3 * epoch + 1, 3 * epoch + 4):
                self.model.weight.data.fill_(step)
                self.checkpoints.after_step(1, {})
            self.model.running_mean.fill_(epoch)
            with self.checkpoints.averaged():
                found.append(self.model.weight.item())
            assert self.model.weight.item() == 3 * epoch + 3, "training goes on with its own weights"
            self.checkpoints.after_epoch(-abs(epoch - (epochs - 2)), {})
        return found


@pytest.mark.parametrize("decay", [0.0, 0.2, 0.9])
def test_average(tmp_path: Path, decay: float) -> None:
    average, expected = 1.0, []  # batch norm starts with a weight of 1
    for step in range(1, 31):
        now = min(decay, step / (step + 10))
        average = now * average + (1 - now) * step
        if step % 3 == 0:
            expected.append(average)
    loop = Averaging(tmp_path / "whole", decay)
    assert loop.run(10) == pytest.approx(expected)
    best = nn.BatchNorm1d(1)
    loop.checkpoints.load_best(best)
    assert (best.weight.item(), best.running_mean.item()) == (pytest.approx(expected[8]), 8.0)
    loop.checkpoints.restore_best()
    assert loop.model.weight.item() == pytest.approx(expected[8])
    Averaging(tmp_path / "cut", decay).run(4)
    assert Averaging(tmp_path / "cut", decay).run(10) == pytest.approx(expected[4:]), "it goes on after four epochs"


def test_own_weights_come_back_after_an_error(tmp_path: Path) -> None:
    loop = Averaging(tmp_path, 0.9)
    loop.model.weight.data.fill_(5)
    with pytest.raises(RuntimeError, match="stop"), loop.checkpoints.averaged():
        raise RuntimeError("stop")
    assert loop.model.weight.item() == 5


def test_a_write_that_fails_ends_the_loop_and_the_last_good_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Loop(tmp_path, None, every=1).run([1.0, 2.0])
    loop = Loop(tmp_path, None, every=1)
    monkeypatch.setattr(storage, "copy_in", full)
    with pytest.raises(InputError, match=rf"rank 0 on {socket.gethostname()}: {tmp_path}/step-.*: no space left"):
        loop.run([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    monkeypatch.undo()
    assert Loop(tmp_path, None).done == 2
    assert len(list(tmp_path.iterdir())) == 2, "nothing is left of it"


def full(path: Path, url: str) -> storage.FileInfo:
    raise OSError(errno.ENOSPC, "No space left on device", url)


def fail_on_one(rank: int, url: str) -> tuple[str, str, int]:
    """How a rank ends when another's disk is full, in a loop whose first answer is to save; and after which step."""
    mesh, model = Mesh.init(1, torch.device("cpu")), nn.Linear(1, 1, bias=False)
    if rank == 1:
        storage.copy_in = full
    checkpoints = TrainingCheckpoints(
        "student", "mlp", url, ClusterConfig(checkpoint_minutes=1e-9), MetricsRecorder(), 10**6, model,
        torch.optim.Adam(model.parameters()), 0, mesh,
    )  # fmt: skip
    steps = 0
    try:
        for _ in checkpoints.epochs(1):
            while steps < 10**6 - 1:
                time.sleep(0.001 * rank)
                steps += 1
                checkpoints.after_step(1, {})
    except (InputError, RunError) as error:
        return type(error).__name__, str(error), steps
    raise AssertionError("it went on")


def test_a_disk_that_is_full_on_one_rank_ends_all_of_them_at_the_same_step(tmp_path: Path) -> None:
    found = run_ranks(fail_on_one, 3, str(tmp_path))
    assert found == [found[0]] * 3
    kind, text, _ = found[0]
    assert kind == "InputError"
    assert f"rank 1 on {socket.gethostname()}: {tmp_path}/step-00000001.0/" in text
    assert "no space left on the device" in text
