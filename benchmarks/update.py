"""An update after 0.1 % of the edges have changed against a run of the new graph from scratch, and against exact
inference of all nodes: 1 M nodes, 20 neighbours each, GraphSAGE of two layers, an RbM of 16 experts.

    python -m benchmarks.update [--quick] [--json FILE]

Seconds of CPU time, in one process. From scratch is what the first run takes: the graph is the same but for those
edges. Half of the changed edges are new, half are gone, either anywhere or in one neighbourhood of the graph; rows that
were taken over or made anew are compared with a computation of all on the new version. The teacher has 10 epochs and
the student 20, which is few: with more, from scratch takes longer, an update does not.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.report import Row, main
from rbm_dist import storage
from rbm_dist.config.load import updated
from rbm_dist.config.run import Config
from rbm_dist.config.update import UpdateConfig
from rbm_dist.graph.store import SOFT, GraphStore
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.stages import run as run_
from rbm_dist.stages import update
from rbm_dist.stages.local import MetricsRecorder, over_parts_here
from rbm_dist.stages.partition import write_graph
from rbm_dist.stages.pipeline import STAGES
from rbm_dist.stages.run import Files, Run
from rbm_dist.stages.soft_labels import reset_soft_labels, write_soft_labels
from rbm_dist.stages.source import below, over_here, stage_source
from rbm_dist.stages.student import train_students
from rbm_dist.stages.teacher import train_teacher

_SHARE = 0.001  # of the edges
T = TypeVar("T")


def measure(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        _scratch(f"{folder}/warm", 4_000, 1)  # compiles
        spent = _scratch(f"{folder}/run", 20_000 if quick else 1_000_000, 3 if quick else 10)
        rows = []
        for where, count in (("anywhere", None), ("in one neighbourhood", 200 if quick else 10_000)):
            rows += _updated(f"{folder}/run", f"{folder}/{count}", where, count, spent, quick)
        return rows


def _timed(name: str, work: Callable[[], T], into: dict[str, float]) -> T:
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    into[name] = time.process_time() - cpu
    print(f"{name}: {time.perf_counter() - start:,.1f} s on the clock, {into[name]:,.1f} s of CPU", flush=True)
    return result


def _scratch(url: str, num_nodes: int, epochs: int) -> dict[str, float]:
    """A finished run as far as an update reads it; seconds by stage."""
    config = Config.model_validate(
        {
            "run_dir": url,
            "source": {
                "kind": "synthetic", "num_nodes": num_nodes, "degree": 20,
                "num_communities": max(47, num_nodes // 2_500),
            },
            "partition": {"method": "streaming", "num_parts": 8},
            "teacher": {"epochs": epochs},
            "soft_labels": {"inference": "exact", "keep_layers": True},
            "student": {
                "models": ["rbm"], "epochs": 2 * epochs, "pretrain_epochs": epochs, "batch_size": 4096,
                "hidden": 256, "merge_tolerance": None,
            },
        }
    )  # fmt: skip
    run, spent = Run(config, url, MetricsRecorder()), {}
    storage.write_json(f"{url}/config.json", config.model_dump(mode="json"))
    files = _timed("source", lambda: stage_source(config, f"{url}/source", over_here), spent)
    arguments = (config, f"{url}/source", below(files, "source"), f"{url}/graph", over_here)
    graph = _timed("partition", lambda: write_graph(*arguments), spent)
    _finish("partition", url, {f"graph/{name}": info for name, info in graph.items()})
    _timed(
        "teacher", lambda: train_teacher(Mesh.single(), run.reporter, config, run.graph_url, f"{url}/teacher"), spent
    )
    _timed("soft labels", lambda: write_soft_labels(run, over_parts_here), spent)
    students = (Mesh.single(), run.reporter, config, run.graph_url, f"{url}/student")
    _timed("student", lambda: train_students(*students), spent)
    names = [f"student/rbm/{name}" for name in ("model.json", "model.safetensors")]
    _finish("student", url, {name: storage.file_info(f"{url}/{name}") for name in names})
    return spent


def _finish(stage: str, url: str, files: Files) -> None:
    (found,) = (each for each in STAGES if each.name == stage)
    run_.finish(found, url, files, 0.0)


def _updated(url: str, out: str, where: str, count: int | None, scratch: dict[str, float], quick: bool) -> list[Row]:
    """An update of a run: its changed edges have both ends among `count` nodes that are near each other."""
    store = GraphStore.open(f"{url}/graph")
    new, gone = _changed_edges(store, count)
    tables = {}
    for name, edges in (("add_edges", new), ("drop_edges", gone)):
        tables[name] = f"{out}-{name}.parquet"
        orig = [store.gather("orig_id", ends) for ends in edges]
        pq.write_table(pa.table(dict(zip(("src", "dst"), orig, strict=True))), tables[name])
    config = updated(url, out, UpdateConfig(run=url, **tables))
    run, spent = Run(config, out, MetricsRecorder()), {}
    storage.write_json(
        f"{out}/source/manifest.json", {"files": _timed("changes", lambda: update.run_changes(run, over_here), spent)}
    )
    _timed("version", lambda: update.run_version(run, over_here), spent)
    storage.link(f"{url}/teacher/model.safetensors", f"{out}/teacher/model.safetensors")
    _timed("reach", lambda: update.write_touched(run), spent)
    _timed("rows", lambda: write_soft_labels(run, over_parts_here, before=update.usable_before(run)), spent)
    _timed("learn", lambda: update.write_learn(run, kept=True), spent)
    students = (Mesh.single(), run.reporter, config, run.graph_url, f"{out}/student")
    if update.trains_further(run):
        _timed("student, further", lambda: train_students(*students, start=f"{url}/student"), spent)
    facts = storage.read_json(f"{out}/soft_labels/{update.LABELS}")
    made, every = _soft(run), {}
    whole = replace(run, url=f"{out}-whole")
    _copy(out, whole.url)
    _timed("all rows", lambda: write_soft_labels(whole, over_parts_here), every)
    difference = float(np.abs(made - _soft(whole)).max())
    reached = 100 * facts["reached"][-1] / facts["nodes"]
    inference = spent["reach"] + spent["rows"]
    name = f"{store.num_nodes:,} nodes, {store.num_edges:,} in-edges, {_SHARE:.1%} of them changed {where}"

    def full(target: float) -> float | None:
        """Of a small graph, what it takes to begin says nothing."""
        return None if quick else target

    ratio = sum(scratch.values()) / sum(spent.values())
    graph = (scratch["source"] + scratch["partition"]) / (spent["changes"] + spent["version"])
    return [
        Row(f"{name}: update vs from scratch", sum(spent.values()), "CPU s", ratio, full(20.0)),
        Row(f"{name}: new version vs source and partition", spent["version"], "CPU s", graph, None),
        Row(f"{name}: soft labels vs of all, {reached:.1f} % reached", inference, "CPU s",
            every["all rows"] / inference, None),
        Row(f"{name}: largest difference to all", difference * 1e6, "1e-6", 1e-5 / max(difference, 1e-9), 1.0),
    ]  # fmt: skip


def _changed_edges(store: GraphStore, count: int | None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Edges that are to be new, and edges that are to go: sources and destinations."""
    rng, half = np.random.default_rng(0), max(1, int(_SHARE * store.num_edges / 2 / 2))
    part = 0
    indptr, indices = store.array("indptr", part), store.array("indices", part)
    if count is None:
        ends = rng.integers(0, store.num_nodes, (2, half))
        at = rng.integers(0, store.num_parts, half)
        found: list[Any] = []
        for part in range(store.num_parts):
            indptr, indices = store.array("indptr", part), store.array("indices", part)
            edge = rng.integers(0, len(indices), int((at == part).sum()))
            found.append((indices[edge], store.offsets[part] + np.searchsorted(indptr, edge, side="right") - 1))
        sources, destinations = (np.concatenate(each) for each in zip(*found, strict=True))
    else:
        near = _near(indptr, indices, count)
        ends = rng.choice(near, (2, half))
        edges = np.concatenate([np.arange(indptr[node], indptr[node + 1]) for node in near])
        edge = rng.choice(edges, min(half, len(edges)), replace=False)
        sources, destinations = indices[edge], np.searchsorted(indptr, edge, side="right") - 1
    gone = set(zip(sources.tolist(), destinations.tolist(), strict=True))
    fresh = np.array([pair not in gone and pair[::-1] not in gone for pair in zip(*ends.tolist(), strict=True)])
    return [(ends[0][fresh], ends[1][fresh]), (sources, destinations)]


def _near(indptr: np.ndarray, indices: np.ndarray, count: int) -> np.ndarray:
    """Nodes of the first part that are found first from one of them, breadth first."""
    seen, frontier = np.zeros(len(indptr) - 1, bool), np.array([int(np.diff(indptr).argmax())])
    seen[frontier] = True
    while seen.sum() < count and len(frontier):
        edges = np.concatenate([indices[indptr[node] : indptr[node + 1]] for node in frontier.tolist()])
        frontier = np.unique(edges[edges < len(seen)])
        frontier = frontier[~seen[frontier]]
        seen[frontier] = True
    return np.flatnonzero(seen)[:count]


def _soft(run: Run) -> np.ndarray:
    store = GraphStore.open(run.graph_url)
    return store.gather(SOFT, np.arange(store.num_nodes))


def _copy(out: str, url: str) -> None:
    """The same graph without what its soft labels are, and the same teacher."""
    for path in [*Path(out, "graph").rglob("*.*"), Path(out, "teacher", "model.safetensors")]:
        storage.link(str(path), f"{url}/{path.relative_to(out)}")
    reset_soft_labels(url)


if __name__ == "__main__":
    main("Updates of a run", measure)
