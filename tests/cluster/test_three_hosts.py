"""A run that is submitted to three hosts, one of which dies in the middle, ends as one in a single process."""

from collections.abc import Callable

import pytest

from tests.cluster.bed import Bed
from tests.cluster.submitted import WORKER, Submitted, Undisturbed
from tests.patience import patient

pytestmark = [pytest.mark.slow, pytest.mark.timeout(patient(300))]


def test_a_host_dies_in_training_and_the_result_is_the_same(
    bed: Bed, submit: Callable[..., Submitted], undisturbed: Undisturbed
) -> None:
    run = submit()
    run.wait_for_step("teacher", 3)
    # Not the head, which has the driver; one that computes.
    host = next(host for host in (bed.hosts["a"], bed.hosts["b"]) if host.processes(WORKER))
    host.kill()
    run.wait_for_progress("teacher")
    assert run.end() == 0, run.log
    undisturbed.assert_same(run)
    for process in ("ray::_ShardServer", WORKER):
        assert not bed.head.processes(process), "nothing is left at work"
