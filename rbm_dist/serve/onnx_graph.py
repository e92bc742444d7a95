"""An exported student as an ONNX graph: from rows as the user has them to probabilities, any number at once.

All experts of a layer are one product (the wide form), weighed with a gate that is zero but for the chosen; a single
row gathers its experts' weights instead, where experts are many. Scaling is computed in float64, as it was in training.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rbm_dist.serve import kernels
from rbm_dist.serve.format import ModelFile
from rbm_dist.serve.layers import Layer, members_of

OPSET, _IR = 18, 10
PROBABILITIES = "probabilities"
_FEW_EXPERTS = 3  # times as many as each row has: with no more, one row too is fastest by the wide form


def build(model: ModelFile, tensors: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The graph. Inputs `feat` (and `pos`, `prop`) `[B, width]` float32.

    Outputs `probabilities` `[B, C]` and, by memory i, `experts_i` int64, `weights_i` and `cosines_i`, `[B, k]` each.
    """
    graph = _Graph()
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name, width in model.inputs.items()
    ]
    rows = [_scaled(graph, model, tensors) if name == "feat" else name for name in model.inputs]
    x = rows[0] if len(rows) == 1 else graph.add("Concat", rows, axis=1)
    members = members_of(model.network.model_dump(), tensors)
    found, routers = [], list[dict[str, str]]()
    for layers in members:
        logits, routed = _network(graph, layers, x)
        found.append(graph.add("Softmax", [logits], axis=1))
        routers += routed
    total = found[0]
    if len(found) > 1:
        total = graph.add("Div", [graph.add("Sum", found), graph.constant(np.float32(len(found)))])
    graph.add("Identity", [total], output=PROBABILITIES)
    outputs = [helper.make_tensor_value_info(PROBABILITIES, TensorProto.FLOAT, ["batch", model.num_classes])]
    for index, router in enumerate(routers):
        for what, value in router.items():
            name = f"{what}_{index}"
            graph.add("Identity", [value], output=name)
            kind = TensorProto.INT64 if what == "experts" else TensorProto.FLOAT
            outputs.append(helper.make_tensor_value_info(name, kind, ["batch", model.network.top_k]))
    made = helper.make_graph(graph.nodes, f"rbm-dist-{model.name}", inputs, outputs, graph.initializers)
    proto = helper.make_model(
        made, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR, producer_name="rbm-dist",
        producer_version=model.rbm_dist,
    )  # fmt: skip
    onnx.checker.check_model(proto, full_check=True)
    return proto


