"""Processes of a run die or hang, one after another, in every long stage; the run goes on, and ends the same."""

import random
import signal
from collections.abc import Callable

import psutil
import pytest

from tests.cluster.bed import Bed
from tests.cluster.submitted import MAILBOX, MEMORY, PART, SERVER, WORKER, Submitted, Undisturbed
from tests.patience import patient

pytestmark = pytest.mark.timeout(patient(400))


def one_of(bed: Bed, name: str) -> psutil.Process:
    """A process of this name, on whichever host."""
    return random.Random(name).choice([each for host in bed.hosts.values() for each in host.processes(name)])


@pytest.mark.slow
def test_processes_die_in_every_stage(bed: Bed, submit: Callable[..., Submitted], undisturbed: Undisturbed) -> None:
    run = submit()
    for name in (WORKER, SERVER, MAILBOX):
        run.wait_for_progress("teacher")
        one_of(bed, name).kill()
        run.wait_for_progress("teacher")
    for name in (PART, SERVER):
        run.wait_for(lambda: any(host.processes(PART) for host in bed.hosts.values()), "soft labels begin")
        one_of(bed, name).kill()
    run.wait_for_step("student/rbm")
    for name in (WORKER, MEMORY, MAILBOX):
        one_of(bed, name).kill()
        run.wait_for_progress("student/rbm")
    assert run.end() == 0, run.log
    undisturbed.assert_same(run)


@pytest.mark.long
def test_a_worker_that_hangs_is_found_and_named(
    bed: Bed, submit: Callable[..., Submitted], undisturbed: Undisturbed
) -> None:
    run = submit("cluster.silence_timeout_s=15", f"cluster.collective_timeout_s={patient(300)}")
    run.wait_for_step("teacher")
    one_of(bed, WORKER).send_signal(signal.SIGSTOP)
    run.wait_for_progress("teacher")
    assert "no sign of life" in run.log
    assert "rank" in run.log
    assert run.end() == 0, run.log
    undisturbed.assert_same(run)
