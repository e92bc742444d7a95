"""Tasks and part actors on a real Ray cluster: order, errors, losses, deadlines."""

import functools
import itertools
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from rbm_dist.config.run import ClusterConfig
from rbm_dist.errors import InputError, RunError
from rbm_dist.runtime.mailbox import start_mailbox
from rbm_dist.runtime.placement import this_host, working_hosts
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
        run_on_parts("partition", lambda: lambda part: fail(kind), [0, 1], ClusterConfig(inference_workers=2))


def test_work_that_finds_no_room_ends_with_what_is_missing(cluster: None) -> None:
    with pytest.raises(RunError, match=r"no worker started within 2 s .* each wants 1 CPU and 1 GPU; .* 0 of 0 GPU"):
        run_on_parts(
            "soft_labels", lambda: square, [0], ClusterConfig(inference_workers=1, use_gpu=True, start_timeout_s=2)
        )


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
    deadlines = ClusterConfig(silence_timeout_s=8, collective_timeout_s=9)
    assert run_tasks("encodings", stop_once, [(tmp_path / "mark", signal_number)], deadlines) == ["done"]
    reason = "no sign of life for 8 s" if signal_number else "did nothing for 9 s"
    assert re.search(rf"encodings, task 0 on .*: {reason}; its process \(\d+\) was ended, and its work", caplog.text)
    del mailbox


def test_a_long_task_is_not_cut_off(cluster: None) -> None:
    mailbox = start_mailbox()

    def compute(seconds: float) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            sum(range(10_000))
        return "done"

    assert run_tasks("partition", compute, [(10,)], ClusterConfig(silence_timeout_s=6, collective_timeout_s=6)) == [
        "done"
    ]
    del mailbox


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + patient(60)
    while not file.exists():
        assert time.monotonic() < deadline, f"no {file.name}"
        time.sleep(0.01)


def dies_once(folder: Path) -> Callable[[int], int]:
    """Dies on part 3, as a lost node would; no part is done before."""

    def work(part: int) -> int:
        mark = folder / "died"
        if part == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        wait_for(mark)
        return part * part

    return work


def test_the_part_of_a_lost_actor_is_taken_by_another(cluster: Cluster, tmp_path: Path) -> None:
    found = run_on_parts("soft_labels", lambda: dies_once(tmp_path), [*range(6)], ClusterConfig(inference_workers=2))
    assert found == [part * part for part in range(6)]


def always_dies(part: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_part_that_loses_every_actor_ends_the_stage(cluster: Cluster) -> None:
    with pytest.raises(RunError, match="soft_labels: Actor"):
        run_on_parts("soft_labels", lambda: always_dies, [0], ClusterConfig(inference_workers=1))


def notes_host(folder: Path, slow: int) -> Callable[[int], str]:
    """Says where a part was worked at. Both hosts begin before either goes on; one part is done when all others are."""
    host, begun = this_host(), itertools.count()

    def work(part: int) -> str:
        if next(begun) == 0:
            (folder / f"first-{host}-{part}").touch()
            deadline = time.monotonic() + patient(60)
            while len(list(folder.glob("first-*"))) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        for other in range(8) if part == slow else ():
            if other != slow:
                wait_for(folder / f"done-{other}")
        (folder / f"done-{part}").touch()
        return host

    return work


def test_hosts_begin_with_their_own_parts_and_a_slow_one_leaves_the_others_its_rest(
    cluster: Cluster, tmp_path: Path
) -> None:
    hosts = working_hosts()
    make = functools.partial(notes_host, tmp_path, 0)
    at = run_on_parts("soft_labels", make, [*range(8)], ClusterConfig(inference_workers=2))
    first = {file.name.split("-")[1]: int(file.name.split("-")[2]) for file in tmp_path.glob("first-*")}
    assert first == {hosts[0]: 0, hosts[1]: 4}
    assert at == [hosts[0], *[hosts[1]] * 7], "the host of part 0 was busy until all others were done"


@pytest.mark.slow
def test_a_lost_host_leaves_its_parts_to_others(cluster: Cluster, tmp_path: Path) -> None:
    extra = cluster.add_node(num_cpus=1)
    lost: str = extra.node_id

    def work(part: int) -> str:
        if this_host() == lost:
            (tmp_path / "there").touch()
            time.sleep(patient(600))
        wait_for(tmp_path / "there")
        return this_host()

    with ThreadPoolExecutor() as pool:
        try:
            found = pool.submit(
                run_on_parts, "soft_labels", lambda: work, [*range(9)], ClusterConfig(inference_workers=6)
            )
            wait_for(tmp_path / "there")
        finally:
            cluster.remove_node(extra, allow_graceful=False)
        hosts = found.result()
    assert len(hosts) == 9
    assert set(hosts) <= set(working_hosts()) - {lost}
