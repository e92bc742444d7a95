"""The results of a search: a row per trial, the best of each student, and the table that a person reads.

A row is a dictionary with the keys of `COLUMNS`, the `settings` that were drawn, by dotted key, and `curve`, the
highest validation accuracy until each epoch. There is nothing of test nodes in it.
"""

import json
from typing import Any

import pyarrow as pa
from rich.table import Table

from rbm_dist.report.experiment import NOTHING, Row, short

COLUMNS = pa.schema(
    [("student", pa.string()), ("trial", pa.int64()), ("state", pa.string()), ("val", pa.float64())]
    + [("val_by_seed", pa.string())]
    + [(name, pa.int64()) for name in ("epochs", "parameters", "multiply_adds")]
    + [("seconds", pa.float64()), ("reason", pa.string())]
)
"""`state`: done, stopped (it fell behind) or failed (`reason` says why). `val`: the mean over the seeds."""


def best(rows: list[Row]) -> Row | None:
    """The trial that was done with the highest validation accuracy; of equals, the first.

    One that was stopped is no choice: what it would have reached is not known.
    """
    return max((row for row in rows if row["state"] == "done"), key=lambda row: row["val"], default=None)


def tidy(rows: list[Row]) -> pa.Table:
    """The rows as a table: the columns of `COLUMNS`, then one per searched key."""
    table = pa.Table.from_pylist([{**row, "val_by_seed": _text(row["val_by_seed"])} for row in rows], schema=COLUMNS)
    for key in sorted({key for row in rows for key in row["settings"]}):
        table = table.append_column(key, _column([row["settings"].get(key) for row in rows]))
    return table


def search_table(rows: list[Row], students: list[str], trials: int, seeds: int) -> Table:
    """Per student how many trials are done, the best on validation, its settings and cost."""
    of_seeds = f", mean over {seeds} seeds" if seeds > 1 else ""
    table = Table(title=f"Best on validation{of_seeds}", caption="the highest of many trials: an optimistic figure")
    for column in ("student", "trials", "val accuracy, %", "multiply-adds", "settings"):
        table.add_column(column, justify="left" if column in ("student", "settings") else "right")
    for student in students:
        of_student = [row for row in rows if row["student"] == student]
        counts = [f"{len(of_student)}" + ("" if len(of_student) == trials else f" of {trials}")]
        for state in ("stopped", "failed"):
            count = sum(row["state"] == state for row in of_student)
            counts += [f"{count} {state}"] if count else []
        chosen = best(of_student)
        figures = [NOTHING] * 3
        if chosen:
            settings = [
                f"{key.removeprefix('student.')} {_text(value)}" for key, value in sorted(chosen["settings"].items())
            ]
            figures = [f"{100 * chosen['val']:.1f}", short(chosen["multiply_adds"]), ", ".join(settings)]
        table.add_row(student, ", ".join(counts), *figures)
    return table


def _column(values: list[Any]) -> pa.Array:
    """Numbers as numbers; where kinds are mixed or a value is a list, all as text."""
    kinds = {type(value) for value in values if value is not None}
    if kinds == {int, float}:
        return pa.array(values, pa.float64())
    if len(kinds) == 1 and kinds <= {int, float, bool, str}:
        return pa.array(values)
    return pa.array([None if value is None else _text(value) for value in values], pa.string())


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
