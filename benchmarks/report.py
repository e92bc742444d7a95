"""What every benchmark has in common: `--quick`, `--json FILE`, median times, and a table of ratios against targets."""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """`ratio`: how many times better than the peer, or the share of the floor that is reached; met at `target`.

    Without a target the figure is only shown, as those are with `--quick` that say something at full size alone.
    """

    name: str
    value: float
    unit: str
    ratio: float
    target: float | None

    @property
    def met(self) -> bool:
        """Whether the target is reached, if there is one."""
        return self.target is None or self.ratio >= self.target


def seconds(call: Callable[[], object], budget_s: float, clock: Callable[[], float] = time.thread_time) -> float:
    """Median seconds of a call, of this thread's CPU time by default, after one warm-up, within a time budget."""
    call()
    times: list[float] = []
    end = time.perf_counter() + budget_s
    while len(times) < 3 or time.perf_counter() < end:
        start = clock()
        call()
        times.append(clock() - start)
    return float(np.median(times))


def main(title: str, measure: Callable[[bool], list[Row]]) -> None:
    """Run a benchmark from the command line."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--quick", action="store_true", help="smaller, under a minute")
    parser.add_argument("--json", type=Path, help="write the rows there")
    arguments = parser.parse_args()
    show(title, measure(arguments.quick), arguments.json)


def show(title: str, rows: list[Row], json_file: Path | None) -> None:
    """Print rows with their targets, and write them as JSON if a file is named."""
    table = Table(title=title)
    for column in ("", "value", "unit", "ratio", "target", ""):
        table.add_column(column, justify="left" if column in ("", "unit") else "right")
    for row in rows:
        target = ("–", "") if row.target is None else (f"{row.target:.2f}", "met" if row.met else "missed")
        table.add_row(row.name, f"{row.value:,.2f}", row.unit, f"{row.ratio:.2f}", *target)
    Console().print(table)
    if json_file:
        json_file.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
