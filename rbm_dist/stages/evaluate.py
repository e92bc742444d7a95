"""Stage `evaluate`: accuracy of teacher, students and baselines, latency and what experts do.

What nodes are predicted as is counted part by part, by actors that each work on their own; a finished part's counts are
kept, so that a kill costs those under way. Baselines are fitted before, and models timed after, in a Ray task each.
"""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.graph.csc import Csc
from rbm_dist.graph.sampler import Sampler
from rbm_dist.graph.sampler_backends import make_sampler
from rbm_dist.graph.shards import part_name
from rbm_dist.graph.smooth import smooths
from rbm_dist.graph.splits import TEST
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.gnn import Gnn
from rbm_dist.models.student import Student
from rbm_dist.models.teacher import build_teacher
from rbm_dist.randomness.bits import generator, key
from rbm_dist.randomness.words import Word
from rbm_dist.runtime.mailbox import Reporter
from rbm_dist.runtime.shard_servers import ShardServers, open_graph, shard_servers
from rbm_dist.runtime.tasks import run_on_parts, run_tasks
from rbm_dist.serve import soft_label_figures
from rbm_dist.serve.accuracy import EVALUATED, Classes, Hits, hits, student_classes, teacher_classes
from rbm_dist.serve.artifact import load_mixture, load_student, load_weights
from rbm_dist.serve.frozen import freeze
from rbm_dist.serve.kernels import softmax
from rbm_dist.serve.specialisation import expert_rows, summary, variants
from rbm_dist.stages.baselines import FeatureRegression, majority_class
from rbm_dist.stages.run import Files, Run
from rbm_dist.stages.smooth import FIGURES
from rbm_dist.train.sampled_rows import sample_logits

WORK = "work"
"""The folder of what is kept per part, while the stage is at work."""
_BATCHES = (1, 1024)
_TIMED_S = 0.5
_MIXTURE = "mixture/"  # before the names of an RbM's variants, among those of all models

Baselines = tuple[int, FeatureRegression]
"""The most frequent class, and the regression."""
Counts = dict[str, Any]
"""Of a part, for JSON: evaluated nodes (`rows`), by model the `right` ones, by split and class; `experts`; `soft`."""


def run_evaluate(run: Run) -> Files:
    """Write `<run>/evaluate/figures.json`: all of `results.json` but the time each stage took."""
    cluster, parts = run.config.cluster, list(range(GraphStore.open(run.graph_url).num_parts))
    with shard_servers(cluster, run.graph_url) as servers:
        arguments = (run.config, run.graph_url, servers)
        (baselines,) = run_tasks("evaluate", fit_baselines, [arguments], cluster)
        make_worker = functools.partial(make_counter, run.config, run.url, baselines, run.reporter, servers)
        counts = run_on_parts("evaluate", make_worker, parts, cluster)
    (figures,) = run_tasks("evaluate", figures_of, [(run.config, run.url, counts)], cluster)
    info = storage.write_json(run.path("evaluate", "figures.json"), figures)
    storage.remove_work(run.path("evaluate", WORK))
    return {"evaluate/figures.json": info}


def fit_baselines(config: Config, graph_url: str, servers: ShardServers | None = None) -> Baselines:
    """What needs training nodes of all parts."""
    torch.set_num_threads(1)
    store = open_graph(graph_url, servers=servers)
    return majority_class(store), FeatureRegression(store, config.seed)


def make_counter(
    config: Config, url: str, baselines: Baselines, reporter: Reporter, servers: ShardServers | None = None
) -> Callable[[int], Counts]:
    """Runs in an actor: opens the graph and the models once, then counts one part per call."""
    torch.set_num_threads(1)
    device = torch.device("cuda" if config.cluster.use_gpu else "cpu")
    store = open_graph(storage.join(url, "graph"), servers=servers)
    models = {**baseline_classes(store, baselines), "teacher": teacher_classes(store)}
    for kind in config.student.models:
        models[kind] = student_classes(load_student(storage.join(url, "student", kind)), store, device)
    mixture = load_mixture(storage.join(url, "student", "rbm"))[0] if "rbm" in config.student.models else None
    if mixture is not None:
        models |= {
            _MIXTURE + name: student_classes(student, store, device) for name, student in variants(mixture).items()
        }

    def count(part: int) -> Counts:
        store.hold([part])
        found = {name: hits(store, classes, parts=[part]) for name, classes in models.items()}
        rows_ME = [] if mixture is None else expert_rows(mixture, store, [part], device)
        reporter.add("evaluate", len(store.ids(part)), store.num_nodes, "nodes")
        return {
            "rows": found["teacher"].rows_SC.tolist(),
            "right": {name: each.right_SC.tolist() for name, each in found.items()},
            "experts": [rows_E.tolist() for rows_E in rows_ME],
            "soft": soft_label_figures.count(store, part),
        }

    def counter(part: int) -> Counts:
        kept = storage.join(url, "evaluate", WORK, f"{part_name(part)}.json")
        return storage.once(kept, lambda: count(part))

    return counter


