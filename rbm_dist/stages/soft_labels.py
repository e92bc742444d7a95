"""Stage `soft_labels`: the teacher's class distribution for every node, by actors that each work on their own parts.

`sampled`: mini-batches with sampled neighbours. `exact`: layer by layer over all in-neighbours; each layer's states are
an array of the store, so memory is bounded by a batch and its neighbours whatever the depth.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np
import torch

from rbm_dist import storage
from rbm_dist.config import Config
from rbm_dist.graph.random_bits import key
from rbm_dist.graph.shards import part_name
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.sage import Sage
from rbm_dist.runtime.progress import Reporter
from rbm_dist.runtime.tasks import run_on_parts
from rbm_dist.serve.artifact import load_weights
from rbm_dist.stages.run import Files, Run
from rbm_dist.stages.teacher import build_teacher, sample_logits

SOFT = "soft"
_DRAW = 3  # word of the random keys


def run_soft_labels(run: Run) -> Files:
    """Write the array `soft` (`[N, C]` float32 probabilities) of every part."""
    config, store = run.config, GraphStore.open(run.graph_url)
    layers = len(config.teacher.fanout) if config.soft_labels.inference == "exact" else 1
    states = [f"h{layer + 1}" for layer in range(layers - 1)]
    if not storage.exists(run.path("graph", f"{SOFT}.json")):
        if config.soft_labels.inference == "sampled":
            _over_parts(run, store, SOFT, _sampled)
        else:
            for layer, (before, name) in enumerate(zip(["feat", *states], [*states, SOFT], strict=True)):
                _over_parts(run, store, name, functools.partial(_exact_layer, layer=layer, before=before))
    for name in states:
        _remove(run.url, store, name)
    index = storage.read_json(run.path("graph", f"{SOFT}.json"))
    return {f"graph/{name}": info for name, info in index["files"].items()}


def reset_soft_labels(url: str) -> None:
    """Remove the arrays that this stage added to the graph."""
    graph = storage.join(url, "graph")
    if storage.exists(storage.join(graph, "graph.json")):
        store = GraphStore.open(graph)
        for name in storage.listdir(storage.join(graph, part_name(0))):
            stem = name.removesuffix(".npy")
            if stem == SOFT or (stem[0] == "h" and stem[1:].isdecimal()):
                _remove(url, store, stem)


Compute = Callable[[Config, Sage, GraphStore, np.ndarray], torch.Tensor]


def _over_parts(run: Run, store: GraphStore, name: str, compute: Compute) -> None:
    """Fill a new array in all parts; parts that a cut-off run finished are kept."""
    if storage.exists(run.path("graph", f"{name}.json")):
        return
    config, reporter = run.config, run.reporter
    make_worker = functools.partial(_make_worker, config, run.graph_url, run.path("teacher"), name, compute, reporter)
    cluster = config.cluster
    files = run_on_parts(
        "soft_labels",
        make_worker,
        list(range(store.num_parts)),
        cluster.inference_workers,
        cluster.use_gpu,
        run.timeout_s,
    )
    store.publish(name, files)


def _make_worker(
    config: Config, graph_url: str, teacher_url: str, name: str, compute: Compute, reporter: Reporter
) -> Callable[[int], storage.FileInfo]:
    """Runs in an actor: opens the graph and the teacher once, then fills one part per call."""
    torch.set_num_threads(1)
    store = GraphStore.open(graph_url, config.teacher.sampler)
    model = build_teacher(config, store)
    load_weights(storage.join(teacher_url, "model.safetensors"), model)
    model.eval().to("cuda" if config.cluster.use_gpu else "cpu")

    def chunks(part: int) -> Iterator[np.ndarray]:
        ids, batch = store.ids(part), config.soft_labels.batch_size
        for start in range(0, len(ids), batch):
            rows = ids[start : start + batch]
            with torch.no_grad():
                yield compute(config, model, store, rows).cpu().numpy()
            reporter.add(f"soft labels: {name}", len(rows), store.num_nodes, "nodes")

    def fill(part: int) -> storage.FileInfo:
        url = storage.join(graph_url, part_name(part), f"{name}.npy")
        if storage.exists(url):  # files appear whole, and only this stage with this configuration writes them
            return storage.file_info(url)
        width = store.num_classes if name == SOFT else config.teacher.hidden
        return store.write_part(name, part, np.dtype(np.float32), (width,), chunks(part))

    return fill


def _sampled(config: Config, model: Sage, store: GraphStore, ids: np.ndarray) -> torch.Tensor:
    fanout = config.soft_labels.fanout or config.teacher.fanout
    return sample_logits(model, store, ids, fanout, key(config.seed, _DRAW), training=False).softmax(1)


def _exact_layer(
    config: Config, model: Sage, store: GraphStore, ids: np.ndarray, layer: int, before: str
) -> torch.Tensor:
    device = next(model.parameters()).device
    sample = store.sample(ids, (-1,), key(0))
    states_nD = torch.from_numpy(store.gather(before, sample.nodes)).to(device)
    edges_2m = torch.from_numpy(np.stack([sample.src, sample.dst])).to(device)
    out = model.layer(layer, states_nD, len(ids), edges_2m)
    return out.softmax(1) if layer == model.num_layers - 1 else out


def _remove(url: str, store: GraphStore, name: str) -> None:
    graph = storage.join(url, "graph")
    storage.remove(storage.join(graph, f"{name}.json"))
    for part in range(store.num_parts):
        storage.remove(storage.join(graph, part_name(part), f"{name}.npy"))
