"""Ray tasks, and actors that each work through their own parts of the graph."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import ray

from rbm_dist.config.run import ClusterConfig
from rbm_dist.errors import RunError, disk_full_here
from rbm_dist.runtime.cluster import describe_room
from rbm_dist.runtime.failures import RAY_FAILURES, explain
from rbm_dist.runtime.liveness import Watch, signs_of_life
from rbm_dist.runtime.progress import warnings_of

_AHEAD = 2  # tasks per CPU that are handed over before they can run; at least _AT_LEAST in all
_AT_LEAST = 16
_WAIT_S = 1.0  # for a result, before hung processes are looked for
_PER_TASK = {"CPU": 1.0}
_RETRIES = 3  # of work lost with its node or process; an exception of the work itself is not retried


def run_tasks(
    stage: str,
    function: Callable[..., Any],
    arguments: Iterable[tuple],
    cluster: ClusterConfig,
    on_done: Callable[[int], None] = lambda done: None,
) -> list[Any]:
    """Call `function(*each)` for each of `arguments` in Ray tasks; results in order.

    Arguments are taken a few tasks ahead of those that run. `on_done` is told how many are done. A task may take as
    long as it wants, but is started again when its process hangs. Raises `InputError` or `RunError`.
    """

    def task(number: int, each: tuple) -> Any:
        with at_work(f"{stage}, task {number}"):
            return function(*each)

    remote = ray.remote(num_cpus=1, max_retries=_RETRIES)(task).options(name=stage)
    at_once = max(_AT_LEAST, _AHEAD * int(ray.cluster_resources().get("CPU", 0)))
    calls = (remote.remote(*each) for each in enumerate(arguments))
    return _collect(stage, calls, at_once, cluster, _PER_TASK, on_done)


def run_on_parts(
    stage: str, make_worker: Callable[[], Any], parts: list[int], num_workers: int, use_gpu: bool,
    cluster: ClusterConfig,
) -> list[Any]:  # fmt: skip
    """Deal parts to actors; each builds one `make_worker()` and calls it on its parts in turn. Results in part order.

    An actor that is lost starts again elsewhere and takes its unfinished parts up.
    """
    resources = {"CPU": 1.0} | ({"GPU": 1.0} if use_gpu else {})
    actor = ray.remote(
        num_cpus=1, num_gpus=1 if use_gpu else 0, max_restarts=_RETRIES, max_task_retries=_RETRIES
    )(_PartActor)  # fmt: skip
    actors = [actor.remote() for _ in range(min(num_workers, len(parts)))]
    try:
        work = (actors[index % len(actors)].run.remote(stage, make_worker, part) for index, part in enumerate(parts))
        return _collect(stage, work, len(parts), cluster, resources)  # all, or an actor would wait for another's part
    finally:
        for each in actors:
            ray.kill(each)


class _PartActor:
    def __init__(self) -> None:
        self._worker: Any = None

    def run(self, stage: str, make_worker: Callable[[], Any], part: int) -> Any:
        with at_work(f"{stage}, part {part}"):
            # Not built in __init__, where an InputError would arrive wrapped in the actor's death.
            self._worker = self._worker or make_worker()
            return self._worker(part)


@contextlib.contextmanager
def at_work(who: str) -> Iterator[None]:
    """Forward warnings and send signs of life while in this block; a disk that fills up is said to be this host's."""
    with warnings_of(who), signs_of_life(who, computes=True), disk_full_here():
        yield


def _collect(
    stage: str, calls: Iterator[Any], at_once: int, cluster: ClusterConfig, resources: dict[str, float],
    on_done: Callable[[int], None] = lambda done: None,
) -> list[Any]:  # fmt: skip
    """Results of calls, `at_once` of which are under way at most; `calls` makes one when it is asked for."""
    refs = list(islice(calls, at_once))
    pending = list(refs)
    watch = Watch(cluster, stage)
    try:
        while pending:
            done, pending = ray.wait(pending, num_returns=1, timeout=_WAIT_S)
            if watch.look() > cluster.start_timeout_s and not done:
                raise RunError(
                    f"{stage}: no worker started within {cluster.start_timeout_s:g} s (cluster.start_timeout_s): "
                    f"{describe_room(resources)}. Add hosts, or wait until others are done"
                )
            if done:
                ray.get(done)
                for ref in islice(calls, 1):
                    refs.append(ref)
                    pending.append(ref)
                on_done(len(refs) - len(pending))
    except BaseException as error:
        for ref in pending:
            ray.cancel(ref)
        if isinstance(error, RAY_FAILURES):
            raise explain(error, stage) from None
        raise
    return ray.get(refs)
