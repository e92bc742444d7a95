"""Stage `evaluate`: accuracy of teacher, students and baselines, latency and what experts do, in one Ray task."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.graph.random_bits import generator, key
from rbm_dist.graph.splits import TEST
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.student import Student
from rbm_dist.runtime.tasks import run_tasks
from rbm_dist.serve.accuracy import Hits, hits, student_hits
from rbm_dist.serve.artifact import load_mixture, load_student, load_weights
from rbm_dist.serve.frozen import freeze
from rbm_dist.serve.kernels import softmax
from rbm_dist.serve.specialisation import mixture_figures
from rbm_dist.stages.baselines import FeatureRegression, majority_class
from rbm_dist.stages.run import Files, Run
from rbm_dist.stages.teacher import build_teacher, sample_logits

_LATENCY = 7  # word of the random keys
_BATCHES = (1, 1024)
_TIMED_S = 0.5


def run_evaluate(run: Run) -> Files:
    """Write `<run>/evaluate/figures.json`: all of `results.json` but the time each stage took."""
    figures = run_tasks("evaluate", _evaluate, [(run.config, run.url)], run.config.cluster)[0]
    return {"evaluate/figures.json": storage.write_json(run.path("evaluate", "figures.json"), figures)}


def _evaluate(config: Config, url: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    store = GraphStore.open(storage.join(url, "graph"), config.teacher.sampler)
    students = {kind: load_student(storage.join(url, "student", kind)) for kind in config.student.models}
    baselines, teacher = baseline_hits(store, config.seed), teacher_hits(store)
    by_student: dict[str, Hits] = {kind: student_hits(student, store) for kind, student in students.items()}
    figures: dict[str, Any] = {
        "class_names": store.class_names,
        "classes": _classes(store.class_names, {**baselines, "teacher": teacher, **by_student}),
        "baselines": {name: each.accuracy() for name, each in baselines.items()},
        "teacher": teacher.accuracy(),
        "students": {kind: each.accuracy() for kind, each in by_student.items()},
    }
    if "rbm" in students:
        figures["students"]["rbm"]["mixture"] = _mixture(storage.join(url, "student", "rbm"), store)
    figures["latency_us"] = {"teacher": _latency(_teacher_call(config, store, url), store)}
    figures["latency_us"] |= {kind: _latency(_student_call(each, store), store) for kind, each in students.items()}
    return figures


def _classes(names: list[str] | None, models: dict[str, Hits]) -> list[dict[str, Any]]:
    """Of each class its name, its number of test nodes and every model's accuracy on them."""
    nodes_SC, splits = models["teacher"].rows_SC, models["teacher"].splits
    right = {model: each.by_class(TEST) for model, each in models.items()}
    return [
        {
            "name": names[cls] if names else str(cls),
            "nodes": nodes,
            "accuracy": {model: shares[cls] for model, shares in right.items()},
        }
        for cls, nodes in enumerate(nodes_SC[splits.index(TEST)].tolist())
    ]


def _mixture(url: str, store: GraphStore) -> dict[str, Any]:
    """What the experts of the RbM do, as they were trained, and whether they are served or the MLP of their means."""
    mixture, merged = load_mixture(url)
    return {"merged": merged, **mixture_figures(mixture, store)}


def teacher_hits(store: GraphStore) -> Hits:
    """`hits` of the soft labels."""
    return hits(store, lambda ids: store.gather("soft", ids).argmax(1))


def baseline_hits(store: GraphStore, seed: int) -> dict[str, Hits]:
    """`hits` of each baseline."""
    most = majority_class(store)
    return {
        "majority": hits(store, lambda ids: np.full(len(ids), most)),
        "regression": hits(store, FeatureRegression(store, seed)),
    }


Call = Callable[[np.ndarray], Callable[[], object]]
"""Given node ids, what is to be timed."""


def _teacher_call(config: Config, store: GraphStore, url: str) -> Call:
    model = build_teacher(config, store)
    load_weights(storage.join(url, "teacher", "model.safetensors"), model)
    model.eval()
    fanout, draw = config.soft_labels.fanout or config.teacher.fanout, key(config.seed, _LATENCY)
    return lambda ids: lambda: sample_logits(model, store, ids, fanout, draw, training=False).softmax(1)


def _student_call(student: Student, store: GraphStore) -> Call:
    network = freeze(student)

    def prepare(ids: np.ndarray) -> Callable[[], object]:
        # Dense, as a caller of the served model has it.
        rows = store.inputs(ids, student.inputs)
        rows_BF = rows if isinstance(rows, np.ndarray) else rows.toarray()
        return lambda: softmax(network.logits(rows_BF))

    return prepare


def _latency(call: Call, store: GraphStore) -> dict[str, float]:
    """Median microseconds per node by batch size, on one thread. A teacher's time includes sampling and gathering."""
    rng = generator(0, _LATENCY)
    latency = {}
    for batch in _BATCHES:
        size = min(batch, store.num_nodes)
        ids = [rng.choice(store.num_nodes, size, replace=False) for _ in range(8)]
        calls = [call(each) for each in ids]
        times: list[float] = []
        with torch.inference_mode(), threadpool_limits(1):
            for each in calls:
                each()
            end = time.perf_counter() + _TIMED_S
            while time.perf_counter() < end or len(times) < len(calls):
                start = time.perf_counter()
                calls[len(times) % len(calls)]()
                times.append(time.perf_counter() - start)
        latency[str(batch)] = float(np.median(times)) / size * 1e6
    return latency
