"""The checkpoints of a run as a table for people."""

import time
from collections.abc import Iterable
from typing import Any, Protocol

from rich.table import Table

from rbm_dist.report.plan_table import size


class Row(Protocol):
    """What is shown of a checkpoint."""

    @property
    def folder(self) -> str: ...

    @property
    def loop(self) -> str: ...

    @property
    def index(self) -> dict[str, Any] | None:
        """Its `checkpoint.json`, if that can be read."""
        ...

    @property
    def state(self) -> str:
        """Whether it is whole."""
        ...


def checkpoint_table(rows: Iterable[Row]) -> Table:
    """A line per checkpoint: where training was, when, how large it is, who wrote it, and whether it is whole."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("loop", "step", "epochs", "when", "size", "ranks", "token", "whole", "best so far"):
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("step", "epochs", "size") else "left")
    for row in rows:
        index = row.index
        if index is None:
            step, token = row.folder.rsplit("/step-", 1)[1].split(".")
            table.add_row(row.loop, f"{int(step):,}", "", "", "", "", token, row.state, "")
            continue
        facts = index["facts"]
        done = index["step"] / facts["steps_per_epoch"]
        best = f"epoch {facts['best_epoch'] - 1}, {facts['best_score']:.4f}" if facts["best_epoch"] else "–"
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(index["when"]))
        total = sum(each["bytes"] for each in index["files"].values())
        table.add_row(
            row.loop, f"{index['step']:,}", f"{done:.4g}", when, size(total), str(index["ranks"]),
            str(index["token"]), row.state, best,
        )  # fmt: skip
    return table
