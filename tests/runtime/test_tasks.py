"""Tasks and part actors on a real Ray cluster: order, errors, losses, deadlines."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from rbm_dist.config.run import ClusterConfig
from rbm_dist.errors import InputError, RunError
from rbm_dist.runtime.progress import start_mailbox
from rbm_dist.runtime.tasks import run_on_parts, run_tasks


def square(x: int) -> int:
    return x * x


def fail(kind: str) -> None:
    if kind == "input":
        raise InputError("x.npz: labels: out of range")
    if kind == "disk":
        raise OSError(28, "No space left on device", "/data/run/feat.npy")
    raise ZeroDivisionError("a bug")


def test_results_in_order(cluster: None) -> None:
    assert run_tasks("partition", square, ((x,) for x in range(5)), cluster=ClusterConfig()) == [0, 1, 4, 9, 16]


def test_tasks_are_handed_over_as_others_end(cluster: None) -> None:
    taken: list[int] = []
    waiting: list[int] = []

    def arguments() -> Iterator[tuple[int]]:
        for x in range(60):
            taken.append(x)
            yield (x,)

    done = run_tasks("partition", square, arguments(), ClusterConfig(), lambda done: waiting.append(len(taken) - done))
    assert done == [x * x for x in range(60)]
    assert 0 < max(waiting) < 30
    assert waiting[-1] == 0


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("input", InputError, "^x.npz: labels: out of range$"),
        ("disk", InputError, "/data/run/feat.npy: no space left on the device"),
        ("bug", RunError, "partition: ZeroDivisionError: a bug. It would fail again"),
    ],
)
def test_errors_reach_the_driver_as_themselves(cluster: None, kind: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        run_tasks("partition", fail, [(kind,)], cluster=ClusterConfig())
    with pytest.raises(error, match=message):
        run_on_parts("partition", lambda: lambda part: fail(kind), [0, 1], 2, use_gpu=False, cluster=ClusterConfig())


def test_work_that_finds_no_room_ends_with_what_is_missing(cluster: None) -> None:
    with pytest.raises(RunError, match=r"no worker started within 2 s .* each wants 1 CPU and 1 GPU; .* 0 of 0 GPU"):
        run_on_parts("soft_labels", lambda: square, [0], 1, use_gpu=True, cluster=ClusterConfig(start_timeout_s=2))


def stop_once(mark: Path, signal_number: int) -> str:
    """The first time it is called the process is stopped, or waits for ever."""
    if mark.exists():
        return "done"
    mark.touch()
    if signal_number:
        os.kill(os.getpid(), signal_number)
    time.sleep(10_000)
    return "woke"


@pytest.mark.parametrize("signal_number", [signal.SIGSTOP, 0])
def test_a_hung_task_is_found_and_done_again(
    cluster: None, tmp_path: Path, signal_number: int, caplog: pytest.LogCaptureFixture
) -> None:
    mailbox = start_mailbox()
    deadlines = ClusterConfig(silence_timeout_s=8, collective_timeout_s=16)
    assert run_tasks("encodings", stop_once, [(tmp_path / "mark", signal_number)], deadlines) == ["done"]
    reason = "no sign of life for 8 s" if signal_number else "did nothing for 16 s"
    assert re.search(rf"encodings, task 0 on .*: {reason}; its process \(\d+\) was ended, and its work", caplog.text)
    ray.kill(mailbox)


def test_a_long_task_is_not_cut_off(cluster: None) -> None:
    mailbox = start_mailbox()

    def compute(seconds: float) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sum(range(10_000))
        return "done"

    assert run_tasks("partition", compute, [(15,)], ClusterConfig(silence_timeout_s=6, collective_timeout_s=6)) == [
        "done"
    ]
    ray.kill(mailbox)


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
        "soft_labels", lambda: make_worker(tmp_path), list(range(6)), 2, use_gpu=False, cluster=ClusterConfig()
    )
    assert (tmp_path / "died").exists()
    assert [part for part, _ in results] == list(range(6))
    assert len({pid for part, pid in results if part % 2 == 0}) == 1
