"""The object storage halts for a while or for ever; the disk of one host fills up."""

import signal
import time
from collections.abc import Callable

import pytest

from tests.cluster.bed import Bed
from tests.cluster.hosts import SCRATCH
from tests.cluster.submitted import Submitted, Undisturbed
from tests.patience import patient

pytestmark = [pytest.mark.long, pytest.mark.timeout(patient(400))]


def test_a_storage_that_halts_and_then_is_gone(
    bed: Bed, submit: Callable[..., Submitted], undisturbed: Undisturbed
) -> None:
    """First it does not answer for ten seconds; then connections are closed, and refused until it is back."""
    run = submit()
    run.wait_for_step("teacher")
    (server,) = bed.store.processes("moto.server")
    server.send_signal(signal.SIGSTOP)
    time.sleep(10)
    server.send_signal(signal.SIGCONT)
    run.wait_for_step("student/rbm")
    bed.store.processes("tests.cluster.relay")[0].kill()
    time.sleep(10)
    bed.start_relay()
    run.wait_for_progress("student/rbm")
    assert run.end() == 0, run.log
    undisturbed.assert_same(run)


def test_a_full_disk_is_named_and_loses_nothing(
    bed: Bed, submit: Callable[..., Submitted], undisturbed: Undisturbed
) -> None:
    host, file = bed.hosts["a"], f"{SCRATCH}/full"
    first = submit()
    first.wait_for_step("teacher", 3)
    host.run("sh", "-c", f"cat /dev/zero > {file} 2> /dev/null || true")
    try:
        assert first.end() == 2, first.log
    finally:
        host.run("rm", file)
    assert "Traceback" not in first.log
    said = first.log.splitlines()[-1]
    assert "no space" in said.lower()
    assert SCRATCH in said
    assert host.name in said
    second = submit(run=first.run)
    assert second.end() == 0, second.log
    assert "teacher: done before" in second.log or "went on from where it was" in second.log
    undisturbed.assert_same(second)
