"""Which failures are worth another try: what was lost, and not what would only fail again."""

import errno

import pytest
import torch
from ray.exceptions import ActorDiedError, OutOfMemoryError, WorkerCrashedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from rbm_dist.errors import InputError, RunError
from rbm_dist.runtime.failures import LostError, explain

PEER = RuntimeError(
    "[/pytorch/third_party/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:4711. "
    "This is typically caused by a remote worker crashing."
)
LOST = [
    ActorDiedError(),
    WorkerCrashedError(),
    WorkerHealthCheckTimeoutError("no answer"),
    WorkerHealthCheckFailedError("gone", ActorDiedError()),
    PEER,
    OSError(errno.EIO, "Input/output error", "/shared/feat.npy"),
    RunError("routing memory: nothing from rank(s) [2] for 300 s"),
]


def test_what_gloo_says_is_said_in_short() -> None:
    failure = explain(WorkerGroupError("", {0: PEER}), "teacher")
    assert isinstance(failure, LostError)
    assert failure.what == "teacher: rank 0: Connection closed by peer [10.0.0.2]:4711"
    assert str(failure) == f"{failure.what}. Run the same command again to go on from the last checkpoint"


@pytest.mark.parametrize("cause", LOST, ids=lambda cause: type(cause).__name__)
def test_what_was_lost_is_tried_again(cause: Exception) -> None:
    for error in (cause, WorkerGroupError("", {1: cause}), ControllerError(cause)):
        assert isinstance(explain(error, "teacher"), LostError)


def test_a_bug_is_not_tried_again_and_peers_that_saw_it_are_left_out() -> None:
    failure = explain(WorkerGroupError("", {0: PEER, 3: IndexError("index 9 is out of bounds")}), "student")
    assert not isinstance(failure, LostError)
    assert str(failure).startswith("student: rank 3: IndexError: index 9 is out of bounds. It would fail again")
    assert "Connection closed" not in str(failure)


@pytest.mark.parametrize(
    "cause",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        MemoryError("Unable to allocate 4.00 GiB"),
        OutOfMemoryError("Task was killed due to the node running low on memory."),
    ],
    ids=["GPU", "host", "Ray's monitor"],
)
def test_too_little_memory_is_said_and_not_tried_again(cause: Exception) -> None:
    failure = explain(WorkerGroupError("", {0: PEER, 1: cause}), "teacher")
    assert not isinstance(failure, LostError)
    assert "teacher: out of memory" in str(failure)
    assert "batch_size" in str(failure)


def test_what_the_user_must_change_comes_first() -> None:
    wrong = InputError("x.npz: labels: out of range")
    assert explain(WorkerGroupError("", {0: PEER, 1: wrong, 2: IndexError("a bug")}), "teacher") is wrong
