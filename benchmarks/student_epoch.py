"""An epoch of a student from the files of a graph, against the same steps on rows that are in memory.

    python -m benchmarks.student_epoch [--quick] [--json FILE]

Floor: the steps alone, whose rows are taken from one tensor. An epoch reads each row once: 4 · (F + C) bytes. Files are
out of the page cache before an epoch begins. One thread computes, one reads; run it on an idle machine.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import Row, main
from rbm_dist.config.run import Config
from rbm_dist.distill.losses import Batch, Losses
from rbm_dist.graph.csc import build
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.student import Student, make_mlp, mlp_to_rbm
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.sources.source import SourceGraph
from rbm_dist.train.part_batches import PartBatches
from rbm_dist.train.student_rows import Drawn, StudentRows
from tests.small_graph import write_graph

_WIDTH, _CLASSES, _PARTS, _BATCH = 128, 40, 4, 8192
_CHUNK = 65_536  # rows
_CPU = torch.device("cpu")


def measure(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store = graph(folder, 100_000 if quick else 1_000_000, _WIDTH, _CLASSES)
        for name, student in (("MLP", _mlp()), ("RbM, 8 experts, k = 1", _rbm())):
            rows.append(_compare(name, student, store))
    return rows


def _compare(name: str, student: Student, store: GraphStore) -> Row:
    settings = Config.model_validate({"run_dir": "-"}).student
    of = PartBatches.of(store, list(range(_PARTS)), lambda split: split >= 0, _BATCH)
    rows = StudentRows(store, settings, _CPU, torch.float32, 600.0)
    losses = Losses(settings, Mesh.single())
    optimizer = torch.optim.Adam(student.parameters())
    drawn = [Drawn(step, shares, step, step) for step, shares in enumerate(of.epoch(0, 0))]

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        torch.stack(list(losses(student, batch)[0].values())).sum().backward()
        optimizer.step()

    with rows.batches(name, of, drawn) as batches:
        whole = list(batches)
    x_NF, soft_NC, label_N, key_N = (
        torch.cat([getattr(batch, part) for batch in whole]) for part in ("x_BF", "soft_BC", "label_B", "key_B")
    )
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x_NF)))
    at = order.split([batch.global_rows for batch in whole])
    del whole

    def from_files() -> None:
        with rows.batches(name, of, drawn) as batches:
            for batch in batches:
                step(batch)

    def from_memory() -> None:
        for chosen in at:
            step(Batch(x_NF[chosen], label_N[chosen], key_N[chosen], soft_NC[chosen], len(chosen)))

    step(Batch(x_NF[at[0]], label_N[at[0]], key_N[at[0]], soft_NC[at[0]], len(at[0])))
    turns = []
    for _ in range(3):
        _forget(store.url)
        turns.append((_timed(from_files), _timed(from_memory)))
    files_s, memory_s = np.median(turns, axis=0)
    count = len(x_NF)
    return Row(f"{name}, {count:,} × {_WIDTH}: from files", count / files_s, "rows/s", memory_s / files_s, 0.85)


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _mlp() -> Student:
    return make_mlp(_WIDTH, 256, _CLASSES, 3, "layer", 0.1, 0)


def _rbm() -> Student:
    memories = [torch.randn(8, _WIDTH, generator=torch.Generator().manual_seed(0))]
    return mlp_to_rbm(_mlp(), memories, 1)


def graph(folder: str, nodes: int, width: int, classes: int) -> GraphStore:
    """Random rows of nodes without edges, in parts, and soft labels."""
    rng = np.random.default_rng(0)
    none = np.empty(0, np.int64)

    def features() -> Iterator[np.ndarray]:
        for start in range(0, nodes, _CHUNK):
            yield rng.standard_normal((min(_CHUNK, nodes - start), width), np.float32)

    given = SourceGraph(
        csc=build(none, none, nodes, undirected=True), num_features=width, num_classes=classes,
        label=rng.integers(0, classes, nodes), split=rng.choice(np.array([0, 1, 2], np.int8), nodes),
        feat_chunks=features, read_edges=0, dropped_self_loops=0, dropped_duplicates=0,
    )  # fmt: skip
    store = write_graph(folder, given, (np.arange(nodes) * _PARTS // nodes).astype(np.int32))

    def soft(part: int) -> Iterator[np.ndarray]:
        for start in range(0, len(store.ids(part)), _CHUNK):
            rows = rng.random((min(_CHUNK, len(store.ids(part)) - start), classes), np.float32)
            yield rows / rows.sum(1, keepdims=True)

    parts = range(_PARTS)
    store.publish("soft", [store.write_part("soft", p, np.dtype(np.float32), (classes,), soft(p)) for p in parts])
    return store


def _forget(folder: str) -> None:
    """Put the files out of the page cache."""
    os.sync()
    for path in Path(folder).rglob("*.npy"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main("A student's epoch from files, one thread", measure)
