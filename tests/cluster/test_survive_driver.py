"""Drivers that are told to end, and two drivers of one run."""

import signal
from collections.abc import Callable

import pytest

from tests.cluster.submitted import Submitted, Undisturbed
from tests.patience import patient

pytestmark = [pytest.mark.long, pytest.mark.timeout(patient(400))]


def test_a_run_that_is_terminated_saves_first(submit: Callable[..., Submitted], undisturbed: Undisturbed) -> None:
    """Checkpoints by epochs are off, so that those that are there were made because they were asked for."""
    run = submit("cluster.checkpoint_every=1000")
    for loop in ("teacher", "student/rbm"):
        run.wait_for_line(f"{loop.split('/')[-1]}: ")
        run.driver().send_signal(signal.SIGTERM)
        assert run.end(patient(30)) == 143, run.log
        assert "Traceback" not in run.log
        assert run.step(loop) > 0
        run = submit("cluster.checkpoint_every=1000", run=run.run)
    assert run.end() == 0, run.log
    assert "student: " in run.log
    assert "went on from where it was" in run.log
    undisturbed.assert_same(run)


def test_the_second_of_two_drivers_is_refused(submit: Callable[..., Submitted], undisturbed: Undisturbed) -> None:
    first = submit()
    first.wait_for_step("teacher")
    second = submit(run=first.run)
    assert second.end() == 2, second.log
    assert first.url in second.log.splitlines()[-1]
    assert first.end() == 0, first.log
    undisturbed.assert_same(first)
