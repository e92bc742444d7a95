"""Soft labels of a whole graph by a three-layer GraphSAGE: exactly, layer by layer over parts on disk, against sampled
neighbourhoods of every node, and against PyG's own layers on the whole graph in memory.

    python -m benchmarks.teacher [--quick] [--json FILE]

Floor: exact inference reads each in-neighbour's row once per layer, `E · Σ 4 D` bytes; to add up as many rows that lie
in memory, in the same order, is the least that takes. CPU time, one thread; sampled inference is timed on some of the
nodes. Peak memory is of processes of their own, with the pages of mapped files that they touched.
"""

import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import njit

from benchmarks.report import Row, main, seconds
from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.teacher import build_teacher
from rbm_dist.serve.artifact import load_weights, save_weights
from rbm_dist.stages.local import MetricsRecorder, over_parts_here
from rbm_dist.stages.partition import write_graph
from rbm_dist.stages.run import Run
from rbm_dist.stages.soft_labels import reset_soft_labels, write_soft_labels
from rbm_dist.stages.source import below, over_here, stage_source
from rbm_dist.train.sampled_rows import sample_logits

FANOUT = (15, 10, 5)
_FEATURES, _HIDDEN, _CLASSES = 100, 256, 47


def measure(quick: bool) -> list[Row]:
    large = (50_000, 48) if quick else (2_400_000, 48)
    small = (50_000, 24) if quick else (200_000, 48)  # PyG's messages of a layer are E · 256 · 4 bytes
    rows = []

    def full(target: float) -> float | None:
        """Of a small graph, what it takes to begin says nothing."""
        return None if quick else target

    with tempfile.TemporaryDirectory() as folder:
        config = graph_of(f"{folder}/large", *large)
        alone(_exact, config)  # compiles
        exact_s, _, _ = alone(_exact, config)
        store = GraphStore.open(f"{config.run_dir}/graph")
        sampled_s, _, _ = alone(_sampled, config, 2_000 if quick else 20_000)
        name = f"{store.num_nodes:,} nodes, {store.num_edges:,} in-edges"
        rate = store.num_nodes / exact_s
        rows.append(Row(f"{name}: exact vs sampled {[*FANOUT]}", rate, "nodes per CPU s", sampled_s / exact_s, 5.0))
        # The rest are matrix products, and files.
        share = _floor(store) / exact_s
        rows.append(Row(f"{name}: exact, share of the floor", rate, "nodes per CPU s", share, full(1 / 3)))
        config = graph_of(f"{folder}/small", *small)
        exact_s, exact_bytes, mine = alone(_exact, config)
        pyg_s, pyg_bytes, theirs = alone(_pyg, config)
        store = GraphStore.open(f"{config.run_dir}/graph")
        name = f"{store.num_nodes:,} nodes, {store.num_edges:,} in-edges"
        rows += [
            Row(f"{name}: exact vs PyG", store.num_nodes / exact_s, "nodes per CPU s", pyg_s / exact_s, full(3.0)),
            Row(f"{name}: memory vs PyG", exact_bytes / 1e6, "MB", pyg_bytes / exact_bytes, full(2.0)),
        ]
        # Of probabilities; at most 1e-5. Often none at all: both add up in the order of the edges.
        difference = float(np.abs(mine - theirs).max())
        worst = 1e-5 / max(difference, 1e-9)
        rows.append(Row(f"{name}: largest difference to PyG", difference * 1e6, "1e-6", worst, 1.0))
    return rows


def graph_of(url: str, num_nodes: int, degree: int, label_noise: float = 0) -> Config:
    """A graph in four parts, and a teacher that has learned nothing."""
    config = Config.model_validate(
        {
            "run_dir": url,
            "source": {
                "kind": "synthetic", "num_nodes": num_nodes, "degree": degree, "num_communities": _CLASSES,
                "num_features": _FEATURES, "label_noise": label_noise,
            },
            "partition": {"method": "streaming", "num_parts": 4, "passes": 1},
            "teacher": {"fanout": list(FANOUT), "hidden": _HIDDEN},
            "soft_labels": {"inference": "exact"},
        }
    )  # fmt: skip
    files = below(stage_source(config, f"{url}/source", over_here), "source")
    write_graph(config, f"{url}/source", files, f"{url}/graph", over_here)
    storage.remove(f"{url}/source")
    store = GraphStore.open(f"{url}/graph")
    save_weights(f"{url}/teacher/model.safetensors", build_teacher(config, store.num_features, store.num_classes))
    return config


