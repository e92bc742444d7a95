"""Training groups: Ray Train starts the workers and joins them in a process group; a group that breaks starts again.

A loop knows nothing of Ray: it gets its `Mesh`, a reporter and its own arguments, and keeps its own checkpoints, so
that a group that starts again (here or in the next run, with more workers or fewer) goes on where the last one was.
The driver may order a group to save a checkpoint and leave: when it is to end, or when there is room for a larger one.
"""

import contextlib
import itertools
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from ray.autoscaler.sdk import request_resources
from ray.exceptions import RayError

from rbm_dist import storage
from rbm_dist.config.run import ClusterConfig
from rbm_dist.errors import RunError, disk_full_here
from rbm_dist.parallel.checkpoint import saved
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.training_checkpoints import Left
from rbm_dist.runtime.failures import LostError, explain
from rbm_dist.runtime.liveness import Watch, signs_of_life
from rbm_dist.runtime.mailbox import Reporter
from rbm_dist.runtime.placement import describe_room, hosts, leaving_hosts, this_host, threads_per_worker
from rbm_dist.runtime.worker_logs import warnings_of

Loop = Callable[..., None]
Job = tuple[str, Loop, dict[str, Any]]
"""A stage's name, its loop, and the loop's own arguments."""
_POLL_S = 1.0
_SHORT_S = 0.1
_SETTLE_S = 10.0  # a host that comes is rarely alone; one that is lost is free for a moment before Ray knows
_LEAVE_S = 10.0  # to save a checkpoint and leave
_log = logging.getLogger(__name__)


@dataclass
class _Group:
    """A training group at work, or waiting for a job."""

    workers: int
    scratch_url: str
    outcome: Future[bool]


class TrainingGroups:
    """Runs the training loops of one driver, one after the other, each on a group of workers.

    `keep` lets one group serve them all: most of the time it takes to start one goes into processes that import torch.
    Where others need its CPUs and GPUs in between, a group ends with its loop. A context manager.
    """

    def __init__(self, config: ClusterConfig, reporter: Reporter, keep: bool):
        self._config, self._reporter, self._keep = config, reporter, keep
        self._group: _Group | None = None
        self._jobs = 0
        # Read by Ray Train when a group starts. Hung workers are found by their signs of life; its own way is slower.
        os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
        os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(2 * config.silence_timeout_s)
        os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(config.start_timeout_s)
        os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # the driver watches

    def __enter__(self) -> "TrainingGroups":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._group is not None and error is None:
            self._dismiss(self._group)  # a thread that still speaks to Ray while it shuts down can crash the process
        elif self._group is not None:
            self._forget(self._group)
        with contextlib.suppress(Exception):  # of a cluster that is gone
            request_resources(bundles=[])

    def run(self, stage: str, loop: Loop, arguments: dict[str, Any], url: str) -> None:
        """Run `loop(mesh=…, reporter=…, **arguments)` on every worker, again from its checkpoints when one is lost.

        Its checkpoints are somewhere below `url`. Raises `InputError`, and `RunError` for what would fail again, at
        once; `RunError` also when workers were lost more than `max_failures` times without a new checkpoint.
        """
        from ray.train import TrainingFailedError  # it takes a second to import

        config, failures, before = self._config, 0, saved(url)
        while True:
            try:
                if self._group is None:
                    workers = _room_for(stage, config)
                    self._group = self._start(workers, storage.join(url, "ray_train"))
                if self._work(self._group, stage, (stage, loop, arguments)):
                    return
                _log.warning("%s: hosts came or are about to go; it goes on with another group", stage)
            except (RayError, TrainingFailedError) as error:
                failure = explain(error, stage)
                checkpoints = saved(url)
                failures, before = 1 if checkpoints != before else failures + 1, checkpoints
                # What the user must change, and what is our own mistake, fails again.
                if not isinstance(failure, LostError) or failures > config.max_failures:
                    raise failure from None
                again = "it goes on from the last checkpoint, %d of at most %d times without a new one"
                _log.warning(f"%s; {again}", failure.what, failures, config.max_failures)

    def _start(self, workers: int, scratch_url: str) -> _Group:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        config = self._config
        trainer = TorchTrainer(
            _worker,
            train_loop_config={
                "first": self._jobs,
                "expert_parallel": config.workers_per_set,
                "reporter": self._reporter,
                "timeout_s": config.collective_timeout_s,
            },
            # Workers that compute on GPUs talk fastest on one host; those on CPUs would only share its memory's rate.
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=config.use_gpu,
                resources_per_worker=config.worker_resources,
                placement_strategy="PACK" if config.use_gpu else "SPREAD",
            ),
            torch_config=TorchConfig(timeout_s=int(config.collective_timeout_s)),
            run_config=RunConfig(
                name=uuid.uuid4().hex,
                storage_path=storage.filesystem(scratch_url)[1],
                storage_filesystem=_arrow_filesystem(scratch_url),
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )
        # Not in the main thread, where Ray Train answers an interrupt by ending the process without a word. A daemon,
        # because it waits for ever once the cluster is gone.
        outcome: Future[bool] = Future()

        def fit() -> None:
            try:
                outcome.set_result(bool(trainer.fit().return_value))
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=fit, name="training", daemon=True).start()
        return _Group(workers, scratch_url, outcome)

    def _work(self, group: _Group, stage: str, job: Job) -> bool:
        """Let a group do a job; whether it came to its end, and the group did not leave for another."""
        config, reporter, number = self._config, self._reporter, self._jobs
        self._jobs += 1
        reporter.tell("go")
        watch, leaving = Watch(config, stage), leaving_hosts()
        room_since: float | None = None
        looked = -math.inf
        try:
            while reporter.jobs_done() <= number:
                if wait([group.outcome], _SHORT_S).done:
                    return group.outcome.result()
                if time.monotonic() - looked < _POLL_S:
                    continue
                looked = time.monotonic()
                reporter.hand_out(number, job)  # again and again: a mailbox that starts again has forgotten it
                watch.look()
                small = group.workers < config.most_workers
                grows = small and config.group_size(group.workers + _room(config)) > group.workers
                room_since = (room_since or time.monotonic()) if grows else None
                if (room_since and time.monotonic() - room_since > _SETTLE_S) or leaving_hosts() - leaving:
                    reporter.tell("leave")
            if not self._keep:
                self._dismiss(group)
            return True
        except (KeyboardInterrupt, SystemExit):  # of the driver; what was computed since the last checkpoint is kept
            end = time.monotonic() + _LEAVE_S
            while not wait([group.outcome], _POLL_S).done and time.monotonic() < end:
                reporter.tell("leave")
            raise
        finally:
            if group.outcome.done():
                self._forget(group)

    def _dismiss(self, group: _Group) -> None:
        """Let a group end, which frees its CPUs and GPUs."""
        end = time.monotonic() + self._config.silence_timeout_s
        while not wait([group.outcome], _SHORT_S).done and time.monotonic() < end:
            self._reporter.hand_out(self._jobs, None)
        self._jobs += 1
        self._forget(group)

    def _forget(self, group: _Group) -> None:
        self._group = None
        with contextlib.suppress(OSError):
            storage.remove(group.scratch_url)


