"""Progress and metrics from workers to the driver, through one small actor that the driver polls."""

import threading
from collections import deque
from typing import Any

import ray

from rbm_dist.report.metrics import MetricsWriter, Row
from rbm_dist.report.progress import ProgressBars

_POLL_S = 0.25


class Reporter:
    """A worker's end: cheap calls that never wait. Sent to workers by value."""

    def __init__(self, actor: Any):
        self._actor = actor

    def begin(self, loop: str, history: list[Row]) -> None:
        """A training loop starts, or goes on after these epochs."""
        self._actor.put.remote({"kind": "begin", "loop": loop, "history": history})

    def progress(self, loop: str, done: int, total: int, unit: str, note: str = "") -> None:
        self._actor.put.remote({"kind": "progress", "loop": loop, "bar": (done, total, unit, note)})

    def add(self, loop: str, amount: int, total: int, unit: str) -> None:
        """Some more units are done, of a total that several workers share."""
        self._actor.put.remote({"kind": "add", "loop": loop, "amount": amount, "total": total, "unit": unit})

    def metrics(self, loop: str, row: Row) -> None:
        """One epoch's figures."""
        self._actor.put.remote({"kind": "metrics", "loop": loop, "row": row})


class _Mailbox:
    def __init__(self) -> None:
        self._messages: deque[dict[str, Any]] = deque()

    def put(self, message: dict[str, Any]) -> None:
        self._messages.append(message)

    def drain(self) -> list[dict[str, Any]]:
        return [self._messages.popleft() for _ in range(len(self._messages))]


class ProgressRelay:
    """The driver's end: a thread that shows bars and writes metrics while a stage is at work. A context manager."""

    def __init__(self, bars: ProgressBars, metrics: MetricsWriter):
        self._bars, self._metrics = bars, metrics
        self._actor = ray.remote(num_cpus=0)(_Mailbox).remote()
        self.reporter = Reporter(self._actor)
        self._added: dict[str, int] = {}
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> "ProgressRelay":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._error is None:
            self._poll()
        ray.kill(self._actor)

    def check(self) -> None:
        """Raise what went wrong while writing metrics (a full disk, say)."""
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while not self._stop.wait(_POLL_S):
            try:
                self._poll()
            except Exception as error:  # handed to the driver by `check`
                self._error = error
                return

    def _poll(self) -> None:
        for message in ray.get(self._actor.drain.remote(), timeout=60):
            loop = message["loop"]
            if message["kind"] == "begin":
                self._metrics.begin(loop, message["history"])
            elif message["kind"] == "metrics":
                self._metrics.write(loop, message["row"])
            else:
                if message["kind"] == "add":
                    self._added[loop] = self._added.get(loop, 0) + message["amount"]
                    bar = (self._added[loop], message["total"], message["unit"], "")
                else:
                    bar = message["bar"]
                self._bars.update(loop, *bar)
                if bar[0] >= bar[1]:
                    self._bars.finish(loop)