def _exact(config: Config) -> np.ndarray:
    reset_soft_labels(config.run_dir)
    write_soft_labels(Run(config, config.run_dir, MetricsRecorder()), over_parts_here)
    store = GraphStore.open(f"{config.run_dir}/graph")
    return store.gather("soft", np.arange(min(store.num_nodes, 10_000)))


@torch.inference_mode()
def _sampled(config: Config, count: int) -> float:
    """Seconds for all nodes, of some."""
    store = GraphStore.open(f"{config.run_dir}/graph")
    model = _teacher(config, store)
    ids = np.random.default_rng(0).choice(store.num_nodes, count, replace=False)
    batches = np.split(ids, range(1000, count, 1000))
    sample_logits(model, store, batches[0], FANOUT, 0, training=False)
    start = time.process_time()
    for batch in batches:
        sample_logits(model, store, batch, FANOUT, 0, training=False)
    return (time.process_time() - start) * store.num_nodes / count


@torch.inference_mode()
def _pyg(config: Config) -> np.ndarray:
    store = GraphStore.open(f"{config.run_dir}/graph")
    model = _teacher(config, store)
    parts = range(store.num_parts)
    degrees = np.concatenate([np.diff(store.array("indptr", part)) for part in parts])
    sources = np.concatenate([store.array("indices", part) for part in parts]).astype(np.int64)
    edge_2E = torch.from_numpy(np.stack([sources, np.repeat(np.arange(store.num_nodes), degrees)]))
    x = torch.from_numpy(store.gather("feat", np.arange(store.num_nodes)))
    for layer, conv in enumerate(model.convs):
        x = conv(x, edge_2E)
        x = x if layer == model.num_layers - 1 else x.relu()
    return x.softmax(1)[:10_000].numpy()


def _teacher(config: Config, store: GraphStore) -> Any:
    model = build_teacher(config, store.num_features, store.num_classes)
    load_weights(f"{config.run_dir}/teacher/model.safetensors", model)
    return model.eval()


def _floor(store: GraphStore) -> float:
    """Seconds to add up as many rows, at the places where they are, from memory; of a part of them."""
    indices, total = store.array("indices", 0)[: 1 << 20].astype(np.int64), 0.0
    for width in (_FEATURES, _HIDDEN, _HIDDEN):
        rows, sums = np.ones((store.num_nodes, width), np.float32), np.zeros((1, width), np.float32)
        total += seconds(lambda rows=rows, sums=sums: _add(rows, indices, sums[0]), 0.5)  # type: ignore[misc]
    return total * store.num_edges / len(indices)


@njit(cache=True)
def _add(rows, indices, sum_D):  # type: ignore[no-untyped-def]
    for source in indices:
        for d in range(len(sum_D)):
            sum_D[d] += rows[source, d]


def alone(work: Callable[..., Any], *arguments: Any) -> tuple[float, float, Any]:
    """CPU seconds, peak bytes over those before, and what it gives, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, work, arguments))
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    return found


def _work(connection: Any, work: Callable[..., Any], arguments: tuple) -> None:
    import torch_geometric.nn  # noqa: F401 - not part of what is measured

    torch.set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of imports, is forgotten
    before = _kilobytes("VmRSS")
    start = time.process_time()
    result = work(*arguments)
    spent = result if isinstance(result, float) else time.process_time() - start
    held = 1024.0 * (_kilobytes("VmHWM") - before)
    connection.send((spent, held, None if isinstance(result, float) else result))


def _kilobytes(name: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{name}:")[2].split()[0])


if __name__ == "__main__":
    main("Soft labels of a whole graph, one thread", measure)
