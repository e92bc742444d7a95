"""Progress, metrics and warnings at the driver: what workers put into the mailbox is shown, and written.

None of it can fail a stage whose work succeeded: what a training loop's rows missed is written when the loop ends, and
what cannot be written is said, once.
"""

import contextlib
import logging
import textwrap
import threading
import time
from collections import Counter
from typing import Any

import ray
from ray.exceptions import GetTimeoutError
from rich.markup import escape

from rbm_dist.report.metrics import MetricsWriter
from rbm_dist.report.progress import ProgressBars
from rbm_dist.report.status import RunStatus
from rbm_dist.runtime.mailbox import Reporter
from rbm_dist.runtime.prometheus import ExportedMetrics

_POLL_S = 0.25
_ANSWER_S = 5.0  # longest wait for one answer of the mailbox
_LAST_S = 60.0  # longest wait for the last messages of a stage that succeeded
_SHOWN = 20  # different warnings of one place in the code that are shown; more are counted
_log = logging.getLogger(__name__)


class ProgressRelay:
    """The driver's end: a thread that shows bars and warnings and writes metrics while a stage is at work.

    A context manager; one at a time.
    """

    def __init__(
        self, mailbox: Any, bars: ProgressBars, metrics: MetricsWriter | None = None, status: RunStatus | None = None
    ):
        self._mailbox, self._bars, self._metrics, self._status = mailbox, bars, metrics, status
        self._exported = ExportedMetrics(status.run_url) if status else None
        self._asked: Any = None  # a question to the mailbox that is not answered yet
        self.reporter = Reporter(mailbox)
        self._added: Counter[str] = Counter()
        self._loops: set[str] = set()
        self._epochs: dict[str, str] = {}  # by training loop that sends heartbeats, what its last epoch gave
        self._warned: dict[str, set[str]] = {}  # by place, what is shown
        self._repeated: Counter[str] = Counter()  # by place, what is not
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> "ProgressRelay":
        self._thread.start()
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        deadline = time.monotonic() + (_LAST_S if error is None else _ANSWER_S)
        while (handled := self._poll()) != 0 and time.monotonic() < deadline:
            if handled is None:
                time.sleep(_POLL_S)
        if handled != 0 and error is None:
            _log.warning("progress: no answer from the mailbox; metrics.jsonl may lack the last epochs")
        for loop in list(self._loops):
            self._finish(loop)
        for place, count in self._repeated.items():
            like = textwrap.shorten(min(self._warned[place]), 60, placeholder=" …")
            self._bars.print(f"  [yellow]![/] {count:,} more warning(s) like: {escape(like)}")

    def _run(self) -> None:
        while not self._stop.wait(_POLL_S):
            self._poll()
            with contextlib.suppress(Exception):  # it only reports, and the thread must go on
                self._bars.tick()
                if self._status and self._exported:
                    self._exported.publish(self._status.snapshot())

    def _poll(self) -> int | None:
        """Handle what is in the mailbox; gives the number of messages, or None if there is no answer yet."""
        try:
            self._asked = self._asked or self._mailbox.drain.remote()
            messages = ray.get(self._asked, timeout=_ANSWER_S)
        except GetTimeoutError:
            return None  # the answer may still come, with messages that are nowhere else
        except Exception as error:
            _log.debug("progress: %s", error)
            self._asked = None
            return None
        self._asked = None
        for message in messages:
            try:
                self._handle(message)
            except Exception:  # a bar that cannot be drawn is no reason to lose a day's work
                _log.warning("progress: a message could not be shown", exc_info=True)
        return len(messages)

    def _handle(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "log":
            self._say(**{key: message[key] for key in ("who", "text", "place", "warns")})
        elif kind in ("begin", "metrics", "end"):
            self._keep(kind, message)
        elif kind == "saved":
            if self._status:
                self._status.checkpoint(message["loop"], message["step"])
        else:
            self._show(kind, message["loop"], message)

    def _keep(self, kind: str, message: dict[str, Any]) -> None:
        """Write a training loop's epochs to the metrics."""
        loop = message["loop"]
        if kind == "end":
            self._finish(loop)
        elif kind == "metrics" and self._status:
            self._status.epoch(loop, message["row"])
        assert self._metrics is not None
        try:
            if kind == "metrics":
                self._metrics.write(loop, message["row"])
            elif kind == "begin":
                self._metrics.begin(loop, message["history"])
            else:
                self._metrics.end(loop, message["history"])
        except Exception as error:
            self._metrics.failed(error)

    def _show(self, kind: str, loop: str, message: dict[str, Any]) -> None:
        """Show how far a loop is."""
        figures: dict[str, float] = {}
        if kind == "heartbeat":
            figures = message["figures"]
            rows = f", {figures['rows_per_s']:,.0f} rows/s" if "rows_per_s" in figures else ""
            said = self._epochs.setdefault(loop, "")
            bar = (message["step"], message["steps"], "steps", f"epoch {message['epoch']}{rows} {said}".rstrip())
        elif kind == "add":
            self._added[loop] += message["amount"]
            bar = (self._added[loop], message["total"], message["unit"], "")
        else:
            bar = message["bar"]
            if loop in self._epochs and bar[0] < bar[1]:  # its bar is that of its steps
                self._epochs[loop] = bar[3]
                return
        self._loops.add(loop)
        self._bars.update(loop, *bar)
        if self._status:
            self._status.progress(loop, self._bars.loops[loop], message.get("epoch"), figures)
        if bar[0] >= bar[1] and kind != "heartbeat":
            self._finish(loop)

    def _finish(self, loop: str) -> None:
        self._loops.discard(loop)
        self._epochs.pop(loop, None)
        self._bars.finish(loop)
        if self._status:
            self._status.end_loop(loop)

    def _say(self, who: str, text: str, place: str, warns: bool) -> None:
        shown = self._warned.setdefault(place, set())
        if text in shown or len(shown) >= _SHOWN:  # all ranks say the same, or one says it at every step
            self._repeated[place] += 1
            return
        shown.add(text)
        self._bars.print(f"  {'[yellow]![/]' if warns else '[dim]·[/]'} {escape(who)}: {escape(text)}")
