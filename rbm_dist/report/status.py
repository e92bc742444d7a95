"""How far a run is, as `status.json` in its directory: kept by the driver, for `rbm-dist status` and other programs.

It is written by a thread of its own, so that storage that is slow or away delays nothing, and it only reports: what
goes wrong with it is said once, and the run goes on.
"""

import logging
import threading
import time
from typing import Any

from rbm_dist import storage
from rbm_dist.report.metrics import Row
from rbm_dist.report.progress import LoopProgress

_EVERY_S, _EVERY_REMOTE_S = 5.0, 30.0
_LAST_S = 10.0  # longest wait for the last word
_log = logging.getLogger(__name__)

Figures = dict[str, float]


class RunStatus:
    """Keeps `<run>/status.json` up to date while it is open. A context manager, which tells how the run ended.

    `stages`: the seconds that each stage took, in their order; None for those that are still to do.
    `owner`: who is at work, as `stages.lease` says it.
    """

    def __init__(self, run_url: str, stages: dict[str, float | None], owner: dict[str, Any]):
        self.run_url = run_url
        self._url = storage.join(run_url, "status.json")
        self._every_s = _EVERY_S if storage.is_local(run_url) else _EVERY_REMOTE_S
        self._stages, self._owner = stages, owner
        self._begun: tuple[str, float] | None = None
        self._loops: dict[str, dict[str, Any]] = {}
        self._rows: dict[str, Row] = {}  # of the last epoch, by loop
        self._checkpoint: dict[str, Any] | None = None
        self._end: dict[str, Any] = {"state": "at work", "error": None}
        self._lock = threading.Lock()
        self._due, self._closed, self._warned = threading.Event(), False, False
        self._thread = threading.Thread(target=self._run, name="status", daemon=True)

    def __enter__(self) -> "RunStatus":
        self._due.set()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        with self._lock:
            self._loops = {}
            self._end = {"state": "done", "error": None}
            if kind is not None:
                signals = {KeyboardInterrupt: "interrupted", SystemExit: "terminated"}
                self._end = {"state": "stopped", "error": signals.get(kind) or str(error) or kind.__name__}
        self._closed = True
        self._due.set()
        self._thread.join(_LAST_S)

    def begin(self, stage: str) -> None:
        """A stage is at work from now on."""
        with self._lock:
            self._begun = (stage, time.monotonic())
        self._due.set()

    def finish(self, stage: str, seconds: float) -> None:
        """A stage is done."""
        with self._lock:
            self._stages[stage], self._begun, self._loops = seconds, None, {}
        self._due.set()

    def progress(self, loop: str, at: LoopProgress, epoch: int | None = None, figures: Figures | None = None) -> None:
        """How far a loop is; `epoch` and `figures` are those of its last heartbeat."""
        left_s = None if at.left_s is None else round(at.left_s, 1)
        shown = {"done": at.done, "total": at.total, "unit": at.unit, "rate": at.rate, "left_s": left_s}
        with self._lock:
            last = self._rows.get(loop, {})
            said = {"note": at.note, "epoch": epoch, "figures": figures or {}, "last_epoch": last}
            self._loops[loop] = {**shown, **said, "heard": time.time()}

    def epoch(self, loop: str, row: Row) -> None:
        """A training loop finished an epoch, with these figures."""
        with self._lock:
            self._rows[loop] = row

    def end_loop(self, loop: str) -> None:
        """A loop is no longer at work."""
        with self._lock:
            self._loops.pop(loop, None)
            self._rows.pop(loop, None)

    def checkpoint(self, loop: str, step: int) -> None:
        """A training loop has just saved a checkpoint."""
        with self._lock:
            self._checkpoint = {"loop": loop, "step": step, "time": time.time()}

    def snapshot(self) -> dict[str, Any]:
        """What the file would say now."""
        with self._lock:
            stages = [
                {"name": name, "state": "waiting" if took is None else "done", "seconds": took}
                for name, took in self._stages.items()
            ]
            if self._begun is not None:
                name, since = self._begun
                at_work = next(stage for stage in stages if stage["name"] == name)
                state = "at work" if self._end["state"] == "at work" else "stopped"
                at_work |= {"state": state, "seconds": round(time.monotonic() - since, 3)}
            return {
                **self._end, "written": round(time.time(), 3), "every_s": self._every_s, "owner": self._owner,
                "stages": stages, "loops": dict(self._loops), "checkpoint": self._checkpoint,
            }  # fmt: skip

    def _run(self) -> None:
        closed = False
        while not closed:
            self._due.wait(self._every_s)
            self._due.clear()
            closed = self._closed
            try:
                storage.write_json(self._url, self.snapshot())
            except Exception as error:
                if not self._warned:
                    _log.warning("%s: cannot be written, and rbm-dist status will not know of this run: %s",
                                 self._url, error)  # fmt: skip
                self._warned = True
