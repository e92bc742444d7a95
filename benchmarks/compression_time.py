"""How long a teacher or a student takes per node, by batch size, over many different nodes: for `compression.py`."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from benchmarks.report import seconds

BATCHES = (1, 64, 4096)
DIFFERENT = 512
"""Rows at least that are timed: of one row alone the weights would stay in the nearest cache."""
KEY = 17
"""Draws nodes and neighbourhoods."""
Figures = dict[str, Any]
Weights = dict[str, np.ndarray]


def microseconds(call: Callable[[np.ndarray], object], batches: Iterable[np.ndarray], budget_s: float) -> Figures:
    """Microseconds of CPU time per node, by batch size."""
    found = {}
    by_size = itertools.groupby(batches, len)
    for batch, (size, each) in zip(BATCHES, by_size, strict=True):
        ready = list(each)

        def all_of_them(ready: list[np.ndarray] = ready) -> None:
            for one in ready:
                call(one)

        found[f"us_{batch}"] = seconds(all_of_them, budget_s) / len(ready) / size * 1e6
    return found