def figures_of(config: Config, url: str, counts: list[Counts]) -> dict[str, Any]:
    """The counts of all parts as figures, and what is timed."""
    torch.set_num_threads(1)
    store = _OnePart.open(storage.join(url, "graph"), config.teacher.sampler)
    students = {kind: load_student(storage.join(url, "student", kind)) for kind in config.student.models}
    found = _summed(counts)
    models = {name: each for name, each in found.items() if not name.startswith(_MIXTURE)}
    figures: dict[str, Any] = {
        "class_names": store.class_names,
        "classes": _classes(store.class_names, models),
        "baselines": {name: found[name].accuracy() for name in ("majority", "regression")},
        "teacher": found["teacher"].accuracy(),
        "teacher_model": _teacher_model(config),
        "soft_labels": soft_label_figures.figures(part["soft"] for part in counts) | _unsmoothed(config, url),
        "students": {kind: found[kind].accuracy() for kind in students},
    }
    if "rbm" in students:
        # What the experts of the RbM do, as they were trained, and whether they are served or the MLP of their means.
        mixture, merged = load_mixture(storage.join(url, "student", "rbm"))
        counted = {name: found[_MIXTURE + name] for name in variants(mixture)}
        rows_ME = [np.sum(rows_PE, axis=0) for rows_PE in zip(*(part["experts"] for part in counts), strict=True)]
        figures["students"]["rbm"]["mixture"] = {"merged": merged, **summary(mixture, counted, rows_ME)}
    figures["latency_us"] = {}
    if config.teacher.external is None and config.teacher.model == "gnn":  # the others' inputs are not there any more
        figures["latency_us"]["teacher"] = _latency(_teacher_call(config, store, url), store.size, distinct=True)
    figures["latency_us"] |= {kind: _latency(_student_call(each, store), store.size) for kind, each in students.items()}
    return figures


def _unsmoothed(config: Config, url: str) -> dict[str, float]:
    """`unsmoothed_val`, the teacher's accuracy on validation before smoothing; nothing where there is none."""
    if not smooths(config.soft_labels):
        return {}
    return {"unsmoothed_val": storage.read_json(storage.join(url, "soft_labels", FIGURES))["val"]}


def _teacher_model(config: Config) -> str:
    if config.teacher.external is not None:
        return "external"
    return config.teacher.conv if config.teacher.model == "gnn" else config.teacher.model


def _summed(counts: list[Counts]) -> dict[str, Hits]:
    """By model, what is right in all parts."""
    rows_SC = np.sum([part["rows"] for part in counts], axis=0)
    return {
        name: Hits(EVALUATED, rows_SC, np.sum([part["right"][name] for part in counts], axis=0))
        for name in counts[0]["right"]
    }


def _classes(names: list[str] | None, models: Mapping[str, Hits]) -> list[dict[str, Any]]:
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


def baseline_classes(store: GraphStore, baselines: Baselines) -> dict[str, Classes]:
    """What each baseline says."""
    most, regression = baselines
    return {
        "majority": lambda ids: np.full(len(ids), most),
        "regression": lambda ids: regression.classes(store, ids),
    }


class _OnePart(GraphStore):
    """The first part as if it were the graph: models are timed on it, so that no host must open all parts.

    Edges that come from other parts come from some node of its own instead, so that neighbourhoods are as large.
    """

    def __init__(self, url: str, index: dict, sampler: str, *_: Any):
        super().__init__(url, index, sampler, [], None)
        self._first = int(np.flatnonzero(np.diff(self.offsets))[0])  # parts before it, if any, are empty
        self.size = int(self.offsets[self._first + 1])
        self.hold([self._first])

    def _opened_sampler(self) -> Sampler:
        if self._sampler is None:
            csc = self._csc(self._first)
            inside = Csc(csc.indptr, csc.indices % csc.indices.dtype.type(self.size))
            self._sampler = make_sampler(self._sampler_name, {0: inside}, np.array([0, self.size]))
        return self._sampler


Call = Callable[[np.ndarray], Callable[[], object]]
"""Given node ids, what is to be timed."""


def _teacher_call(config: Config, store: GraphStore, url: str) -> Call:
    model = build_teacher(config, store.num_features, store.num_classes)
    assert isinstance(model, Gnn)
    load_weights(storage.join(url, "teacher", "model.safetensors"), model)
    model.eval()
    fanout, draw = config.soft_labels.fanout or config.teacher.fanout, key(config.seed, Word.LATENCY)
    return lambda ids: lambda: sample_logits(model, store, ids, fanout, draw, training=False).softmax(1)


def _student_call(student: Student, store: GraphStore) -> Call:
    network = freeze(student)

    def prepare(ids: np.ndarray) -> Callable[[], object]:
        # Dense, as a caller of the served model has it.
        rows = store.inputs(ids, student.inputs)
        rows_BF = rows if isinstance(rows, np.ndarray) else rows.toarray()
        return lambda: softmax(network.logits(rows_BF))

    return prepare


def _latency(call: Call, num_nodes: int, distinct: bool = False) -> dict[str, float]:
    """Median microseconds per node by batch size, on one thread. A teacher's time includes sampling and gathering."""
    rng = generator(0, Word.LATENCY)
    latency = {}
    for batch in _BATCHES:
        size = min(batch, num_nodes) if distinct else batch
        ids = [rng.choice(num_nodes, size, replace=size > num_nodes) for _ in range(8)]
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
