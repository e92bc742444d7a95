"""A teacher's training, to its best epoch: SIGN, features over hops included, against a GraphSAGE of as many layers on
the same graph; features over hops of twice the edges; and how long the trainer waits for its batches.

    python -m benchmarks.teacher_training [--quick] [--json FILE]

Floor: a pass over the edges takes as long per edge, however many there are. CPU time of all threads, in a process of
its own; the wait, and the epoch that it is a share of, are on the clock.
"""

import tempfile
import time
from typing import Any

import numpy as np

from benchmarks.report import Row, main
from benchmarks.teacher import FANOUT, alone, graph_of
from rbm_dist.config.run import Config
from rbm_dist.graph.feature_hops import ARRAYS, add_hops
from rbm_dist.graph.store import GraphStore
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.stages.local import MetricsRecorder
from rbm_dist.stages.teacher import train_teacher

_HOPS = len(FANOUT)
_NOISE = 0.2  # of the labels: where all can be right, every epoch is better than the one before
_SAGE = {"patience": 3, "epochs": 20}
_SIGN = {"model": "sign", "hops": _HOPS, "patience": 10, "epochs": 200}


def measure(quick: bool) -> list[Row]:
    nodes, degree = (10_000, 24) if quick else (100_000, 48)

    def full(target: float) -> float | None:
        """Of a small graph, what it takes to begin says nothing."""
        return None if quick else target

    with tempfile.TemporaryDirectory() as folder:
        tiny = graph_of(f"{folder}/tiny", 4_000, 8)
        half, config = (graph_of(f"{folder}/{each}", nodes, each, _NOISE) for each in (degree // 2, degree))
        per_edge = [
            _average_s(each, tiny) / GraphStore.open(f"{each.run_dir}/graph").num_edges for each in (half, config)
        ]
        sage_s, sage, wait = _trained(config, tiny, _SAGE)
        sign_s, sign, _ = _trained(config, tiny, _SIGN)
        store = GraphStore.open(f"{config.run_dir}/graph")
    sign_s += per_edge[1] * store.num_edges
    name = f"{store.num_nodes:,} nodes, {store.num_edges:,} in-edges"
    return [
        Row(f"{name}: SIGN vs SAGE {[*FANOUT]}", sign_s, "CPU s", sage_s / sign_s, full(10.0)),
        Row(f"{name}: SIGN vs SAGE, right on validation", 100 * sign, "%", sign / sage, None),
        Row(
            f"{name}: {_HOPS} hops vs half the edges",
            1 / per_edge[1],
            "edges per CPU s",
            per_edge[0] / per_edge[1],
            full(1 / 1.1),
        ),
        Row(f"{name}: SAGE's trainer waits", 100 * wait, "% of the time", 0.1 / wait, full(1.0)),
    ]


def _average_s(config: Config, tiny: Config) -> float:
    return alone(_average, config, tiny)[0]


def _average(config: Config, tiny: Config) -> float:
    """CPU seconds to average the features over hops."""
    store = GraphStore.open(f"{tiny.run_dir}/graph")
    store.remove_matching(ARRAYS)
    add_hops(store, _HOPS)  # compiles
    start = time.process_time()
    add_hops(GraphStore.open(f"{config.run_dir}/graph"), _HOPS)
    return time.process_time() - start


def _trained(config: Config, tiny: Config, teacher: dict[str, Any]) -> tuple[float, float, float]:
    first, then = (
        each.model_copy(update={"teacher": each.teacher.model_copy(update=teacher | {"epochs": epochs})})
        for each, epochs in ((tiny, 1), (config, teacher["epochs"]))
    )
    return alone(_train, first, then)[2]


def _train(tiny: Config, config: Config) -> tuple[float, float, float]:
    """CPU seconds to the best epoch, its accuracy on validation, and the share of the time that the trainer waits."""
    spent: list[float] = []
    recorder = MetricsRecorder(lambda row: spent.append(time.process_time()))
    for each, listener in ((tiny, MetricsRecorder()), (config, recorder)):  # the first compiles
        start = time.process_time()
        train_teacher(Mesh.single(), listener, each, f"{each.run_dir}/graph", f"{each.run_dir}/{each.teacher.model}")
    epochs = recorder.loops["teacher"]
    best = int(np.argmin([row["val_loss"] for row in epochs]))
    waited = sum(row["wait_s"] for row in epochs[1:]) / (epochs[-1]["time"] - epochs[0]["time"])
    return spent[best] - start, epochs[best]["val_accuracy"], waited


if __name__ == "__main__":
    main("A teacher's training, one thread", measure)
