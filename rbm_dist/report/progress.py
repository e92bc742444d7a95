"""Progress of long work on the terminal: a bar with rate and time left, or plain lines where there is no terminal."""

import time
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

_LINE_EVERY_S = 10.0
_LINE_AT_LEAST_EVERY_S = 30.0


@dataclass
class LoopProgress:
    """How far a loop is, and how fast it went since it began, or went on, under this driver."""

    done: int
    total: int
    unit: str
    note: str
    began: float  # monotonic seconds, as all times here
    first: int  # units that were done when it began
    heard: float  # when it was last updated
    line: float = float("-inf")  # when a line of it was last printed

    @property
    def rate(self) -> float:
        """Units per second; 0 while it is not known."""
        return (self.done - self.first) / (self.heard - self.began) if self.heard > self.began else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds that are left at this rate; None while it is not known."""
        return (self.total - self.done) / self.rate if self.rate else None

    def update(self, now: float, done: int, total: int, unit: str, note: str) -> None:
        if unit != self.unit or done < self.done:  # a group that was lost goes on from its last checkpoint
            self.began, self.first = now, done
        self.done, self.total, self.unit, self.note, self.heard = done, total, unit, note, now


class ProgressBars:
    """One bar per loop, shown while it is at work. A context manager."""

    def __init__(self, console: Console):
        self._console = console
        self._bars = Progress(
            TextColumn("  {task.description:<16}"),
            BarColumn(bar_width=28),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self.loops: dict[str, LoopProgress] = {}  # that are at work

    def __enter__(self) -> "ProgressBars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, loop: str, done: int, total: int, unit: str, note: str = "") -> None:
        """Show that `done` of `total` units of a loop are done."""
        now = time.monotonic()
        if loop not in self.loops:
            self.loops[loop] = LoopProgress(done, total, unit, note, now, done, now)
            self._tasks[loop] = self._bars.add_task(loop, total=total, completed=done, unit=unit, rate="", note="")
        at = self.loops[loop]
        at.update(now, done, total, unit, note)
        shown = f"{at.rate:,.1f} {unit}/s" if at.rate else ""
        self._bars.update(self._tasks[loop], completed=done, total=total, unit=unit, rate=shown, note=note)
        if now - at.line > _LINE_EVERY_S and done < total:
            self._line(loop, now)

    def tick(self) -> None:
        """Print a line of each loop that has had none for half a minute, and say so if it was not heard of either."""
        now = time.monotonic()
        for loop, at in self.loops.items():
            if now - at.line > _LINE_AT_LEAST_EVERY_S and at.done < at.total:
                self._line(loop, now)

    def _line(self, loop: str, now: float) -> None:
        at = self.loops[loop]
        at.line = now
        if self._console.is_terminal:
            return
        left = f", {at.left_s:,.0f} s left" if at.left_s is not None else ""
        silent = now - at.heard
        heard = f" (no word for {silent:,.0f} s)" if silent > _LINE_AT_LEAST_EVERY_S else ""
        line = f"  {loop}: {at.done:,}/{at.total:,} {at.unit}{left} {at.note}".rstrip() + heard
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def finish(self, loop: str) -> None:
        """Take a loop's bar away."""
        if loop in self._tasks:
            self._bars.remove_task(self._tasks.pop(loop))
        self.loops.pop(loop, None)

    def print(self, text: str) -> None:
        self._console.print(Text.from_markup(text))
