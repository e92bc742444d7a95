"""Stage `evaluate`: accuracy of teacher, students and baselines, latency and expert load, in one Ray task."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.graph.random_bits import generator, key
from rbm_dist.graph.splits import SPLIT_NAMES, TEST, UNSEEN, VAL
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.student import Student
from rbm_dist.moe.sparse_rows import to_rows
from rbm_dist.runtime.tasks import run_tasks
from rbm_dist.serve.artifact import load_student, load_weights
from rbm_dist.serve.frozen import freeze
from rbm_dist.stages.baselines import FeatureRegression, majority_class
from rbm_dist.stages.run import Files, Run
from rbm_dist.stages.teacher import build_teacher, sample_logits

_LATENCY = 7  # word of the random keys
_BATCHES = (1, 1024)
_EVALUATED = (VAL, TEST, UNSEEN)
_CPU = torch.device("cpu")
_TIMED_S = 0.5
_ROWS = 65_536
LOADED_NODES = 1_000_000


def run_evaluate(run: Run) -> Files:
    """Write `<run>/evaluate/figures.json`: all of `results.json` but the time each stage took."""
    figures = run_tasks("evaluate", _evaluate, [(run.config, run.url)], run.timeout_s)[0]
    return {"evaluate/figures.json": storage.write_json(run.path("evaluate", "figures.json"), figures)}


def _evaluate(config: Config, url: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    store = GraphStore.open(storage.join(url, "graph"), config.teacher.sampler)
    students = {kind: load_student(storage.join(url, "student", kind)) for kind in config.student.models}
    figures: dict[str, Any] = {"class_names": store.class_names, "baselines": baseline_accuracy(store, config.seed)}
    figures["teacher"] = teacher_accuracy(store)
    figures["students"] = {kind: student_accuracy(student, store) for kind, student in students.items()}
    if "rbm" in students:
        figures["students"]["rbm"]["expert_load_per_layer"] = expert_load(students["rbm"], store)
    figures["latency_us"] = {"teacher": _latency(_teacher_call(config, store, url), store)}
    figures["latency_us"] |= {kind: _latency(_student_call(each, store), store) for kind, each in students.items()}
    return figures


def expert_load(student: Student, store: GraphStore) -> list[list[float]]:
    """Per layer the share of (row, expert) pairs that each expert gets; each layer sums to 1.

    Over all nodes; of a graph of more than `LOADED_NODES` nodes, over so many at equal distances.
    """
    counts = [torch.zeros(len(layer.memory_ED)) for layer in student.routed_layers]
    nodes = np.linspace(0, store.num_nodes, min(store.num_nodes, LOADED_NODES), endpoint=False).astype(np.int64)
    for ids in _chunks(nodes):
        with torch.inference_mode():
            _, traces = student(to_rows(store.inputs(ids, student.inputs), _CPU, torch.float32))
        for count, trace in zip(counts, traces, strict=True):
            count += torch.bincount(trace.routing.experts_Bk.flatten(), minlength=len(count))
    return [(count / count.sum()).tolist() for count in counts]


def student_accuracy(student: Student, store: GraphStore) -> dict[str, float | None]:
    """`accuracy` of a student's own predictions."""
    student = freeze(student)

    def classes(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return student(to_rows(store.inputs(ids, student.inputs), _CPU, torch.float32))[0].argmax(1).numpy()

    return accuracy(store, classes)


def teacher_accuracy(store: GraphStore) -> dict[str, float | None]:
    """`accuracy` of the soft labels."""
    return accuracy(store, lambda ids: store.gather("soft", ids).argmax(1))


def baseline_accuracy(store: GraphStore, seed: int) -> dict[str, dict[str, float | None]]:
    """`accuracy` of each baseline."""
    most = majority_class(store)
    return {
        "majority": accuracy(store, lambda ids: np.full(len(ids), most)),
        "regression": accuracy(store, FeatureRegression(store, seed)),
    }


def accuracy(store: GraphStore, classes: Callable[[np.ndarray], np.ndarray]) -> dict[str, float | None]:
    """Share of right classes on validation, test and unseen nodes; None for a split without nodes.

    classes: the predicted classes `[n]` of nodes `[n]`; asked for nodes of these splits only.
    """
    right, rows = dict.fromkeys(_EVALUATED, 0), dict.fromkeys(_EVALUATED, 0)
    for part in range(store.num_parts):
        split_n = store.array("split", part)
        for ids in _chunks(store.ids(part)[np.isin(split_n, _EVALUATED)]):
            hit, split = classes(ids) == store.gather("label", ids), store.gather("split", ids)
            for code in right:
                right[code] += int(np.sum(hit & (split == code)))
                rows[code] += int(np.sum(split == code))
    return {SPLIT_NAMES[code]: right[code] / rows[code] if rows[code] else None for code in right}


def _chunks(ids: np.ndarray) -> Iterator[np.ndarray]:
    return (ids[start : start + _ROWS] for start in range(0, len(ids), _ROWS))


Call = Callable[[np.ndarray], Callable[[], object]]
"""Given node ids, what is to be timed."""


def _teacher_call(config: Config, store: GraphStore, url: str) -> Call:
    model = build_teacher(config, store)
    load_weights(storage.join(url, "teacher", "model.safetensors"), model)
    model.eval()
    fanout, draw = config.soft_labels.fanout or config.teacher.fanout, key(config.seed, _LATENCY)
    return lambda ids: lambda: sample_logits(model, store, ids, fanout, draw, training=False).softmax(1)


def _student_call(student: Student, store: GraphStore) -> Call:
    student = freeze(student)

    def prepare(ids: np.ndarray) -> Callable[[], object]:
        # Dense, as a caller of the served model has it.
        rows = store.inputs(ids, student.inputs)
        rows_BF = torch.from_numpy(rows if isinstance(rows, np.ndarray) else rows.toarray())
        return lambda: student(rows_BF)[0].softmax(1)

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
        with torch.inference_mode():
            for each in calls:
                each()
            end = time.perf_counter() + _TIMED_S
            while time.perf_counter() < end or len(times) < len(calls):
                start = time.perf_counter()
                calls[len(times) % len(calls)]()
                times.append(time.perf_counter() - start)
        latency[str(batch)] = float(np.median(times)) / size * 1e6
    return latency
