"""Training curves: what of an epoch's row in the metrics is computed, whatever the clock and the layout of ranks."""

from typing import Any

_HOW = ("time", "wait_s", "sent_mb", "routed_mb", "least_mb", "stayed")


def computed(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in _HOW}
