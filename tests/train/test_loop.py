"""The learning rate over the steps of a loop."""

import math

import pytest

from rbm_dist.config.training import TrainingConfig
from rbm_dist.train.loop import learning_rate


def rates(steps: int, **settings: object) -> list[float]:
    return [learning_rate(TrainingConfig.model_validate(settings), step, steps) for step in range(steps)]


def test_it_is_constant_by_default() -> None:
    assert rates(5) == [1] * 5


def test_it_rises_and_stays() -> None:
    assert rates(6, warmup_steps=3) == [0.25, 0.5, 0.75, 1, 1, 1]


def test_it_falls_along_half_a_cosine() -> None:
    expected = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert rates(8, lr_schedule="cosine") == pytest.approx(expected)


def test_it_rises_and_falls() -> None:
    found = rates(12, lr_schedule="cosine", warmup_steps=4)
    assert found[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert found[4:] == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])
    assert min(found) > 0, "no step is lost"


def test_a_warm_up_longer_than_the_loop_only_rises() -> None:
    assert rates(3, lr_schedule="cosine", warmup_steps=9) == pytest.approx([0.1, 0.2, 0.3])
