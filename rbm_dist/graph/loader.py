"""Batches made ahead: one background thread samples and gathers while the trainer computes on the batch before.

While it runs, that thread alone reads the store: samplers are not thread-safe, and arrays are mapped when first asked
for. So a job takes all that a batch needs out of the store, and the consumer touches the model alone.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from itertools import islice
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Generic, TypeVar

from rbm_dist.errors import RunError

T = TypeVar("T")


class Prefetch(Generic[T]):
    """The results of some jobs, in order, made by one background thread up to `depth` ahead of their consumer.

    `with Prefetch(…) as batches: for batch in batches: …`. Leaving the block, in whatever way, ends the thread after
    the job at hand. A job's exception is raised where its result would have come. While the consumer has a result, at
    most `depth` others are alive; with `depth` 0 the consumer's own thread does the jobs. `finish` is what that thread
    does with each result. Raises `RunError`, which says by `what` what did not come, after a wait of `timeout_s`.
    """

    def __init__(
        self, what: str, jobs: Iterable[Callable[[], T]], timeout_s: float, depth: int = 2,
        finish: Callable[[T], T] = lambda result: result,
    ):  # fmt: skip
        self._wait_s, self._finish = 0.0, finish
        self._what, self._jobs, self._timeout_s, self._depth = what, iter(jobs), timeout_s, depth
        self._ahead: deque[Future[T]] = deque()
        # Jobs, each with where its result goes; None ends the thread. The consumer adds one for each that it takes.
        self._queue: SimpleQueue[tuple[Future[T], Callable[[], T]] | None] = SimpleQueue()
        # Not a ThreadPoolExecutor: at exit the interpreter waits for its threads, for ever if storage does not answer.
        self._thread = Thread(target=self._work, name=f"prefetch {what}", daemon=True)
        self._missed = False  # a deadline

    def __enter__(self) -> Iterator[T]:
        try:
            self._submit(self._depth)
            self._thread.start()
        except BaseException as error:  # an interrupt: nobody calls __exit__ then
            self.__exit__(type(error), error, None)
            raise
        return self._results()

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()
        self._queue.put(None)
        if not self._missed and self._thread.ident is not None:  # else it would be waited for twice, or never started
            self._thread.join(self._timeout_s)
            if self._thread.is_alive() and error is None:
                raise self._miss()

    def take_wait_s(self) -> float:
        """Seconds that the consumer has waited since the last call."""
        waited, self._wait_s = self._wait_s, 0.0
        return waited

    def _results(self) -> Iterator[T]:
        while self._ahead:
            yield self._finish(self._take())
        for job in self._jobs:  # none are left, unless `depth` is 0
            with self._waiting():
                result = job()
            yield self._finish(result)

    def _take(self) -> T:
        future = self._ahead.popleft()
        with self._waiting():
            wait([future], self._timeout_s)
        if not future.done():
            raise self._miss()
        self._submit(1)
        return future.result()

    def _submit(self, count: int) -> None:
        for job in islice(self._jobs, count):
            self._ahead.append(Future())
            self._queue.put((self._ahead[-1], job))

    def _work(self) -> None:
        while self._do_one():
            pass

    def _do_one(self) -> bool:
        # A function of its own: while the thread waits for the next job it must not hold the last one's result.
        item = self._queue.get()
        if item is None:
            return False
        future, job = item
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)
        return True

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._wait_s += time.perf_counter() - start

    def _miss(self) -> RunError:
        self._missed = True
        return RunError(
            f"{self._what}: none came for {self._timeout_s:g} s; if storage is only slow, raise "
            "cluster.collective_timeout_s"
        )
