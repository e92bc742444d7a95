"""When all ranks of a training loop stop and ask what to do, and what rank 0 answers: to go on, to save, to leave.

Rank 0 alone has a clock that counts and a driver to ask. With each answer it says after how many steps all ranks ask
again: about a second, by how long steps take, so that steps in between need no exchange of any kind. The exchange is
a sum in which rank 0 alone speaks for the answer, and every rank for how it fares.
"""

import time
from typing import Literal, Protocol

from torch import Tensor

from rbm_dist.moe.collectives import traffic
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.reduce import sum_figures

Order = Literal["go", "save", "leave"]
"""To go on, to save a checkpoint and go on, to save one and leave."""

_ORDERS: tuple[Order, ...] = ("go", "save", "leave")
_ASK_S = 1.0
_GROWTH = 2  # the most by which a distance grows at once: a few quick steps tell little of the next


class Reports(Protocol):
    """Whom rank 0 asks, and tells how the loop fares. None of it may fail or take long."""

    def order(self) -> Order:
        """What the driver wants of the group."""
        ...

    def heartbeat(self, loop: str, epoch: int, step: int, steps: int, figures: dict[str, float]) -> None:
        """`step` of `steps` over all epochs are done. `figures`: since the last one, of all ranks."""
        ...

    def saved(self, loop: str, step: int) -> None:
        """There is a whole checkpoint of the state after so many steps."""
        ...


class Pace:
    """Counts a loop's steps until all ranks ask. `minutes`: rank 0 orders a checkpoint when the last is so old."""

    def __init__(self, loop: str, reports: Reports, mesh: Mesh, minutes: float | None):
        self._loop, self._reports, self._mesh, self._minutes = loop, reports, mesh, minutes
        self._distance = 1
        self._saved = time.monotonic()
        self._begin()

    def _begin(self) -> None:
        self._asked = time.monotonic()
        self._steps = self._rows = 0
        self._wait_s = self._edges = 0.0
        self._load_E: Tensor | None = None
        self._sent = traffic.sent

    def after_step(self, rows: int, wait_s: float = 0.0, edges: float = 0.0, load_E: Tensor | None = None) -> None:
        """Count a step: its rows over all ranks; and of this rank, how long it waited for them, its edges and experts.

        load_E: how much went to each expert.
        """
        self._steps += 1
        self._rows += rows
        self._wait_s += wait_s
        self._edges += edges
        if load_E is not None:
            self._load_E = load_E if self._load_E is None else self._load_E + load_E

    def saving(self) -> None:
        """A checkpoint is made now."""
        self._saved = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether all ranks ask now. Equal on all of them."""
        return self._steps >= self._distance

    def ask(self, epoch: int, step: int, steps: int, writing: bool, failed: bool) -> tuple[Order, bool]:
        """Rank 0's answer, and whether any rank `failed` to write a checkpoint. Every rank must ask.

        writing: no checkpoint is due by time while one is being written.
        """
        elapsed = max(time.monotonic() - self._asked, 1e-6)
        order, distance = 0, 0
        if self._mesh.rank == 0:
            order = _ORDERS.index(self._reports.order())
            if order == 0 and self._minutes is not None and not writing:
                order = int(time.monotonic() - self._saved >= 60 * self._minutes)
            distance = min(max(1, round(_ASK_S * self._steps / elapsed)), _GROWTH * self._distance)
        load = [] if self._load_E is None else self._load_E.tolist()
        here = [order, distance, failed, self._wait_s, self._edges, traffic.sent - self._sent, *load]
        summed = sum_figures(here, self._mesh)
        self._distance = int(summed[1])
        if self._mesh.rank == 0:
            wait_s, edges, exchanged, *load = summed[3:]
            figures = {"rows_per_s": self._rows / elapsed, "wait_share": wait_s / self._mesh.world_size / elapsed}
            if exchanged:
                figures["exchanged_bytes_per_s"] = exchanged / elapsed
            if edges:
                figures["edges_per_s"] = edges / elapsed
            if sum(load):
                figures["expert_load"] = max(load) * len(load) / sum(load)  # the busiest expert's, of the mean
            self._reports.heartbeat(self._loop, epoch, step, steps, figures)
        self._begin()
        return _ORDERS[int(summed[0])], summed[2] > 0
