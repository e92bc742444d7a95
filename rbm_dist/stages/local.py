"""A whole run in this process, without Ray: for experiments, where many small runs share a cluster, one CPU each.

`prepare` does everything up to what a student learns from; `train` trains one student on that, so that many students
share one teacher. Both call the functions that the stages run on the cluster.
"""

import copy
import re
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rbm_dist import storage
from rbm_dist.config.run import ClusterConfig, Config
from rbm_dist.errors import InputError
from rbm_dist.graph.encodings import encode_in_process
from rbm_dist.graph.feature_hops import add_hops, reads_hops
from rbm_dist.graph.splits import VAL
from rbm_dist.graph.store import SOFT, GraphStore
from rbm_dist.models.student import Student
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.report.metrics import Row
from rbm_dist.runtime.mailbox import Reporter
from rbm_dist.serve.accuracy import hits, student_accuracy, teacher_classes
from rbm_dist.serve.artifact import load_mixture, load_student
from rbm_dist.serve.specialisation import mixture_figures
from rbm_dist.stages import partition, source
from rbm_dist.stages.external_teacher import look_at_external
from rbm_dist.stages.run import Run
from rbm_dist.stages.soft_labels import MakeWorker, write_soft_labels
from rbm_dist.stages.student import train_students
from rbm_dist.stages.teacher import train_teacher

# A run of seconds is computed again rather than continued: one checkpoint, at its end.
_IN_PROCESS = ClusterConfig(
    train_workers=1, inference_workers=1, memory_store="in_process", checkpoint_every=10**9, checkpoint_minutes=None
)
_COUNTED_ROWS = 64
_PREPARED = {"source", "graph", "teacher", "soft_labels", "teacher.json"}


class MetricsRecorder(Reporter):
    """Keeps the rows of every epoch, and hands each to `on_epoch`; shows nothing."""

    def __init__(self, on_epoch: Callable[[Row], None] | None = None) -> None:
        self.loops: dict[str, list[Row]] = {}
        self._on_epoch = on_epoch

    def begin(self, loop: str, history: list[Row]) -> None:
        """Nothing was done before."""

    def progress(self, loop: str, done: int, total: int, unit: str, note: str = "") -> None:
        """Not shown."""

    def add(self, loop: str, amount: int, total: int, unit: str) -> None:
        """Not shown."""

    def order(self) -> Literal["go"]:
        """Nobody orders anything else."""
        return "go"

    def heartbeat(self, loop: str, epoch: int, step: int, steps: int, figures: dict[str, float]) -> None:
        """Nobody waits for a sign of life."""

    def saved(self, loop: str, step: int) -> None:
        """Not shown."""

    def metrics(self, loop: str, row: Row) -> None:
        self.loops.setdefault(loop, []).append(row)
        if self._on_epoch:
            self._on_epoch(row)

    def end(self, loop: str, history: list[Row]) -> None:
        """Nothing is lost on the way."""


def is_prepared(url: str) -> bool:
    """Whether a folder holds nothing but what `prepare` writes."""
    return {name.split(storage.TEMPORARY)[0] for name in storage.listdir(url)} <= _PREPARED


def remove_prepared(url: str, keep: set[str]) -> None:
    """Remove the graphs in a folder of prepared graphs that are named by their hash, but those of these names."""
    for name in storage.listdir(url):
        folder = storage.join(url, name)
        # What else lies there is the user's.
        if name not in keep and re.fullmatch(r"[0-9a-f]{16}", name) and is_prepared(folder):
            storage.remove(folder)


def prepare(config: Config, url: str) -> dict[str, Any]:
    """Write graph, teacher, soft labels and encodings below `url`; what is there is kept if it is whole.

    Gives the teacher's figures: `val`, `test` and `unseen` accuracy, and `confidence`, the mean over all nodes of
    the soft labels' highest probability. Raises `InputError`.
    """
    figures_url = storage.join(url, "teacher.json")
    if storage.exists(figures_url):  # written last
        return storage.read_json(figures_url)
    if not is_prepared(url):
        raise InputError(f"{url}: holds files that are no experiment's, and would be deleted. Set another run_dir")
    storage.remove(url)
    config = config.model_copy(update={"cluster": _IN_PROCESS})
    run = Run(config, url, MetricsRecorder())
    _write_graph(run)
    if config.teacher.external is not None:
        look_at_external(config, run.graph_url, run.path("teacher"))
    else:
        if reads_hops(config):
            add_hops(GraphStore.open(run.graph_url), config.teacher.hops)
        train_teacher(Mesh.single(), run.reporter, config, run.graph_url, run.path("teacher"))
    write_soft_labels(run, over_parts_here)
    store = GraphStore.open(run.graph_url)
    encode_in_process(store, config.encodings, config.seed)
    highest = np.concatenate([store.gather(SOFT, store.ids(part)).max(axis=1) for part in range(store.num_parts)])
    figures = {**hits(store, teacher_classes(store)).accuracy(), "confidence": float(highest.mean())}
    storage.write_json(figures_url, figures)
    return figures


