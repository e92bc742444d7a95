"""Links that are cut for a while, for ever, or slow."""

import time
from collections.abc import Callable

import pytest

from tests.cluster.bed import Bed
from tests.cluster.submitted import WORKER, Submitted, Undisturbed
from tests.patience import patient

pytestmark = [pytest.mark.long, pytest.mark.timeout(patient(400))]
CUT_S = 20


def test_a_cut_of_twenty_seconds_is_ridden_out(
    bed: Bed, submit: Callable[..., Submitted], undisturbed: Undisturbed
) -> None:
    run = submit()
    for loop in ("teacher", "student/rbm"):
        run.wait_for_step(loop)
        host = next(host for host in (bed.hosts["a"], bed.hosts["b"]) if host.processes(WORKER))
        workers = host.processes(WORKER)
        host.cut()
        time.sleep(CUT_S)
        host.restore()
        run.wait_for_progress(loop)
        assert host.processes("raylet/raylet "), f"{loop}: Ray gave the host up"
        assert host.processes(WORKER) == workers, f"{loop}: the group was started again"
    assert run.end() == 0, run.log
    undisturbed.assert_same(run)


def test_two_links_are_cut_for_ever(bed: Bed, submit: Callable[..., Submitted]) -> None:
    """What is left is too small for the group: an error that says so, in time."""
    run = submit("cluster.start_timeout_s=30", "cluster.max_failures=1")
    run.wait_for_step("teacher")
    for name in "ab":
        bed.hosts[name].cut()
    try:
        assert run.end() == 1, run.log
    finally:
        for name in "ab":
            bed.hosts[name].kill()
    assert "Traceback" not in run.log
    assert "teacher" in run.log.splitlines()[-1]
    assert "CPU" in run.log.splitlines()[-1], "what is missing"


def test_a_slow_network_changes_nothing(bed: Bed, submit: Callable[..., Submitted], undisturbed: Undisturbed) -> None:
    hosts = list(bed.hosts.values())
    for host in hosts:
        host.shape(50)
    try:
        run = submit()
        assert run.end(patient(200)) == 0, run.log
    finally:
        for host in hosts:
            host.shape(None)
    undisturbed.assert_same(run)
