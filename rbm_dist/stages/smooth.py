"""Smoothing in the stage `soft_labels`: what the teacher's class distributions are worth, and `soft` of them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from rbm_dist import storage
from rbm_dist.graph.encodings import Step
from rbm_dist.graph.smooth import UNSMOOTHED, smooth
from rbm_dist.graph.splits import VAL
from rbm_dist.graph.store import GraphStore
from rbm_dist.runtime.shard_servers import ShardServers, open_graph
from rbm_dist.serve.accuracy import hits, teacher_classes
from rbm_dist.stages.run import Run

FIGURES = "unsmoothed.json"
"""What the teacher is worth without smoothing, in the folder of the stage: `val`, its accuracy on validation."""

RunStep = Callable[[Step], list[storage.FileInfo]]
"""Fills a step's array in all parts."""


def smooth_soft_labels(
    run: Run, over_parts: Callable[..., list[Any]], run_step: RunStep | None, servers: ShardServers | None
) -> None:
    """Make the array `soft` of `unsmoothed`, and write `FIGURES`. run_step: None: in this process."""
    store, url = GraphStore.open(run.graph_url), run.path("soft_labels", FIGURES)
    if not storage.exists(url):
        make_counter = partial(_make_counter, run.graph_url, servers)
        right, nodes = np.sum(over_parts(run, make_counter, list(range(store.num_parts))), axis=0).tolist()
        storage.write_json(url, {"val": right / nodes})
    smooth(store, run.config.soft_labels, run_step)


def _make_counter(graph_url: str, servers: ShardServers | None) -> Callable[[int], tuple[int, int]]:
    """Runs in an actor: of how many of a part's validation nodes the teacher is right, and how many there are."""
    store = open_graph(graph_url, servers=servers)

    def count(part: int) -> tuple[int, int]:
        store.hold([part])
        found = hits(store, teacher_classes(store, UNSMOOTHED), (VAL,), [part])
        return int(found.right_SC.sum()), int(found.rows_SC.sum())

    return count
