"""The mailbox between a driver and its workers: one small actor, which the driver asks and workers write to.

Workers say how they fare and that they are alive; the driver says what a training group is to do. No call fails for who
makes it: a mailbox that is late is asked again, one that is lost starts again.
"""

import contextlib
from collections import deque
from typing import TYPE_CHECKING, Any

import ray

from rbm_dist.report.metrics import Row
from rbm_dist.runtime.liveness import MAILBOX, Sign, Signs
from rbm_dist.runtime.placement import lasting_host

if TYPE_CHECKING:
    from rbm_dist.parallel.pace import Order

_ANSWER_S = 5.0  # longest wait for one answer
_END_S = 30.0  # longest wait at the end of a loop, for a mailbox that starts again


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