def train(config: Config, prepared_url: str, url: str) -> dict[str, Any]:
    """Train the one student of `config.student.models` below `url`, on a graph that `prepare` wrote.

    Gives its `val`, `test` and `unseen` accuracy; `test_peak_over_epochs`, the highest accuracy that any epoch had on
    the nodes that are reported (None for an ensemble); `epochs` (of an ensemble: over all members), `seconds`,
    `parameters` and `multiply_adds` per row. Of an RbM also `merged`, whether it is served as an MLP, and of all its
    experts: `averaged` and `permuted`, what the reported nodes' accuracy loses by it, `distance` and
    `effective_experts`, means over the layers. Raises `InputError`.
    """
    (kind,) = config.student.models
    recorder = MetricsRecorder()
    student, store, costs = _train(config, prepared_url, url, recorder, track_test=True)
    mixture: dict[str, Any] = dict.fromkeys(("merged", "averaged", "permuted", "distance", "effective_experts"))
    if kind == "rbm":
        whole, mixture["merged"] = load_mixture(storage.join(url, kind))
        mixture |= _mixture(mixture_figures(whole, store))
    # Members of an ensemble are trained one by one: there is no epoch of the whole.
    epochs = [row for loop, rows in recorder.loops.items() if loop in (kind, f"{kind}/pretrain") for row in rows]
    by_epoch = [row.get("unseen_accuracy", row.get("test_accuracy")) for row in epochs]
    return {
        **student_accuracy(student, store),
        "test_peak_over_epochs": max((each for each in by_epoch if each is not None), default=None),
        **costs,
        **mixture,
    }


def train_and_validate(
    config: Config, prepared_url: str, url: str, on_epoch: Callable[[Row], None] | None = None
) -> dict[str, Any]:
    """As `train`, for who has yet to choose: it looks at validation nodes alone.

    Gives `val` accuracy, `epochs`, `seconds`, `parameters` and `multiply_adds`. `on_epoch` is called with each epoch's
    metrics. Raises `InputError`.
    """
    student, store, costs = _train(config, prepared_url, url, MetricsRecorder(on_epoch), track_test=False)
    return {**student_accuracy(student, store, (VAL,)), **costs}


def _train(
    config: Config, prepared_url: str, url: str, recorder: MetricsRecorder, track_test: bool
) -> tuple[Student, GraphStore, dict[str, Any]]:
    """The trained student, the graph, and what the training and the student cost."""
    (kind,) = config.student.models
    config = config.model_copy(update={"cluster": _IN_PROCESS})
    graph_url = storage.join(prepared_url, "graph")
    start = time.monotonic()
    train_students(Mesh.single(), recorder, config, graph_url, url, track_test)
    seconds = time.monotonic() - start
    student = load_student(storage.join(url, kind))
    facts = storage.read_json(storage.join(url, kind, "model.json"))
    costs = {
        "epochs": sum(map(len, recorder.loops.values())),
        "seconds": round(seconds, 3),
        # With what is learned but not by gradient: the routing memories.
        "parameters": sum(tensor.numel() for tensor in student.state_dict().values()),
        "multiply_adds": multiply_adds(student, facts["num_features"]),
    }
    return student, GraphStore.open(graph_url), costs


def _mixture(figures: dict[str, Any]) -> dict[str, float | None]:
    """What the nodes that are reported lose when experts are averaged into one, and when memories are permuted."""
    split = "test" if figures["unseen"] is None else "unseen"
    return {
        **{name: figures[split] - figures[name][split] for name in ("averaged", "permuted")},
        "distance": float(np.mean(figures["distance_per_layer"])),
        "effective_experts": float(np.mean(figures["effective_experts"])),
    }


def multiply_adds(student: nn.Module, width: int) -> int:
    """Multiply-adds of the matrix products that the method needs for a row of this width, routing included."""
    # In float64 experts are plain products of their own rows, which torch counts; it does not count grouped ones.
    rows = torch.rand(_COUNTED_ROWS, width, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        copy.deepcopy(student).double()(rows)
    return counter.get_total_flops() // 2 // _COUNTED_ROWS


def _write_graph(run: Run) -> None:
    source_url = run.path("source")
    files = source.below(source.stage_source(run.config, source_url, source.over_here), "source")
    partition.write_graph(run.config, source_url, files, run.graph_url, source.over_here)
    storage.remove(source_url)


def over_parts_here(run: Run, make_worker: MakeWorker, parts: list[int]) -> list[storage.FileInfo]:
    """Call a worker on each part in this process; for `write_soft_labels`."""
    worker = make_worker()
    return [worker(part) for part in parts]
