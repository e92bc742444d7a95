"""Progress, metrics and warnings from workers to the driver, through one small actor that the driver polls.

None of it can fail a stage whose work succeeded: a mailbox that is late is asked again, one that is lost starts again,
and what a training loop's rows missed is written when the loop ends. What cannot be written is said, once.
"""

import asyncio
import contextlib
import logging
import textwrap
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError
from rich.markup import escape

from rbm_dist.report.metrics import MetricsWriter, Row
from rbm_dist.report.progress import ProgressBars
from rbm_dist.report.status import RunStatus
from rbm_dist.runtime.liveness import MAILBOX, Sign, Signs
from rbm_dist.runtime.placement import lasting_host
from rbm_dist.runtime.prometheus import ExportedMetrics

if TYPE_CHECKING:
    from rbm_dist.parallel.pace import Order

_POLL_S = 0.25
_ANSWER_S = 5.0  # longest wait for one answer of the mailbox
_END_S = 30.0  # longest wait at the end of a loop, for a mailbox that starts again
_LAST_S = 60.0  # longest wait for the last messages of a stage that succeeded
_SHOWN = 20  # different warnings of one place in the code that are shown; more are counted
_log = logging.getLogger(__name__)


class Reporter:
    """A worker's end: cheap calls that never fail, and wait at the end of a loop at most. Sent to workers by value."""

    def __init__(self, actor: Any):
        self._actor = actor

    def begin(self, loop: str, history: list[Row]) -> None:
        """A training loop starts, or goes on after these epochs."""
        self._actor.put.remote({"kind": "begin", "loop": loop, "history": history})

    def progress(self, loop: str, done: int, total: int, unit: str, note: str = "") -> None:
        self._actor.put.remote({"kind": "progress", "loop": loop, "bar": (done, total, unit, note)})

    def order(self) -> "Order":
        """What the driver wants; asked by rank 0, about once a second."""
        with contextlib.suppress(Exception):
            return ray.get(self._actor.order.remote(), timeout=_ANSWER_S)
        return "go"

    def tell(self, order: "Order") -> None:
        """The driver's word, until it says another. A mailbox that starts again forgets it."""
        self._actor.tell.remote(order)

    def hand_out(self, number: int, job: Any) -> None:
        """The driver's: the job of this number for a training group; None says that there will be no more."""
        self._actor.hand_out.remote(number, job)

    def job(self, number: int, rank: int) -> tuple[Any] | None:
        """A training worker's: the job of this number, if it is there; asking says that those before are done."""
        with contextlib.suppress(Exception):
            return ray.get(self._actor.job.remote(number, rank), timeout=_ANSWER_S)
        return None

    def jobs_done(self) -> int:
        """The driver's: the jobs of all lower numbers are done."""
        with contextlib.suppress(Exception):
            return ray.get(self._actor.jobs_done.remote(), timeout=_ANSWER_S)
        return 0

    def add(self, loop: str, amount: int, total: int, unit: str) -> None:
        """Some more units are done, of a total that several workers share."""
        self._actor.put.remote({"kind": "add", "loop": loop, "amount": amount, "total": total, "unit": unit})

    def heartbeat(self, loop: str, epoch: int, step: int, steps: int, figures: dict[str, float]) -> None:
        """A training loop is alive: `step` of all its `steps`, over all epochs, are done; it is in `epoch`, from 0.

        About once a second, from rank 0. `figures`: of all ranks, measured since the last one; `rows_per_s` is shown.
        """
        beat = {"epoch": epoch, "step": step, "steps": steps, "figures": figures}
        self._actor.put.remote({"kind": "heartbeat", "loop": loop, **beat})

    def saved(self, loop: str, step: int) -> None:
        """A training loop has a whole checkpoint of its state after so many steps."""
        self._actor.put.remote({"kind": "saved", "loop": loop, "step": step})

    def metrics(self, loop: str, row: Row) -> None:
        """One epoch's figures."""
        self._actor.put.remote({"kind": "metrics", "loop": loop, "row": row})

    def end(self, loop: str, history: list[Row]) -> None:
        """A training loop ended with these epochs: rows that were lost with a mailbox are written now."""
        put = self._actor.put.remote({"kind": "end", "loop": loop, "history": history})
        with contextlib.suppress(Exception):
            ray.get(put, timeout=_END_S)