class _Graph:
    """Nodes and weights, each value named by its place."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._values = 0

    def add(self, operation: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        name = output or self._name()
        self.nodes.append(helper.make_node(operation, list(inputs), [name], **attributes))
        return name

    def add_two(self, operation: str, inputs: Sequence[str], **attributes: Any) -> tuple[str, str]:
        names = self._name(), self._name()
        self.nodes.append(helper.make_node(operation, list(inputs), list(names), **attributes))
        return names

    def constant(self, array: Any) -> str:
        name = self._name()
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(np.shape(array)), name))
        return name

    def branch(self) -> "_Graph":
        """The nodes of one side of an `If`; they see the values outside, whose names they share."""
        inner = _Graph()
        inner._name = self._name  # type: ignore[method-assign]
        inner.initializers = self.initializers
        return inner

    def _name(self) -> str:
        self._values += 1
        return f"v{self._values}"


def _scaled(graph: _Graph, model: ModelFile, tensors: Mapping[str, np.ndarray]) -> str:
    fill_F, shift_F, factor_F = tensors["scaling.columns"]
    indicators, features = tensors["scaling.indicators"], model.features
    if not (features.rows or features.missing or shift_F.any() or (factor_F != 1).any()):
        return "feat"
    x = graph.add("Cast", ["feat"], to=TensorProto.DOUBLE)
    gone = ""
    if features.missing:
        gone = graph.add("IsNaN", [x])
        x = graph.add("Where", [gone, graph.constant(fill_F[None]), x])
    x = graph.add("Sub", [x, graph.constant(shift_F[None])])
    x = graph.add("Mul", [x, graph.constant(factor_F[None])])
    if features.rows:
        axis = graph.constant(np.array([1]))
        squares = features.rows == "length"
        terms = graph.add("Mul", [x, x]) if squares else graph.add("Abs", [x])
        size = graph.add("ReduceSum", [terms, axis], keepdims=1)
        size = graph.add("Sqrt", [size]) if squares else size
        some = graph.add("Greater", [size, graph.constant(np.zeros((1, 1)))])
        x = graph.add("Div", [x, graph.add("Where", [some, size, graph.constant(np.ones((1, 1)))])])
    x = graph.add("Cast", [x], to=TensorProto.FLOAT)
    if len(indicators):
        flags = graph.add("Cast", [gone], to=TensorProto.FLOAT)
        x = graph.add("Concat", [x, graph.add("Gather", [flags, graph.constant(indicators)], axis=1)], axis=1)
    return x


def _network(graph: _Graph, layers: list[Layer], x: str) -> tuple[str, list[dict[str, str]]]:
    """The logits, and the outputs of each memory."""
    routers: list[dict[str, str]] = []
    for index, layer in enumerate(layers):
        if layer.keys_PE is not None:
            routers.append(_router(graph, layer, layer.keys_PE, x))
        if len(layer.weight_EDO) == 1:
            weight_DO = _weights(graph, layer.weight_EDO[0], None if layer.scale_ED is None else layer.scale_ED[0])
            x = graph.add("Gemm", [x, weight_DO, graph.constant(layer.bias_EO[0])])
        else:
            x = _mixture(graph, layer, x, routers[-1])
        if index < len(layers) - 1:
            x = graph.add("Relu", [_norm(graph, layer, x)])
    return x, routers


def _router(graph: _Graph, layer: Layer, keys_PE: np.ndarray, x: str) -> dict[str, str]:
    row = x if layer.projection_DP is None else graph.add("MatMul", [x, graph.constant(layer.projection_DP)])
    squares = graph.add("ReduceSum", [graph.add("Mul", [row, row]), graph.constant(np.array([1]))], keepdims=1)
    length = graph.add("Max", [graph.add("Sqrt", [squares]), graph.constant(np.full((1, 1), 1e-12, np.float32))])
    scores = graph.add("Div", [graph.add("MatMul", [row, graph.constant(keys_PE)]), length])
    best, experts = graph.add_two("TopK", [scores, graph.constant(np.array([layer.top_k]))], axis=1)
    if layer.over_all:
        weights = graph.add("GatherElements", [graph.add("Softmax", [scores], axis=1), experts], axis=1)
    else:
        weights = graph.add("Softmax", [best], axis=1)
    cosines = graph.add("Mul", [best, graph.constant(np.float32(layer.temperature))])
    return {"experts": experts, "weights": weights, "cosines": cosines}


def _mixture(graph: _Graph, layer: Layer, x: str, router: dict[str, str]) -> str:
    experts, width, outputs = layer.weight_EDO.shape
    bias_EO = graph.constant(layer.bias_EO)
    weight_EDO = _weights(graph, layer.weight_EDO, layer.scale_ED)
    # Outside the branch: what depends on no input is computed once there.
    turned = graph.add("Transpose", [weight_EDO], perm=[1, 0, 2])
    weight_DP = graph.add("Reshape", [turned, graph.constant(np.array([width, experts * outputs]))])
    if experts <= _FEW_EXPERTS * layer.top_k:
        return _all_in_one(graph, layer, x, router, weight_DP, bias_EO)
    rows = graph.add("Gather", [graph.add("Shape", [x]), graph.constant(np.int64(0))])
    one = graph.add("Equal", [rows, graph.constant(np.int64(1))])
    sides = []
    for make, weight in ((_gathered, weight_EDO), (_all_in_one, weight_DP)):
        side = graph.branch()
        made = make(side, layer, x, router, weight, bias_EO)
        out = helper.make_tensor_value_info(made, TensorProto.FLOAT, None)
        sides.append(helper.make_graph(side.nodes, f"{make.__name__}_{made}", [], [out]))
    return graph.add("If", [one], then_branch=sides[0], else_branch=sides[1])


def _weights(graph: _Graph, weight: np.ndarray, scale: np.ndarray | None) -> str:
    """Float32 of what is stored: `weight`, or int8 and a scale for each of its rows."""
    stored = graph.constant(weight)
    if scale is None:
        return stored
    # Not DequantizeLinear: ONNX Runtime would compute that anew for each batch.
    floats = graph.add("Cast", [stored], to=TensorProto.FLOAT)
    return graph.add("Mul", [floats, graph.constant(scale.astype(np.float32)[..., None])])


def _all_in_one(graph: _Graph, layer: Layer, x: str, router: dict[str, str], weight_DP: str, bias_EO: str) -> str:
    experts, _, outputs = layer.weight_EDO.shape
    product = graph.add("MatMul", [x, weight_DP])
    out_BEO = graph.add("Reshape", [product, graph.constant(np.array([-1, experts, outputs]))])
    out_BEO = graph.add("Add", [out_BEO, bias_EO])
    rows = graph.add("Gather", [graph.add("Shape", [x]), graph.constant(np.array([0]))])
    shape = graph.add("Concat", [rows, graph.constant(np.array([experts]))], axis=0)
    none = graph.add("Expand", [graph.constant(np.zeros(1, np.float32)), shape])
    gate = graph.add("ScatterElements", [none, router["experts"], router["weights"]], axis=1)
    one = graph.constant(np.array([1]))
    mixed = graph.add("MatMul", [graph.add("Unsqueeze", [gate, one]), out_BEO])
    return graph.add("Squeeze", [mixed, one])


def _gathered(graph: _Graph, layer: Layer, x: str, router: dict[str, str], weight_EDO: str, bias_EO: str) -> str:
    first = graph.constant(np.array([0]))
    chosen = graph.add("Squeeze", [router["experts"], first])
    out = graph.add("MatMul", [x, graph.add("Gather", [weight_EDO, chosen], axis=0)])  # [k, 1, O]
    one = graph.constant(np.array([1]))
    out = graph.add("Add", [out, graph.add("Unsqueeze", [graph.add("Gather", [bias_EO, chosen], axis=0), one])])
    weights = graph.add("Reshape", [router["weights"], graph.constant(np.array([-1, 1, 1]))])
    return graph.add("ReduceSum", [graph.add("Mul", [out, weights]), first], keepdims=0)


def _norm(graph: _Graph, layer: Layer, x: str) -> str:
    if layer.norm == kernels.NO_NORM:
        return x
    gain, offset = (graph.constant(each.astype(np.float32)) for each in layer.gain_2O)
    if layer.norm == kernels.LAYER_NORM:
        return graph.add("LayerNormalization", [x, gain, offset], axis=-1, epsilon=1e-5)
    return graph.add("Add", [graph.add("Mul", [x, gain]), offset])
