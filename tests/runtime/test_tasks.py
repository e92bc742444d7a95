"""Tasks and part actors on a real Ray cluster: order, errors, losses, deadlines."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rbm_dist.errors import InputError, RunError
from rbm_dist.runtime.tasks import run_on_parts, run_tasks
from tests.patience import patient


def square(x: int) -> int:
    return x * x


def fail(kind: str) -> None:
    if kind == "input":
        raise InputError("x.npz: labels: out of range")
    if kind == "disk":
        raise OSError(28, "No space left on device", "/data/run/feat.npy")
    raise ZeroDivisionError("a bug")


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def test_results_in_order(cluster: None) -> None:
    assert run_tasks("partition", square, ((x,) for x in range(5)), timeout_s=patient(60)) == [0, 1, 4, 9, 16]


def test_tasks_are_handed_over_as_others_end(cluster: None) -> None:
    taken: list[int] = []
    waiting: list[int] = []

    def arguments() -> Iterator[tuple[int]]:
        for x in range(60):
            taken.append(x)
            yield (x,)

    done = run_tasks("partition", square, arguments(), patient(60), lambda done: waiting.append(len(taken) - done))
    assert done == [x * x for x in range(60)]
    assert 0 < max(waiting) < 30
    assert waiting[-1] == 0


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("input", InputError, "^x.npz: labels: out of range$"),
        ("disk", InputError, "/data/run/feat.npy: no space left on the device"),
        ("bug", RunError, "partition: ZeroDivisionError: a bug. Run the same command again"),
    ],
)
def test_errors_reach_the_driver_as_themselves(cluster: None, kind: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        run_tasks("partition", fail, [(kind,)], timeout_s=patient(60))
    with pytest.raises(error, match=message):
        run_on_parts("partition", lambda: lambda part: fail(kind), [0, 1], 2, use_gpu=False, timeout_s=patient(60))


def test_a_wait_has_a_deadline(cluster: None) -> None:
    with pytest.raises(RunError, match=r"soft_labels: .*no result for 1 s, 1 pending"):
        run_tasks("soft_labels", sleep, [(30,)], timeout_s=1)


def make_worker(folder: Path) -> Callable[[int], tuple[int, int]]:
    """Dies once, on part 3, as a lost node would."""

    def work(part: int) -> tuple[int, int]:
        mark = folder / "died"
        if part == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return part, os.getpid()

    return work


def test_parts_stay_with_their_actor_and_survive_its_loss(cluster: None, tmp_path: Path) -> None:
    results = run_on_parts(
        "soft_labels", lambda: make_worker(tmp_path), list(range(6)), 2, use_gpu=False, timeout_s=patient(60)
    )
    assert (tmp_path / "died").exists()
    assert [part for part, _ in results] == list(range(6))
    assert len({pid for part, pid in results if part % 2 == 0}) == 1