@contextlib.contextmanager
def warnings_of(who: str) -> Iterator[None]:
    """Forward the warnings of this block, which a process works at that may end with it."""
    forwarder = forward_warnings(who)
    try:
        yield
    finally:
        forwarder.wait()


def forward_warnings(who: str) -> "_Forwarder":
    """From now on what this process logs as a warning or worse is shown by the driver too, as said by `who`."""
    root = logging.getLogger()
    forwarder = next((each for each in root.handlers if isinstance(each, _Forwarder)), None)
    if forwarder is None:
        forwarder = _Forwarder()
        root.addHandler(forwarder)
    forwarder.who = who
    return forwarder


class _Forwarder(logging.StreamHandler):
    """Writes to stderr, that is to Ray's logs of this node, and into the mailbox."""

    who = ""

    def __init__(self) -> None:
        super().__init__()
        self.setLevel(logging.WARNING)
        self._mailbox: Any = None
        self._sent: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        super().emit(record)
        with contextlib.suppress(Exception):  # no driver listens
            self._mailbox = self._mailbox or ray.get_actor(MAILBOX)
            text = record.getMessage() + (f": {record.exc_info[1]!r}" if record.exc_info else "")
            place = f"{record.name}:{record.lineno}"
            self._sent = self._mailbox.put.remote({"kind": "warning", "who": self.who, "text": text, "place": place})

    def wait(self) -> None:
        """Wait until what was sent has arrived."""
        sent, self._sent = self._sent, None
        if sent is not None:
            with contextlib.suppress(Exception):
                ray.get(sent, timeout=_ANSWER_S)

    async def arrived(self) -> None:
        """As `wait`, in an actor that goes on with other calls meanwhile."""
        sent, self._sent = self._sent, None
        if sent is not None:
            with contextlib.suppress(Exception):
                await asyncio.wait_for(sent, _ANSWER_S)


class _Mailbox:
    def __init__(self) -> None:
        self._messages: deque[dict[str, Any]] = deque()
        self._order: Order = "go"
        self._signs = Signs()
        self._job: tuple[int, Any] = -1, None
        self._asked: dict[int, int] = {}  # by rank, the number of the job that it asked for last

    def put(self, message: dict[str, Any]) -> None:
        self._messages.append(message)

    def drain(self) -> list[dict[str, Any]]:
        return [self._messages.popleft() for _ in range(len(self._messages))]

    def tell(self, order: "Order") -> None:
        self._order = order

    def order(self) -> "Order":
        return self._order

    def hand_out(self, number: int, job: Any) -> None:
        self._job = number, job

    def job(self, number: int, rank: int) -> tuple[Any] | None:
        self._asked[rank] = number
        there, job = self._job
        return (job,) if there == number else None

    def jobs_done(self) -> int:
        return self._asked.get(0, 0)

    def sign(self, sign: Sign) -> None:
        self._signs.add(sign)

    def drop(self, node_id: str, pid: int) -> None:
        self._signs.drop(node_id, pid)

    def overdue(self, silence_s: float, idle_s: float) -> list[tuple[Sign, str]]:
        return self._signs.overdue(silence_s, idle_s)

    def working(self, stage: str) -> bool:
        return self._signs.working(stage)


def start_mailbox() -> Any:
    """The mailbox of this driver, a new one unless there is one; it ends when what this gives is dropped.

    It is on the driver's own node, unless that may be preempted. Calls outlive the actor's process.
    """
    mailbox = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(_Mailbox)
    return mailbox.options(name=MAILBOX, get_if_exists=True, **lasting_host()).remote()


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
        if kind == "warning":
            self._warn(**{key: message[key] for key in ("who", "text", "place")})
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

    def _warn(self, who: str, text: str, place: str) -> None:
        shown = self._warned.setdefault(place, set())
        if text in shown or len(shown) >= _SHOWN:  # all ranks say the same, or one says it at every step
            self._repeated[place] += 1
            return
        shown.add(text)
        self._bars.print(f"  [yellow]![/] {escape(who)}: {escape(text)}")
