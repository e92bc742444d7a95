"""Distil a graph neural network, or compress it: a finished run's teacher and students, as they are and made smaller.

    python -m benchmarks.compression RUN… [--quick] [--json FILE] [--csv FILE]

A run is one of an MLP and an RbM that was not merged (`student.merge_tolerance=null`). What each column means:
docs/compression.md. The rows that are held against targets are the RbM in int8 beside the one in float32; the floor of
its bytes is a quarter.
"""

import argparse
import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from safetensors.numpy import save as save_tensors
from threadpoolctl import threadpool_limits

from benchmarks.compression_teacher import row_bytes, teachers
from benchmarks.compression_time import BATCHES, DIFFERENT, KEY, Figures, Weights, microseconds
from benchmarks.report import Row, show
from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.graph.splits import TEST
from rbm_dist.graph.store import GraphStore
from rbm_dist.serve import compress
from rbm_dist.serve.from_run import read_run
from rbm_dist.serve.layers import Layer, members_of
from rbm_dist.serve.network import network_of
from rbm_dist.serve.onnx_engine import OnnxEngine
from rbm_dist.serve.onnx_graph import build
from rbm_dist.serve.validation import Labelled, from_graph

_BUDGET_S = 0.7


def study(url: str, budget_s: float) -> list[Figures]:
    """All rows of one run."""
    store = GraphStore.open(storage.join(url, "graph"))
    config = Config.model_validate(storage.read_json(storage.join(url, "config.json")))
    rows = [*teachers(config, store, url, budget_s), *_students(store, url, budget_s)]
    return [{"graph": url.rstrip("/").rsplit("/", 1)[-1]} | row for row in rows]


