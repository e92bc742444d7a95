"""Ray tasks, and actors that work through the parts of the graph."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from rbm_dist.config.run import ClusterConfig
from rbm_dist.errors import RunError, disk_full_here
from rbm_dist.runtime.failures import explain
from rbm_dist.runtime.liveness import Watch, signs_of_life
from rbm_dist.runtime.placement import PartQueue, describe_room, this_host, working_hosts
from rbm_dist.runtime.worker_logs import warnings_of

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
    return _collect(stage, calls, at_once, cluster, on_done)


def run_on_parts(stage: str, make_worker: Callable[[], Any], parts: list[int], cluster: ClusterConfig) -> list[Any]:
    """Call a `make_worker()` on every part, in inference actors that each build one. Results in the order of `parts`.

    An actor that is free takes the next part, of those that are at home on its host as long as there are any. The part
    of an actor that is lost, or hangs, is taken by another, and a new actor starts in its place. Raises `InputError` or
    `RunError`.
    """
    num_workers, use_gpu = cluster.inference_workers, cluster.use_gpu
    wait = _Wait(stage, cluster, cluster.worker_resources)
    queue = PartQueue(parts, working_hosts(use_gpu))
    actor = ray.remote(_PartActor).options(
        num_cpus=1, num_gpus=1 if use_gpu else 0, scheduling_strategy="DEFAULT" if use_gpu else "SPREAD"
    )
    results: dict[int, Any] = {}
    losses: Counter[int | None] = Counter()  # by part; None: of actors before their first
    hosts: dict[Any, str] = {}  # of the actors that are there
    free: list[Any] = []
    asked: dict[Any, tuple[Any, int | None]] = {}  # an actor's part; None: asked where it is

    def start() -> None:
        new = actor.remote()
        asked[new.host.remote()] = new, None

    try:
        for _ in range(min(num_workers, len(parts))):
            start()
        while len(results) < len(parts):
            done, _ = wait.next([*asked])
            if not done:
                continue
            worker, part = asked.pop(done[0])
            try:
                answer = ray.get(done[0])
            except RayActorError as error:
                losses[part] += 1
                if losses[part] > (_RETRIES * num_workers if part is None else _RETRIES):
                    raise explain(error, stage) from None
                ray.kill(worker)  # it may be out of reach only
                if part is not None:
                    queue.give_back(part)
                start()
            except RayError as error:
                raise explain(error, stage) from None
            else:
                if part is None:
                    hosts[worker] = answer
                else:
                    results[part] = answer
                free.append(worker)
            while free and (next_part := queue.take(hosts[free[0]])) is not None:
                worker = free.pop(0)
                asked[worker.run.remote(stage, make_worker, next_part)] = worker, next_part
        return [results[part] for part in parts]
    finally:
        for each in {worker for worker, _ in asked.values()} | {*free}:
            ray.kill(each)


class _PartActor:
    def __init__(self) -> None:
        self._worker: Any = None

    def host(self) -> str:
        return this_host()

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
    stage: str, calls: Iterator[Any], at_once: int, cluster: ClusterConfig, on_done: Callable[[int], None]
) -> list[Any]:
    """Results of calls, `at_once` of which are under way at most; `calls` makes one when it is asked for."""
    refs = list(islice(calls, at_once))
    pending = list(refs)
    wait = _Wait(stage, cluster, _PER_TASK)
    try:
        while pending:
            done, pending = wait.next(pending)
            if done:
                ray.get(done)
                for ref in islice(calls, 1):
                    refs.append(ref)
                    pending.append(ref)
                on_done(len(refs) - len(pending))
    except BaseException as error:
        for ref in pending:
            ray.cancel(ref)
        if isinstance(error, RayError):
            raise explain(error, stage) from None
        raise
    return ray.get(refs)


class _Wait:
    """Waits for results of workers that may not start, or hang."""

    def __init__(self, stage: str, cluster: ClusterConfig, resources: dict[str, float]):
        self._stage, self._start_timeout_s, self._resources = stage, cluster.start_timeout_s, resources
        self._watch = Watch(cluster, stage)

    def next(self, pending: list[Any]) -> tuple[list[Any], list[Any]]:
        """One that is done, if any is soon, and the others. Raises `RunError` when nobody has started in time."""
        done, pending = ray.wait(pending, num_returns=1, timeout=_WAIT_S)
        if self._watch.look() > self._start_timeout_s and not done:
            raise RunError(
                f"{self._stage}: no worker started within {self._start_timeout_s:g} s (cluster.start_timeout_s): "
                f"{describe_room(self._resources)}. Add hosts, or wait until others are done"
            )
        return done, pending
