"""How far a run is, for a terminal."""

import time
from datetime import UTC, datetime
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from rbm_dist.report.plan_table import duration

_STYLES = {"done": "green", "at work": "bold", "stopped": "red", "gone": "red"}
_AGAIN = "the same command again goes on from there"


def status_table(status: dict[str, Any]) -> Group:
    """What `stages.status.run_status` gives: a row per stage, one per loop at work, and who is at it."""
    state, owner = status["state"], status["owner"]
    table = Table()
    for column in ("", "state", "time", "progress", "rate", "left", ""):
        table.add_column(column, justify="right" if column in ("time", "rate", "left") else "left")
    for stage in status["stages"]:
        at_work = stage["state"] == "at work"
        shown = "gone" if at_work and state == "gone" else stage["state"]
        took = "" if stage["seconds"] is None else duration(stage["seconds"])
        table.add_row(stage["name"], Text(shown, _STYLES.get(shown, "dim")), took)
        for name, loop in status["loops"].items() if at_work else ():
            rate = f"{loop['rate']:,.1f} {loop['unit']}/s" if loop["rate"] else ""
            left = "" if loop["left_s"] is None else duration(loop["left_s"])
            progress = f"{loop['done']:,}/{loop['total']:,} {loop['unit']}"
            table.add_row(Text(f"  {name}"), "", "", progress, rate, left, Text(loop["note"]))
    lines = [f"owner {owner['token']}: {owner['who']} (pid {owner['pid']}), {_life(status)}"]
    saved = status["checkpoint"]
    if saved:
        ago = duration(max(0.0, time.time() - saved["time"]))
        lines.append(f"last checkpoint: {saved['loop']}, step {saved['step']:,}, {ago} ago")
    if state == "stopped":
        lines.append(f"it stopped: {status['error']}; {_AGAIN}")
    return Group(Text(f"{status['run']}: {state}", _STYLES[state]), table, *(Text(line) for line in lines))


def _life(status: dict[str, Any]) -> str:
    since = f"since {datetime.fromtimestamp(status['owner']['since'], UTC):%Y-%m-%d %H:%M:%S} UTC"
    ago = duration(max(0.0, status["age_s"]))
    if status["state"] == "gone":
        return f"{since}; no sign of life for {ago}: that driver is gone; {_AGAIN}"
    return f"{since}; alive, last word {ago} ago" if status["alive"] else f"{since}; ended {ago} ago"