def _room(config: ClusterConfig) -> int:
    """How many more training workers have room now."""
    return sum(host.fits(config.worker_resources) for host in hosts())


def _room_for(stage: str, config: ClusterConfig) -> int:
    """How many workers to start: as many as wanted, fewer if that is allowed and no more room comes.

    Raises `RunError` when there is no room for the fewest within the deadline.
    """
    fewest, most = config.fewest_workers, config.most_workers
    start = time.monotonic()
    # An autoscaler, if there is one, starts hosts for what is asked for, and keeps them until less is.
    request_resources(bundles=[config.worker_resources] * most)
    while (room := _room(config)) < most:
        waited = time.monotonic() - start
        if room >= fewest and waited > _SETTLE_S:
            break
        if waited > config.start_timeout_s:
            raise RunError(
                f"{stage}: room for {room} of {fewest} workers after {config.start_timeout_s:g} s "
                f"(cluster.start_timeout_s): {describe_room(config.worker_resources)}. Add hosts, lower "
                "cluster.train_workers, or give it as [fewest, most]"
            )
        time.sleep(_POLL_S)
    return config.group_size(min(room, most))


def _worker(config: dict[str, Any]) -> bool:
    """Do jobs until there are no more; whether the last came to its end."""
    import ray.train.torch

    context = ray.train.get_context()
    torch.set_num_threads(threads_per_worker(context.get_local_world_size()))
    device = ray.train.torch.get_device()
    mesh = Mesh.init(config["expert_parallel"], device, this_host(), config["timeout_s"])
    reporter: Reporter = config["reporter"]
    for number in itertools.count(config["first"]):
        # Without a deadline: the driver is at other stages, or gone, and this process with it.
        while (job := reporter.job(number, mesh.rank)) is None:
            time.sleep(_SHORT_S)
        if job[0] is None:
            break
        stage, loop, arguments = job[0]
        who = f"{stage}, rank {mesh.rank}"
        try:
            with warnings_of(who), signs_of_life(who), disk_full_here():
                loop(mesh=mesh, reporter=reporter, **arguments)
        except Left:
            return False
        except BaseException:
            # A rank that leaves its group makes the others raise within a second instead of waiting for the deadline.
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
            raise
    return True


def _arrow_filesystem(url: str) -> Any:
    if storage.is_local(url):
        return None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(storage.filesystem(url)[0]))
