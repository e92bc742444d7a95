"""When a training loop stops, which state it keeps, and the moving average of its weights."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from rbm_dist.errors import InputError
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.training_checkpoints import TrainingCheckpoints


class Loop:
    """A loop whose one weight is the number of the epoch, with given scores."""

    def __init__(self, url: Path, patience: int | None, every: int = 100):
        self.model = nn.Linear(1, 1, bias=False)
        optimizer = torch.optim.Adam(self.model.parameters())
        self.checkpoints = TrainingCheckpoints(
            "student mlp", str(url), every, self.model, optimizer, num_experts=0, mesh=Mesh.single(), patience=patience
        )
        self.done = self.checkpoints.resume()

    def run(self, scores: list[float]) -> int:
        """Epochs until it stops, or the scores end."""
        for epoch in range(self.done, len(scores)):
            if self.checkpoints.stopped:
                break
            self.model.weight.data.fill_(epoch)
            self.checkpoints.after_epoch(epoch + 1 == len(scores), scores[epoch], {"score": scores[epoch]})
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
        Loop(tmp_path, None).checkpoints.after_epoch(False, 0.5, figures)


class Averaging:
    """A loop of three steps an epoch, whose weight before every step is the number of the step."""

    def __init__(self, url: Path, decay: float):
        self.model = nn.BatchNorm1d(1)  # a model with a buffer too, which is not averaged
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0)
        self.checkpoints = TrainingCheckpoints(
            "student mlp", str(url), 1, self.model, self.optimizer, num_experts=0, mesh=Mesh.single(), average=decay
        )
        self.done = self.checkpoints.resume()

    def run(self, epochs: int) -> list[float]:
        """The averaged weight after each epoch; the best epoch is the last but one."""
        found = []
        for epoch in range(self.done, epochs):
            for step in range(3 * epoch + 1, 3 * epoch + 4):
                self.model.weight.data.fill_(step)
                self.checkpoints.after_step()
            self.model.running_mean.fill_(epoch)
            with self.checkpoints.averaged():
                found.append(self.model.weight.item())
            assert self.model.weight.item() == 3 * epoch + 3, "training goes on with its own weights"
            self.checkpoints.after_epoch(epoch + 1 == epochs, -abs(epoch - (epochs - 2)), {})
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
