"""Answering with a student: the served network against MLPs of as many multiply-adds, and against dispatch.

    python -m benchmarks.serving [--quick] [--json FILE]

RbMs D → H → H → C with layer norm, random weights, one thread. At one row the peers are an ONNX Runtime MLP of equal
multiply-adds (k · layers + routing; it has no norm to compute) and torch's MLP of the same width; in batches torch's
MLP of equal multiply-adds, with the same norms, and the trained RbM by dispatch.

The floor of a batch is not the MLP's alone: experts are further weights, and those that are used have to be read,
`min(E, k · B) · (D·H + H·H + H·C) · 4` bytes. Where few rows share an expert that takes longer than all arithmetic, so
rows are also compared with the longer of the two ("vs the floor"): the MLP's time and that of reading so many bytes.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import scipy.sparse as sp
import torch
from onnx import TensorProto, helper, numpy_helper
from threadpoolctl import threadpool_limits

from benchmarks.report import Row, main, seconds
from rbm_dist.models.student import Student, make_mlp
from rbm_dist.moe.sparse_rows import to_rows
from rbm_dist.serve.artifact import empty_student
from rbm_dist.serve.frozen import freeze

FEATURES, CLASSES, WORDS = 128, 48, 1433
_SLACK = 1.5  # times the peer's time that are aimed at
_SPARSE_SLACK = 1.6  # of sparse rows, whose routing is a pass of its own over their words
_ROWS_EACH = 128  # rows per expert, from which products are what a batch takes
_SHAPES = [  # width, experts, k, routing
    (64, 16, 1, "input"), (64, 64, 4, "input"), (256, 4, 1, "input"), (256, 16, 1, "input"), (256, 64, 1, "input"),
    (256, 16, 2, "input"), (256, 8, 3, "layers"), (1024, 4, 1, "input"), (1024, 16, 2, "input"),
    (1024, 64, 4, "input"),
]  # fmt: skip
_QUICK = [(64, 16, 1, "input"), (256, 16, 1, "input"), (256, 8, 3, "layers")]


def measure(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    with threadpool_limits(1), torch.inference_mode():
        return list(
            _rows(_QUICK if quick else _SHAPES, 0.1 if quick else 0.5, (64, 1024) if quick else (64, 1024, 8192))
        )


def _rows(shapes: list[tuple[int, int, int, str]], budget_s: float, batches: tuple[int, ...]) -> Iterator[Row]:
    for hidden, experts, k, routing in shapes:
        name = f"width {hidden:,}, {experts} experts, k = {k}, routed {'once' if routing == 'input' else 'per layer'}"
        yield from _one_row(name, hidden, experts, k, routing, budget_s)
        yield from _batches(name, hidden, experts, k, routing, budget_s, batches)
    for hidden, experts, k, routing in [(256, 16, 1, "input"), (256, 8, 3, "layers")]:
        yield from _sparse(f"sparse, {experts} experts, k = {k}", hidden, experts, k, routing, budget_s, batches)


def _one_row(name: str, hidden: int, experts: int, k: int, routing: str, budget_s: float) -> Iterator[Row]:
    network = freeze(_rbm(FEATURES, hidden, experts, k, routing))
    x_1D = np.random.default_rng(0).standard_normal((1, FEATURES)).astype(np.float32)
    width = _equal_width(FEATURES, hidden, experts, k, routing)
    session, same = _onnx_mlp((FEATURES, width, width, CLASSES)), _mlp(FEATURES, hidden)
    mine, onnx_s, torch_s = (
        seconds(call, budget_s)
        for call in (
            functools.partial(network.logits, x_1D),
            lambda: session.run(None, {"x": x_1D}),
            functools.partial(same, torch.from_numpy(x_1D)),
        )
    )
    yield Row(f"{name}, 1 row: vs ONNX Runtime's MLP of equal work", mine * 1e6, "µs", onnx_s / mine, 1 / _SLACK)
    yield Row(f"{name}, 1 row: vs torch's MLP of its width", mine * 1e6, "µs", torch_s / mine, 1.0)


def _batches(
    name: str, hidden: int, experts: int, k: int, routing: str, budget_s: float, batches: tuple[int, ...]
) -> Iterator[Row]:
    student = _rbm(FEATURES, hidden, experts, k, routing)
    network, equal = freeze(student), _mlp(FEATURES, _equal_width(FEATURES, hidden, experts, k, routing))
    for batch in batches:
        x_BD = np.random.default_rng(batch).standard_normal((batch, FEATURES)).astype(np.float32)
        rows_BD = torch.from_numpy(x_BD)
        calls = (
            functools.partial(network.logits, x_BD),
            functools.partial(equal, rows_BD),
            functools.partial(student, rows_BD),
        )
        mine, mlp_s, dispatch_s = (seconds(call, budget_s) for call in calls)
        used = min(experts, k * batch) * (FEATURES * hidden + hidden * hidden + hidden * CLASSES)
        floor_s = max(mlp_s, used * 4 / _bytes_per_s())
        value, where = mine / batch * 1e6, f"{name}, {batch:,} rows"
        # Where few rows share an expert the MLP is no aim: it reads its weights once for all of them.
        dense = batch * k >= _ROWS_EACH * experts
        target = 1 / _SLACK if dense else None
        yield Row(f"{where}: vs torch's MLP of equal work", value, "µs per row", mlp_s / mine, target)
        if floor_s > mlp_s:
            yield Row(f"{where}: vs the floor", value, "µs per row", floor_s / mine, target)
        yield Row(f"{where}: vs dispatch", value, "µs per row", dispatch_s / mine, 1.0)


def _sparse(
    name: str, hidden: int, experts: int, k: int, routing: str, budget_s: float, batches: tuple[int, ...]
) -> Iterator[Row]:
    """Bags of 1,433 words, 1 % of them set, as Cora's: the first layer's work is that of the words that are there."""
    student = _rbm(WORDS, hidden, experts, k, routing)
    network, equal = freeze(student), _mlp(WORDS, hidden * k)  # the first layer's work is k times its width's
    for batch in batches:
        rng = np.random.default_rng(batch)
        x_BD = sp.random_array((batch, WORDS), density=0.0127, format="csr", dtype=np.float32, rng=rng)
        rows_BD = to_rows(x_BD, torch.device("cpu"), torch.float32)
        calls = (
            functools.partial(network.logits, x_BD),
            functools.partial(equal, rows_BD),
            functools.partial(student, rows_BD),
        )
        mine, mlp_s, dispatch_s = (seconds(call, budget_s) for call in calls)
        value, where = mine / batch * 1e6, f"{name}, {batch:,} rows"
        target = 1 / _SPARSE_SLACK
        yield Row(f"{where}: vs torch's MLP of {k} × its width", value, "µs per row", mlp_s / mine, target)
        yield Row(f"{where}: vs dispatch", value, "µs per row", dispatch_s / mine, 1.0)


def _rbm(features: int, hidden: int, experts: int, k: int, routing: str) -> Student:
    student = empty_student(
        kind="rbm", inputs=["feat"], num_features=features, hidden=hidden, num_classes=CLASSES, num_layers=3,
        norm="layer", num_experts=experts, top_k=k, routing=routing, routing_temperature=1.0, input_attention=False,
        ensemble_size=1,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    for tensor in student.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape, generator=draw) * (1.0 if tensor.dim() < 3 else 0.05))
    return student.eval()


def _mlp(features: int, hidden: int) -> Student:
    return make_mlp(features, hidden, CLASSES, num_layers=3, norm="layer", dropout=0.0, seed=0).eval()


def _equal_width(features: int, hidden: int, experts: int, k: int, routing: str) -> int:
    """The hidden width of an MLP with as many multiply-adds per row."""
    routed = experts * (features if routing == "input" else features + 2 * hidden)
    work = k * (features * hidden + hidden * hidden + hidden * CLASSES) + routed
    ends = features + CLASSES
    return round((np.sqrt(ends**2 + 4 * work) - ends) / 2)


def _onnx_mlp(widths: tuple[int, ...]) -> onnxruntime.InferenceSession:
    rng, nodes, weights, value = np.random.default_rng(0), [], [], "x"
    for layer, (width, outputs) in enumerate(itertools.pairwise(widths)):
        for what, shape in (("w", (width, outputs)), ("b", (outputs,))):
            drawn = rng.standard_normal(shape).astype(np.float32) * 0.05
            weights.append(numpy_helper.from_array(drawn, f"{what}{layer}"))
        nodes.append(helper.make_node("Gemm", [value, f"w{layer}", f"b{layer}"], [f"y{layer}"]))
        value = f"y{layer}"
        if layer < len(widths) - 2:
            nodes.append(helper.make_node("Relu", [value], [f"r{layer}"]))
            value = f"r{layer}"
    ends: list[Any] = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])]
        for name, width in (("x", widths[0]), (value, widths[-1]))
    ]
    graph = helper.make_graph(nodes, "mlp", *ends, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


@functools.cache
def _bytes_per_s() -> float:
    """How fast one thread reads memory that no near cache holds: the sum of 256 MiB."""
    array = np.ones(1 << 26, np.float32)
    return array.nbytes / seconds(lambda: array.sum(), 0.5)


if __name__ == "__main__":
    main(f"Serving RbMs, {FEATURES} → width → width → {CLASSES}, one thread", measure)
