"""Rows of concurrent requests, computed together while the engine is busy, and at once while it is not.

Nothing ever waits for company. Few rows are computed right on the event loop, as handing them to a thread would take
longer than they do; more go to a thread, one batch at a time, and what arrives meanwhile is the next batch.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from rbm_dist.errors import InputError
from rbm_dist.serve.loaded import LoadedStudent

Inputs = dict[str, np.ndarray]
_MAX_BATCH = 4096
# A hop to a thread and back takes some 100 µs; so long may others wait for rows that are spared it.
_ON_LOOP_S = 300e-6


class _Asked(NamedTuple):
    inputs: Inputs
    answer: asyncio.Future[np.ndarray]


class Batcher:
    """One student's engine and those who wait for it. All methods but the engine's run on the event loop."""

    def __init__(self, student: LoadedStudent, on_batch: Callable[[int], None], rows_on_loop: int):
        """on_batch: told the rows of each batch. rows_on_loop: see `rows_on_loop`."""
        self._student, self._on_batch, self._rows_on_loop = student, on_batch, rows_on_loop
        self._waiting: deque[_Asked] = deque()
        self._busy = False

    @property
    def waiting(self) -> int:
        """Requests that wait for the engine."""
        return len(self._waiting)

    async def probabilities(self, inputs: Inputs) -> np.ndarray:
        """As `LoadedStudent.probabilities`."""
        rows = _rows(inputs)
        if not self._busy and rows <= self._rows_on_loop:
            self._on_batch(rows)
            return self._student.probabilities(inputs)
        asked = _Asked(inputs, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        if not self._busy:
            self._start()
        return await asked.answer

    def _start(self) -> None:
        batch = [self._waiting.popleft()]
        rows = _rows(batch[0].inputs)
        while self._waiting and rows + _rows(self._waiting[0].inputs) <= _MAX_BATCH:
            batch.append(self._waiting.popleft())
            rows += _rows(batch[-1].inputs)
        self._busy = True
        self._on_batch(rows)
        loop = asyncio.get_running_loop()
        computed = loop.run_in_executor(None, self._compute, [asked.inputs for asked in batch])
        computed.add_done_callback(lambda done: self._finish(batch, done))

    def _finish(self, batch: list[_Asked], done: "asyncio.Future[list[np.ndarray | Exception]]") -> None:
        self._busy = False
        failed = done.exception()
        answers = done.result() if failed is None else [RuntimeError(str(failed))] * len(batch)
        for asked, answer in zip(batch, answers, strict=True):
            if asked.answer.done():  # given up by who asked
                continue
            if isinstance(answer, Exception):
                asked.answer.set_exception(answer)
            else:
                asked.answer.set_result(answer)
        if self._waiting:
            self._start()

    def _compute(self, batch: list[Inputs]) -> "list[np.ndarray | Exception]":
        joined = {name: np.concatenate([each[name] for each in batch]) for name in batch[0]}
        try:
            probability_BC = self._student.probabilities(joined)
        except InputError as error:
            if len(batch) == 1:
                return [error]
            # One of them is at fault: each alone, so that only that one is refused, by its own row numbers.
            return [answer for each in batch for answer in self._compute([each])]
        ends = np.cumsum([_rows(each) for each in batch])[:-1]
        return list(np.split(probability_BC, ends))


def rows_on_loop(student: LoadedStudent) -> int:
    """Up to how many rows are computed sooner than a thread has begun: a power of two; 0: not even one. Measured."""
    found = 0
    for rows in (1 << power for power in range(11)):
        inputs = blank(student, rows)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            student.probabilities(inputs)
            times.append(time.perf_counter() - start)
        if min(times) > _ON_LOOP_S:
            break
        found = rows
    return found


def blank(student: LoadedStudent, rows: int) -> Inputs:
    """Rows of zeros."""
    return {name: np.zeros((rows, width), np.float32) for name, width in student.inputs.items()}


def _rows(inputs: Inputs) -> int:
    return len(next(iter(inputs.values())))
