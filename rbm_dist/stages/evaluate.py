"""Stage `evaluate`: accuracy, latency and expert load of teacher and students, in one Ray task."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from rbm_dist import storage
from rbm_dist.config import Config
from rbm_dist.graph.random_bits import generator, key
from rbm_dist.graph.source import TEST, VAL
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.student import Student
from rbm_dist.runtime.tasks import run_tasks
from rbm_dist.serve.artifact import load_student, load_weights
from rbm_dist.serve.frozen import freeze
from rbm_dist.serve.predictor import predict
from rbm_dist.stages.run import Files, Run
from rbm_dist.stages.teacher import build_teacher, sample_logits

_LATENCY = 7  # word of the random keys
_BATCHES = (1, 1024)
_TIMED_S = 0.5
_ROWS = 65_536


def run_evaluate(run: Run) -> Files:
    """Write `<run>/evaluate/figures.json`: all of `results.json` but the time each stage took."""
    figures = run_tasks("evaluate", _evaluate, [(run.config, run.url)], run.timeout_s)[0]
    return {"evaluate/figures.json": storage.write_json(run.path("evaluate", "figures.json"), figures)}


def _evaluate(config: Config, url: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    store = GraphStore.open(storage.join(url, "graph"), config.teacher.sampler)
    students = {kind: load_student(storage.join(url, "student", kind)) for kind in config.student.models}
    figures: dict[str, Any] = {
        "teacher": _accuracy(store, [store.array("soft", part) for part in range(store.num_parts)])
    }
    figures["students"] = {kind: _student_accuracy(student, store) for kind, student in students.items()}
    if "rbm" in students:
        per_layer = expert_load(students["rbm"], store)
        figures["students"]["rbm"]["expert_load"] = np.mean(per_layer, axis=0).tolist()
        figures["students"]["rbm"]["expert_load_per_layer"] = per_layer
    figures["latency_us"] = {"teacher": _latency(_teacher_call(config, store, url), store)}
    figures["latency_us"] |= {kind: _latency(_student_call(each, store), store) for kind, each in students.items()}
    return figures


def expert_load(student: Student, store: GraphStore) -> list[list[float]]:
    """Per layer the share of (row, expert) pairs that each expert gets, over all nodes; each layer sums to 1."""
    counts = [torch.zeros(len(layer.memory_ED)) for layer in student.routed_layers]
    for part in range(store.num_parts):
        feat = store.array("feat", part)
        for start in range(0, len(feat), _ROWS):
            with torch.inference_mode():
                _, traces = student(torch.from_numpy(np.array(feat[start : start + _ROWS])))
            for count, trace in zip(counts, traces, strict=True):
                count += torch.bincount(trace.routing.experts_Bk.flatten(), minlength=len(count))
    return [(count / count.sum()).tolist() for count in counts]


def _student_accuracy(student: Student, store: GraphStore) -> dict[str, float | None]:
    by_part: list[list[np.ndarray]] = [[] for _ in range(store.num_parts)]
    starts = np.cumsum([0] + [len(store.array("feat", part)) for part in range(store.num_parts)])
    seen = 0
    for chunk in predict(student, store):
        by_part[int(np.searchsorted(starts, seen, side="right")) - 1].append(chunk.probability)
        seen += len(chunk.orig_id)
    return _accuracy(store, [np.concatenate(chunks or [np.empty((0, store.num_classes))]) for chunks in by_part])


def _accuracy(store: GraphStore, probability: list[np.ndarray]) -> dict[str, float | None]:
    """Share of right classes on the validation and test nodes; None for a split without nodes."""
    right, rows = dict.fromkeys((VAL, TEST), 0), dict.fromkeys((VAL, TEST), 0)
    for part, probability_nC in enumerate(probability):
        hit = probability_nC.argmax(1) == store.array("label", part)
        for code in right:
            chosen = store.array("split", part) == code
            right[code] += int(np.sum(hit & chosen))
            rows[code] += int(np.sum(chosen))
    return {name: right[code] / rows[code] if rows[code] else None for name, code in (("val", VAL), ("test", TEST))}


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
        feat = torch.from_numpy(store.gather("feat", ids))
        return lambda: student(feat)[0].softmax(1)

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
