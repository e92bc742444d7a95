"""Progress of long work on the terminal: a bar with rate and time left, or plain lines where there is no terminal."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

_LINE_EVERY_S = 10.0


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
        self._began: dict[str, tuple[float, int]] = {}
        self._line_at = 0.0

    def __enter__(self) -> "ProgressBars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, loop: str, done: int, total: int, unit: str, note: str = "") -> None:
        """Show that `done` of `total` units of a loop are done."""
        now = time.monotonic()
        began, start = self._began.setdefault(loop, (now, done))
        rate = (done - start) / (now - began) if now > began else 0.0
        shown = f"{rate:,.1f} {unit}/s" if rate else ""
        if loop not in self._tasks:
            self._tasks[loop] = self._bars.add_task(loop, total=total, completed=done, unit=unit, rate="", note="")
        self._bars.update(self._tasks[loop], completed=done, total=total, rate=shown, note=note)
        if not self._console.is_terminal and now - self._line_at > _LINE_EVERY_S and done < total:
            self._line_at = now
            left = f", {(total - done) / rate:,.0f} s left" if rate else ""
            self._console.print(f"  {loop}: {done:,}/{total:,} {unit}{left} {note}".rstrip(), highlight=False)

    def finish(self, loop: str) -> None:
        """Take a loop's bar away."""
        if loop in self._tasks:
            self._bars.remove_task(self._tasks.pop(loop))
        self._began.pop(loop, None)

    def print(self, text: str) -> None:
        self._console.print(Text.from_markup(text))
