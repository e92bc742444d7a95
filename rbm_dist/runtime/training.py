"""Training groups: Ray Train starts the workers and joins them in a process group; a group that breaks starts again.

A loop knows nothing of Ray: it gets its `Mesh`, a reporter and its own arguments, and keeps its own checkpoints, so
that a group that starts again (here or in the next run) goes on where the last checkpoint was.
"""

import contextlib
import logging
import os
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist

from rbm_dist import storage
from rbm_dist.config.run import ClusterConfig
from rbm_dist.errors import InputError
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.runtime.failures import RAY_FAILURES, explain
from rbm_dist.runtime.progress import Reporter, warnings_of

Loop = Callable[..., None]
_log = logging.getLogger(__name__)


def run_training(
    stage: str, loop: Loop, arguments: dict[str, Any], config: ClusterConfig, expert_parallel: int, reporter: Reporter,
    scratch_url: str,
) -> None:  # fmt: skip
    """Run `loop(mesh=…, reporter=…, **arguments)` on every worker, again from its checkpoints when a worker is lost.

    `expert_parallel` workers share one set of experts.
    Raises `InputError` at once, and `RunError` when workers were lost more than `max_failures` times.
    """
    # Read by Ray Train when a group starts: see a lost worker at once, and give up on resources that never come.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(config.start_timeout_s))
    loop_config = {
        "stage": stage,
        "loop": loop,
        "arguments": arguments,
        "reporter": reporter,
        "expert_parallel": expert_parallel,
    }
    try:
        for failures in range(config.max_failures + 1):
            try:
                _fit(loop_config, config, scratch_url)
                break
            except RAY_FAILURES as error:
                failure = explain(error, stage)
                # What the user must change fails again; so Ray Train's own retries, which cannot tell, stay off.
                if isinstance(failure, InputError) or failures == config.max_failures:
                    raise failure from None
                _log.warning("%s (done now, %d of at most %d times)", failure, failures + 1, config.max_failures)
    finally:
        with contextlib.suppress(OSError):
            storage.remove(scratch_url)


def _fit(loop_config: dict[str, Any], config: ClusterConfig, scratch_url: str) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        _worker,
        train_loop_config=loop_config,
        scaling_config=ScalingConfig(num_workers=config.train_workers, use_gpu=config.use_gpu),
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
    outcome: Future[object] = Future()

    def fit() -> None:
        try:
            outcome.set_result(trainer.fit())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=fit, name="training", daemon=True).start()
    outcome.result()


def _worker(config: dict[str, Any]) -> None:
    import ray.train.torch

    context = ray.train.get_context()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))
    mesh = Mesh.init(config["expert_parallel"], ray.train.torch.get_device())
    try:
        with warnings_of(f"{config['stage']}, rank {mesh.rank}"):
            config["loop"](mesh=mesh, reporter=config["reporter"], **config["arguments"])
    except BaseException:
        # A rank that leaves its group makes the others raise within a second instead of waiting for the deadline.
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        raise


def _arrow_filesystem(url: str) -> Any:
    if storage.is_local(url):
        return None
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(storage.filesystem(url)[0]))
