"""What compressing a student cost and saved, as a table."""

from typing import Any

from rich.table import Table


def compression_rows(compressed: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was measured, before and after; `compressed` as in `model.json`."""
    before, after = compressed["before"], compressed["after"]
    rows = [
        (
            f"accuracy, {compressed['rows']:,} validation rows",
            f"{100 * before['val']:.2f} %",
            f"{100 * after['val']:.2f} %",
        )
    ]
    rows += [
        (name, f"{before[key]:,}", f"{after[key]:,}")
        for name, key in (("bytes of weights", "bytes"), ("multiply-adds per row", "multiply_adds"))
    ]
    rows += [
        (f"µs per row, {int(batch):,} at once", f"{us:.2f}", f"{after['us'][batch]:.2f}")
        for batch, us in before["us"].items()
    ]
    return rows


def compression_table(compressed: dict[str, Any]) -> Table:
    """The same for a terminal."""
    table = Table(title=compressed["method"])
    for column in ("one thread", "before", "after"):
        table.add_column(column, justify="left" if column == "one thread" else "right")
    for row in compression_rows(compressed):
        table.add_row(*row)
    return table
