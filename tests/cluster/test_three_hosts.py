"""A run that is submitted to three hosts, one of which dies in the middle, ends as one in a single process.

So does one whose teacher is a file in the object storage.
"""

import io
from collections.abc import Callable

import numpy as np
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


def test_predictions_in_object_storage_teach_as_the_teacher_that_made_them(
    bed: Bed, submit: Callable[..., Submitted], undisturbed: Undisturbed
) -> None:
    file = io.BytesIO()
    np.save(file, undisturbed.soft_labels())
    bed.write("predictions.npy", file.getvalue())
    run = submit("teacher.external={paths: [s3://bucket/predictions.npy], kind: probabilities}")
    assert run.end() == 0, run.log
    undisturbed.assert_same_accuracies(run)
    undisturbed.assert_same_student(run)
    assert not run.keys("teacher/checkpoints"), "nothing was trained"
