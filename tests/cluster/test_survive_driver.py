"""Drivers that are told to end, and two drivers of one run."""

import signal
from collections.abc import Callable

import pytest

from tests.cluster.submitted import Submitted, Undisturbed
from tests.patience import patient

pytestmark = [pytest.mark.slow, pytest.mark.timeout(patient(400))]


@pytest.mark.parametrize("loop", ["teacher", "student/rbm"])
def test_a_run_that_is_terminated_saves_first(
    submit: Callable[..., Submitted], undisturbed: Undisturbed, loop: str
) -> None:
    """Checkpoints by epochs are off, so that the one that is there was made because it was asked for."""
    first = submit("cluster.checkpoint_every=1000")
    bar = f"{loop.split('/')[-1]}: "
    first.wait_for(lambda: bar in first.log, f"{loop} at work", patient(120))
    first.driver().send_signal(signal.SIGTERM)
    assert first.end(patient(30)) == 143, first.log
    assert "Traceback" not in first.log
    assert first.step(loop) > 0
    second = submit(run=first.run)
    assert second.end() == 0, second.log
    assert "went on from where it was" in second.log
    undisturbed.assert_same(second)


def test_the_second_of_two_drivers_is_refused(submit: Callable[..., Submitted], undisturbed: Undisturbed) -> None:
    first = submit()
    first.wait_for_step("teacher")
    second = submit(run=first.run)
    assert second.end() == 2, second.log
    assert first.url in second.log.splitlines()[-1]
    assert first.end() == 0, first.log
    undisturbed.assert_same(first)
