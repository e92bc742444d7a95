"""A teacher as it is and compressed, in accuracy, bytes, multiply-adds and time: a part of `compression.py`."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file
from safetensors.numpy import save as save_tensors

from benchmarks.compression_time import BATCHES, DIFFERENT, KEY, Figures, Weights, microseconds
from rbm_dist.config.run import Config
from rbm_dist.graph import quantised
from rbm_dist.graph.sampler import Sample
from rbm_dist.graph.splits import TEST
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.gnn import Gnn
from rbm_dist.models.teacher import build_teacher
from rbm_dist.serve.accuracy import hits
from rbm_dist.train.sampled_rows import read_sample, sample_logits

Predict = Callable[[np.ndarray], np.ndarray]


def teachers(config: Config, store: GraphStore, url: str, budget_s: float) -> Iterator[Figures]:
    """The rows of a run's teacher."""
    weights = load_file(str(Path(url) / "teacher" / "model.safetensors"))
    fanout = config.teacher.fanout
    matrices = [name for name, each in weights.items() if each.ndim == 2]
    graph = _graph_bytes(store)
    seeds = np.random.default_rng(KEY).choice(store.num_nodes, min(256, store.num_nodes), replace=False)
    samples = [store.sample(seed[None], fanout, KEY) for seed in seeds]
    read = float(np.mean([_sample_bytes(store, each) for each in samples]))
    variants = {
        "teacher": weights,
        "teacher, int8": _rounded(weights, matrices),
        "teacher, 50 % of weights": _without_smallest(weights, matrices, 0.5),
        "teacher, 10 % of weights": _without_smallest(weights, matrices, 0.1),
    }
    for name, changed in variants.items():
        model = build_teacher(config, store.num_features, store.num_classes)
        model.load_state_dict({key: torch.from_numpy(each) for key, each in changed.items()})
        model.eval()
        size, used = _stored(name, changed, matrices)
        call = functools.partial(_teacher_logits, model, store, fanout)
        yield {
            "model": name,
            "test": hits(store, lambda ids, call=call: _in_batches(call, ids).argmax(1), (TEST,)).accuracy()["test"],
            "bytes": size,
            "bytes_with_graph": size + graph,
            "multiply_adds": float(np.mean([_gnn_multiply_adds(model, each, used) for each in samples])),
            "bytes_read": read + size,
            **microseconds(call, _node_batches(store), budget_s),
        }
    sample_only = functools.partial(_sampled_rows, store, fanout)
    yield {"model": "teacher, its samples alone"} | microseconds(sample_only, _node_batches(store), budget_s)


def _teacher_logits(model: Gnn, store: GraphStore, fanout: tuple[int, ...], ids: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return sample_logits(model, store, ids, fanout, KEY, training=False).numpy()


def _sampled_rows(store: GraphStore, fanout: tuple[int, ...], ids: np.ndarray) -> object:
    return read_sample(store, ids, fanout, KEY, torch.device("cpu"))


def _in_batches(call: Predict, ids: np.ndarray) -> np.ndarray:
    return np.concatenate([call(ids[start : start + 4096]) for start in range(0, len(ids), 4096)])


def _node_batches(store: GraphStore) -> list[np.ndarray]:
    """Nodes at random, `BATCHES` at once; each batch size has at least `DIFFERENT` of them."""
    draw = np.random.default_rng(KEY)
    found = []
    for batch in BATCHES:
        size = min(batch, store.num_nodes)
        found += [draw.choice(store.num_nodes, size, replace=False) for _ in range(max(1, DIFFERENT // size))]
    return found


def _rounded(weights: Weights, matrices: list[str]) -> Weights:
    """Matrices rounded to int8 with a scale per output, as float32: torch has no int8 product of these shapes."""
    changed = dict(weights)
    for name in matrices:
        scale_O = quantised.scales("int8", np.abs(weights[name]).max(1))
        assert scale_O is not None
        changed[name] = quantised.encode(weights[name], "int8", scale_O[:, None]) * scale_O[:, None]
    return changed


def _without_smallest(weights: Weights, matrices: list[str], kept: float) -> Weights:
    """The weights of largest magnitude of all matrices together stay, the others are zero; nothing is trained again."""
    magnitudes = np.concatenate([np.abs(weights[name]).ravel() for name in matrices])
    least = np.quantile(magnitudes, 1 - kept)
    return weights | {name: np.where(np.abs(weights[name]) >= least, weights[name], 0) for name in matrices}


def _stored(name: str, weights: Weights, matrices: list[str]) -> tuple[int, dict[str, float]]:
    """Bytes of a file of these weights, and the share of each matrix that has to be multiplied with.

    Of int8: with its scales; of a pruned matrix: the values that are left, and a bit for each that says whether it is.
    """
    used = {each: 1.0 for each in matrices}
    if name.endswith("int8"):
        stored = {key: each.astype(np.int8) if key in matrices else each for key, each in weights.items()}
        stored |= {f"{key}.scale": np.zeros(len(weights[key]), np.float32) for key in matrices}
        return len(save_tensors(stored)), used
    if name.endswith("of weights"):
        stored = dict(weights)
        for key in matrices:
            left = weights[key] != 0
            stored |= {key: weights[key][left], f"{key}.left": np.packbits(left)}
            used[key] = float(left.mean())
        return len(save_tensors(stored)), used
    return len(save_tensors(weights)), used


def _gnn_multiply_adds(model: Gnn, sample: Sample, used: dict[str, float]) -> float:
    """Of one sampled neighbourhood: products as `Gnn` orders them, and an addition per edge and value."""
    total = 0.0
    for layer, conv in enumerate(model.convs):
        hops = model.num_layers - layer
        sources = sum(sample.nodes_per_hop[: hops + 1])
        targets, edges = sum(sample.nodes_per_hop[:hops]), sum(sample.edges_per_hop[:hops])
        outputs, width = conv.lin_l.weight.shape
        near, own = (outputs * width * used[f"convs.{layer}.{part}.weight"] for part in ("lin_l", "lin_r"))
        narrows = outputs < width
        total += (sources if narrows else targets) * near + targets * own + edges * min(outputs, width)
    return total


def row_bytes(store: GraphStore) -> float:
    """Of a node's features as they are stored, on average."""
    rows = store.stored_rows("feat", np.arange(min(4096, store.num_nodes)))
    if isinstance(rows, np.ndarray):
        return rows.nbytes / len(rows)
    return (rows.data.nbytes + rows.indices.nbytes) / rows.shape[0] + rows.indptr.itemsize


def _sample_bytes(store: GraphStore, sample: Sample) -> float:
    """What one node's prediction reads of the graph: features of its whole sample, edges, and two offsets per list."""
    expanded = sum(sample.nodes_per_hop[:-1])
    sizes = [store.array(name, 0).dtype.itemsize for name in ("indices", "indptr")]
    return len(sample.nodes) * row_bytes(store) + len(sample.src) * sizes[0] + 2 * expanded * sizes[1]


def _graph_bytes(store: GraphStore) -> int:
    """What has to be kept of the graph to predict with neighbours: features and edges."""
    edges = sum(store.array(name, part).nbytes for name in ("indices", "indptr") for part in range(store.num_parts))
    return round(edges + row_bytes(store) * store.num_nodes)
