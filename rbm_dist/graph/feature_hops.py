"""Features averaged over hops: `hop1` `[N, F]` is the mean of the in-neighbours' features, `hop2` of their `hop1`, …

What SIGN learns from (Frasca et al., 2020): as many passes over the edges as hops, once, in bounded memory.
"""

from collections.abc import Callable

import numpy as np

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.graph.encodings import Step, batch_step, fill
from rbm_dist.graph.propagate import mean_of_neighbours
from rbm_dist.graph.store import GraphStore

ARRAYS = r"hop\d+"
"""A regular expression of their names."""


def reads_hops(config: Config) -> bool:
    """Whether a run has a teacher that reads these arrays."""
    return config.teacher.reads_hops and config.teacher.external is None


def hop_names(hops: int) -> list[str]:
    """Their names, nearest first."""
    return [f"hop{hop}" for hop in range(1, hops + 1)]


def add_hops(store: GraphStore, hops: int, run_step: Callable[[Step], list[storage.FileInfo]] | None = None) -> None:
    """Add the arrays to the store; parts that are there are kept. `run_step` fills one in all parts; default: here."""
    before = "feat"
    for name in hop_names(hops):
        if not storage.exists(storage.join(store.url, f"{name}.json")):
            step = batch_step(name, store.num_features, (before,), _mean)
            store.publish(name, run_step(step) if run_step else fill(step, store, range(store.num_parts)))
        before = name


def _mean(store: GraphStore, ids: np.ndarray, before: str) -> np.ndarray:
    return mean_of_neighbours(store, before, ids)