def _students(store: GraphStore, url: str, budget_s: float) -> Iterator[Figures]:
    mlp, rbm = read_run(url, "mlp"), read_run(url, "rbm")
    experts, kind = rbm[0].network.num_experts, rbm[0].network.kind
    assert kind == "rbm", f"{url}: its RbM is served as an MLP; run with student.merge_tolerance=null"
    val, test = from_graph(store, rbm[0]), from_graph(store, rbm[0], TEST)
    students = {
        "MLP": mlp,
        "MLP, int8": compress.in_int8(*mlp),
        "RbM": rbm,
        "RbM, int8": compress.in_int8(*rbm),
        f"RbM, {experts // 2} of {experts} experts": compress.pruned(*rbm, experts // 2, val.rows_BD),
        f"RbM, {experts // 4} of {experts} experts": compress.pruned(*rbm, experts // 4, val.rows_BD),
        "RbM, experts merged": compress.merged(*rbm),
    }
    row = row_bytes(store)
    batches = _row_batches(test)
    for name, (model, tensors) in students.items():
        facts = model.network.model_dump()
        layers = members_of(facts, tensors)[0]
        network = network_of(facts, tensors)
        yield {
            "model": name,
            "test": test.accuracy(network_of(facts, tensors, few=1)),
            "bytes": len(save_tensors(tensors)),
            "multiply_adds": sum(layer.multiply_adds for layer in layers),
            "bytes_read": row + sum(map(_read_per_row, layers)),
            **microseconds(network.logits, batches, budget_s),
        }
    for rank in (8, 32):
        yield {"model": f"RbM, rank {rank}"} | _low_rank(*rbm, rank, test, row)
    yield _by_onnx_runtime(*rbm, test, batches, budget_s)


def _row_batches(labelled: Labelled) -> list[np.ndarray]:
    """Dense rows, as a caller has them; as `_node_batches`."""
    draw = np.random.default_rng(KEY)
    found = []
    for batch in BATCHES:
        for _ in range(max(1, DIFFERENT // batch)):
            rows = labelled.rows_BD[draw.integers(0, len(labelled.label_B), batch)]
            found.append(rows if isinstance(rows, np.ndarray) else rows.toarray())
    return found


def _read_per_row(layer: Layer) -> int:
    """Bytes of a layer that one row needs."""
    each = [layer.weight_EDO, layer.bias_EO] + ([] if layer.scale_ED is None else [layer.scale_ED])
    routing = 0 if layer.keys_PE is None else layer.keys_PE.nbytes
    return routing + sum(array.nbytes for array in each) * layer.top_k // len(layer.bias_EO)


def _low_rank(model: Any, tensors: Weights, rank: int, test: Labelled, row: float) -> Figures:
    """Experts as their mean and a difference of low rank. Accuracy by the whole matrices; the rest is counted."""
    changed, size = dict(tensors), len(save_tensors(tensors))
    added = 0
    for name in [each for each in tensors if each.endswith("weight_LDO")]:
        weight_EDO = tensors[name]
        mean_DO = weight_EDO.mean(0)
        u, s, v = np.linalg.svd(weight_EDO - mean_DO, full_matrices=False)
        changed[name] = mean_DO + (u[:, :, :rank] * s[:, None, :rank]) @ v[:, :rank]
        experts, width, outputs = weight_EDO.shape
        thin = min(rank, len(v[0])) * (width + outputs)
        size += mean_DO.nbytes + experts * thin * 4 - weight_EDO.nbytes
        added += model.network.top_k * thin
    facts = model.network.model_dump()
    layers = members_of(facts, tensors)[0]
    return {
        "test": test.accuracy(network_of(facts, changed, few=1)),
        "bytes": size,
        "multiply_adds": sum(layer.multiply_adds for layer in layers) + added,
        "bytes_read": row + sum(map(_read_per_row, layers)) + 4 * added,
    }


def _by_onnx_runtime(
    model: Any, tensors: Weights, test: Labelled, batches: list[np.ndarray], budget_s: float
) -> Figures:
    """By ONNX Runtime's own dynamic int8, in the form in which all experts are one product; routed in float32."""
    width = model.network.num_features
    model = model.model_copy(update={
        "inputs": {"feat": width},
        "features": model.features.model_copy(update={"rows": "", "missing": False}),
    })  # fmt: skip
    tensors = tensors | {
        "scaling.columns": np.stack([np.zeros(width), np.zeros(width), np.ones(width)]),
        "scaling.indicators": np.empty(0, np.int64),
    }
    proto = build(model, tensors, wide=True)
    shapes = {each.name: tuple(each.dims) for each in proto.graph.initializer}
    keep = []
    for place, node in enumerate(proto.graph.node):
        node.name = f"n{place}"
        weight = shapes.get(node.input[1]) if node.op_type == "MatMul" else None
        if node.op_type == "MatMul" and (weight is None or weight[1] == model.network.num_experts):
            keep.append(node.name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantize_dynamic(
            proto, path, per_channel=True, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul"],
            nodes_to_exclude=keep,
        )  # fmt: skip
        data = path.read_bytes()
    onnx.checker.check_model(onnx.load_from_string(data))
    engine = OnnxEngine(model, data)

    def probabilities(rows_BD: np.ndarray) -> np.ndarray:
        return engine.probabilities({"feat": rows_BD})

    found = []
    for start in range(0, len(test.label_B), 4096):
        rows = test.rows_BD[start : start + 4096]
        found.append(probabilities(rows if isinstance(rows, np.ndarray) else rows.toarray()).argmax(1))
    layers = members_of(model.network.model_dump(), tensors)[0]
    products = sum(layer.weight_EDO.size + (0 if layer.keys_PE is None else layer.keys_PE.size) for layer in layers)
    return {
        "model": "RbM, int8 by ONNX Runtime",
        "test": float(np.mean(np.concatenate(found) == test.label_B)),
        "bytes": len(data),
        "multiply_adds": products,
        "bytes_read": None,
        **microseconds(probabilities, batches, budget_s),
    }


def against_targets(rows: list[Figures]) -> list[Row]:
    """The RbM in int8 beside that in float32, of each graph."""
    found = []
    for graph in dict.fromkeys(row["graph"] for row in rows):
        full, small = (
            next(row for row in rows if (row["graph"], row["model"]) == (graph, name)) for name in ("RbM", "RbM, int8")
        )
        lost = 100 * (full["test"] - small["test"])
        found += [
            Row(f"{graph}: bytes", small["bytes"], "bytes", full["bytes"] / small["bytes"], 1 / 0.3),
            Row(f"{graph}: batch 1", small["us_1"], "µs per row", full["us_1"] / small["us_1"], 1.0),
            Row(
                f"{graph}: accuracy within half a point",
                lost,
                "points lost",
                small["test"] / (full["test"] - 0.005),
                1.0,
            ),
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Distil, or compress")
    parser.add_argument("runs", nargs="+", help="finished runs")
    parser.add_argument("--quick", action="store_true", help="shorter timings")
    parser.add_argument("--json", type=Path, help="write the rows with targets there")
    parser.add_argument("--csv", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with threadpool_limits(1):
        rows = [row for run in arguments.runs for row in study(run, 0.1 if arguments.quick else _BUDGET_S)]
    if arguments.csv:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with arguments.csv.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows({key: _short(value) for key, value in row.items()} for row in rows)
    show("The RbM in int8", against_targets(rows), arguments.json)


def _short(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


if __name__ == "__main__":
    main()
