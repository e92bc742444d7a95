"""Which workers a run would have on which hosts, as a table."""

from rich.table import Table


def workers_table(hosts: list[str], room: list[int], shares: dict[str, list[int]]) -> Table:
    """A row per host: how many workers fit, and how many of each kind (`shares`) it would get."""
    table = Table()
    table.add_column("host", no_wrap=True)
    for column in ("room for workers", *shares):
        table.add_column(column, justify="right")
    for row in zip(hosts, room, *shares.values(), strict=True):
        table.add_row(*map(str, row))
    return table
