"""A trained student made ready to serve: what depends on no input is done once, and each batch goes the fastest way.

It needs numpy and Numba alone. A few rows go one by one through a compiled loop; with more, rows are sorted by expert
and each expert multiplies its own at once. From how many on is measured when it is first asked. An RbM that is routed
once, to one expert, sorts its rows once for all layers.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp

from rbm_dist.serve import kernels

Rows: TypeAlias = np.ndarray | sp.csr_array
Facts = Mapping[str, Any]
Tensors = Mapping[str, np.ndarray]
_MAX_SCALE = math.log(100)  # of exp(t), exp(c) and the vanilla mixture's temperature
_MOST_ONE_BY_ONE = 64


@dataclass(frozen=True)
class Routing:
    """Where the rows that one memory (or gate) routes went."""

    expert_Bk: np.ndarray  # int64, best first
    weight_Bk: np.ndarray
    cosine_Bk: np.ndarray


@dataclass(frozen=True)
class Layer:
    """A layer as it is computed: experts (one: a plain layer), who chooses among them, and the norm behind."""

    weight_EDO: np.ndarray
    bias_EO: np.ndarray
    keys_PE: np.ndarray | None  # what a row is compared with; None: it goes where it went in the layer before
    projection_DP: np.ndarray | None  # before it is compared
    top_k: int
    over_all: bool  # whether weights are a softmax over all experts, or over the chosen
    norm: int
    gain_2O: np.ndarray  # gain and offset of the norm behind it
    temperature: float = 1.0  # that scores were divided by: times it they are cosines


class Network:
    """A student for inference alone: `logits(rows)`. One of a single kind of network, not an ensemble."""

    def __init__(self, layers: list[Layer], few: int | None = None):
        """few: up to how many rows go one by one; None: measured when it is first asked."""
        self.dtype = layers[0].weight_EDO.dtype
        self.width, self.num_classes = layers[0].weight_EDO.shape[1], layers[-1].weight_EDO.shape[2]
        self._few = few
        self._flat, self._table_LT, self._layers = _packed(layers)
        routers = [layer for layer in layers if layer.keys_PE is not None]
        # Then a row is its expert's alone, from its features to its logits.
        self._one_expert_each = len(routers) == 1 and routers[0].top_k == 1 and not routers[0].over_all

    def logits(self, x_BD: Rows) -> np.ndarray:
        """Logits `[B, C]` of rows `[B, D]` as they were learned from, dense or sparse."""
        if isinstance(x_BD, np.ndarray):
            x_BD = np.ascontiguousarray(x_BD, self.dtype)
            if len(x_BD) <= self.few:
                logits_BC = np.empty((len(x_BD), self.num_classes), self.dtype)
                kernels.one_by_one(x_BD, self._flat, self._table_LT, logits_BC)
                return logits_BC
        return self._sorted(x_BD)[0]

    def routings(self, x_BD: Rows) -> list[Routing]:
        """Where rows go, by memory."""
        return self._sorted(x_BD)[1]

    @property
    def few(self) -> int:
        """Up to how many rows go one by one."""
        if self._few is None:
            self._few = self._measured()
        return self._few

    def _measured(self) -> int:
        draw, few = np.random.default_rng(0), 1
        while few < _MOST_ONE_BY_ONE:
            rows_BD = draw.standard_normal((2 * few, self.width)).astype(self.dtype)
            logits_BC = np.empty((len(rows_BD), self.num_classes), self.dtype)
            one_by_one = _best_s(lambda: kernels.one_by_one(rows_BD, self._flat, self._table_LT, logits_BC))  # noqa: B023
            if one_by_one > _best_s(lambda: self._sorted(rows_BD)):  # noqa: B023
                break
            few *= 2
        return few

    def _sorted(self, x_BD: Rows) -> tuple[np.ndarray, list[Routing]]:
        """Rows through the layers, sorted by expert in each; logits, and where they went."""
        routings: list[Routing] = []
        order: _Order | None = None
        unsort = None
        for index, layer in enumerate(self._layers):
            if layer.keys_PE is not None:
                routings.append(_route(layer, layer.keys_PE, x_BD))
                order = _Order.of(routings[-1], len(layer.weight_EDO))
                if self._one_expert_each:
                    unsort, x_BD = order.row_R, _take(x_BD, order.row_R)
            out_RO = _products(layer, x_BD, order, gather=unsort is None)
            relu = index < len(self._layers) - 1
            norm, gain_2O = (layer.norm, layer.gain_2O) if relu else (kernels.NO_NORM, layer.gain_2O)
            if order is None or unsort is not None:
                expert_R = np.zeros(len(out_RO), np.int64) if order is None else order.expert_R
                kernels.add_bias(out_RO, layer.bias_EO, expert_R, norm, gain_2O, relu)
                x_BD = out_RO
            else:
                x_BD = np.empty((len_of(x_BD), out_RO.shape[1]), self.dtype)
                went = routings[-1]
                kernels.combine(
                    out_RO, layer.bias_EO, order.place_Bk, went.expert_Bk, went.weight_Bk, norm, gain_2O, relu, x_BD
                )
        if unsort is not None:
            logits_BC = np.empty_like(x_BD)
            logits_BC[unsort] = x_BD
            x_BD = logits_BC
        return x_BD, routings


class Networks:
    """An ensemble: its logits are the logarithm of the members' mean probabilities."""

    def __init__(self, members: list[Network]):
        self.members = members
        self.dtype, self.width, self.num_classes = members[0].dtype, members[0].width, members[0].num_classes

    def logits(self, x_BD: Rows) -> np.ndarray:
        """Logits `[B, C]` of rows `[B, D]`."""
        total_BC = np.zeros((len_of(x_BD), self.num_classes), self.dtype)
        for member in self.members:
            probability_BC = member.logits(x_BD)
            kernels.softmax(probability_BC)
            total_BC += probability_BC
        return np.log(total_BC / len(self.members))

    def routings(self, x_BD: Rows) -> list[Routing]:
        """None: its members are plain networks."""
        return []


def network_of(network: Facts, tensors: Tensors, few: int | None = None) -> Network | Networks:
    """A network, or an ensemble of them, from a student's facts and weights."""
    members = [Network(layers, few) for layers in members_of(network, tensors)]
    return Networks(members) if network["kind"] == "ensemble" else members[0]


def members_of(network: Facts, tensors: Tensors) -> list[list[Layer]]:
    """The layers of a student, or of each member of an ensemble; by the names of `models/student.py`."""
    if network["kind"] != "ensemble":
        make = {"mlp": _dense, "rbm": _routed, "moe": _gated}[network["kind"]]
        return [[make(network, tensors, layer) for layer in range(network["num_layers"])]]
    found = []
    for member in range(network["ensemble_size"]):
        prefix = f"members.{member}."
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        found += members_of({**network, "kind": "mlp"}, own)
    return found


@dataclass(frozen=True)
class _Order:
    """Pairs of a row and one of its experts, sorted by expert."""

    row_R: np.ndarray
    expert_R: np.ndarray
    start_E: np.ndarray  # [E + 1]: the pairs of each expert
    place_Bk: np.ndarray  # which of the sorted pairs each row and choice is

    @classmethod
    def of(cls, routing: Routing, num_experts: int) -> "_Order":
        pairs = routing.expert_Bk.size
        found = cls(
            np.empty(pairs, np.int64), np.empty(pairs, np.int64), np.empty(num_experts + 1, np.int64),
            np.empty(routing.expert_Bk.shape, np.int64),
        )  # fmt: skip
        kernels.sort_by_expert(routing.expert_Bk, found.start_E, found.row_R, found.expert_R, found.place_Bk)
        return found


def _route(layer: Layer, keys_PE: np.ndarray, x_BD: Rows) -> Routing:
    row_BP = x_BD if layer.projection_DP is None else _product(x_BD, layer.projection_DP)
    score_BE = _product(row_BP, keys_PE)
    if not isinstance(row_BP, np.ndarray):  # its length is all that is asked of it
        row_BP = np.sqrt(row_BP.power(2).sum(1)).astype(keys_PE.dtype)[:, None]
    expert_Bk = np.empty((len(score_BE), layer.top_k), np.int64)
    weight_Bk, score_Bk = np.empty((2, *expert_Bk.shape), keys_PE.dtype)
    kernels.choose(score_BE, row_BP, layer.top_k, layer.over_all, expert_Bk, weight_Bk, score_Bk)
    return Routing(expert_Bk, weight_Bk, score_Bk * keys_PE.dtype.type(layer.temperature))


def _product(x_BD: Rows, weight_DO: np.ndarray) -> np.ndarray:
    if isinstance(x_BD, np.ndarray):
        return x_BD @ weight_DO
    none_R = np.arange(x_BD.shape[0])
    return _sparse(x_BD, none_R, np.zeros_like(none_R), weight_DO[None])


def _products(layer: Layer, x_BD: Rows, order: _Order | None, gather: bool) -> np.ndarray:
    """What each pair's expert makes of its row, sorted by expert, without bias."""
    if order is None:
        return _product(x_BD, layer.weight_EDO[0])
    row_R = order.row_R if gather else np.arange(len(order.row_R))
    if not isinstance(x_BD, np.ndarray):
        return _sparse(x_BD, row_R, order.expert_R, layer.weight_EDO)
    rows_RD = _take(x_BD, row_R) if gather else x_BD
    out_RO = np.empty((len(rows_RD), layer.weight_EDO.shape[2]), rows_RD.dtype)
    for expert in np.flatnonzero(np.diff(order.start_E)):
        own = slice(order.start_E[expert], order.start_E[expert + 1])
        np.dot(rows_RD[own], layer.weight_EDO[expert], out=out_RO[own])
    return out_RO


def _sparse(x_BD: sp.csr_array, row_R: np.ndarray, expert_R: np.ndarray, weight_EDO: np.ndarray) -> np.ndarray:
    out_RO = np.empty((len(row_R), weight_EDO.shape[2]), weight_EDO.dtype)
    value = x_BD.data.astype(weight_EDO.dtype, copy=False)
    kernels.sparse_product(x_BD.indptr, x_BD.indices, value, row_R, expert_R, weight_EDO, out_RO)
    return out_RO


def _take(rows: Rows, index: np.ndarray) -> Rows:
    return rows.take(index, axis=0) if isinstance(rows, np.ndarray) else rows[index]


def len_of(rows: Rows) -> int:
    return int(rows.shape[0])


def _dense(network: Facts, tensors: Tensors, layer: int) -> Layer:
    weight_OD, bias_O = tensors[f"layers.{layer}.linear.weight"], tensors[f"layers.{layer}.linear.bias"]
    return Layer(weight_OD.T[None], bias_O[None], None, None, 1, False, *_norm(tensors, layer, len(bias_O)))


def _routed(network: Facts, tensors: Tensors, layer: int) -> Layer:
    at = f"layers.{layer}"
    scale = np.exp(np.minimum(tensors[f"{at}.log_scale"], _MAX_SCALE))
    weight_EDO, bias_EO = _experts(tensors, at)
    memory_ED = tensors.get(f"{at}.memory_ED")
    temperature = network["routing_temperature"]
    keys = None if memory_ED is None else _unit(memory_ED).T / temperature
    norm = _norm(tensors, layer, bias_EO.shape[1])
    return Layer(weight_EDO * scale, bias_EO * scale, keys, None, network["top_k"], False, *norm, temperature)


def _gated(network: Facts, tensors: Tensors, layer: int) -> Layer:
    at = f"layers.{layer}"
    weight_EDO, bias_EO = _experts(tensors, at)
    inverse = np.exp(np.minimum(tensors[f"{at}.log_inverse_temperature"], _MAX_SCALE))
    keys = _unit(tensors[f"{at}.gate_EP"]).T * inverse
    norm = _norm(tensors, layer, bias_EO.shape[1])
    projection_DP = tensors[f"{at}.projection_DP"]
    return Layer(weight_EDO, bias_EO, keys, projection_DP, network["top_k"], True, *norm, float(1 / inverse))


def _experts(tensors: Tensors, at: str) -> tuple[np.ndarray, np.ndarray]:
    weight_EDO, bias_EO = tensors[f"{at}.experts.weight_LDO"], tensors[f"{at}.experts.bias_LO"]
    attention_ED = tensors.get(f"{at}.experts.log_attention_LD")
    if attention_ED is not None:
        weight_EDO = weight_EDO * np.exp(np.minimum(attention_ED, _MAX_SCALE))[:, :, None]
    return weight_EDO, bias_EO


def _unit(rows_EP: np.ndarray) -> np.ndarray:
    return rows_EP / np.maximum(np.linalg.norm(rows_EP, axis=1, keepdims=True), 1e-12)


def _norm(tensors: Tensors, layer: int, outputs: int) -> tuple[int, np.ndarray]:
    """The norm behind a layer as its kind and `[2, O]` gain and offset."""
    weight = tensors.get(f"norms.{layer}.weight")
    if weight is None:
        return kernels.NO_NORM, np.zeros((2, outputs))
    bias, mean = tensors[f"norms.{layer}.bias"], tensors.get(f"norms.{layer}.running_mean")
    if mean is None:
        return kernels.LAYER_NORM, np.stack([weight, bias])
    gain = weight / np.sqrt(tensors[f"norms.{layer}.running_var"] + 1e-5)
    return kernels.AFFINE, np.stack([gain, bias - mean * gain])


def _packed(layers: list[Layer]) -> tuple[np.ndarray, np.ndarray, list[Layer]]:
    """All weights as one flat array, the table of what is where, and the layers as views of it."""
    dtype, size = layers[0].weight_EDO.dtype, 0
    table_LT = np.full((len(layers), kernels.TABLE_COLUMNS), -1, np.int64)
    arrays: list[tuple[int, np.ndarray]] = []

    def place(array: np.ndarray) -> int:
        nonlocal size
        start, size = size, size + -(-array.size // 16) * 16  # at cache lines
        arrays.append((start, array))
        return start

    for row, layer in zip(table_LT, layers, strict=True):
        experts, width, outputs = layer.weight_EDO.shape
        sizes = {kernels.WIDTH: width, kernels.OUTPUTS: outputs, kernels.EXPERTS: experts, kernels.TOP_K: layer.top_k}
        places = {kernels.WEIGHT: layer.weight_EDO, kernels.BIAS: layer.bias_EO, kernels.GAIN: layer.gain_2O}
        places |= {} if layer.keys_PE is None else {kernels.KEYS: layer.keys_PE}
        places |= {} if layer.projection_DP is None else {kernels.PROJECTION: layer.projection_DP}
        for column, value in (sizes | {column: place(array) for column, array in places.items()}).items():
            row[column] = value
        row[kernels.PROJECTED] = 0 if layer.projection_DP is None else layer.projection_DP.shape[1]
        row[kernels.OVER_ALL], row[kernels.NORM] = int(layer.over_all), layer.norm
    flat = np.zeros(size, dtype)
    views = []
    for start, array in arrays:
        flat[start : start + array.size] = array.reshape(-1)
        views.append(flat[start : start + array.size].reshape(array.shape))
    found = iter(views)
    packed = []
    for layer in layers:
        weight, bias, gain = next(found), next(found), next(found)
        keys = None if layer.keys_PE is None else next(found)
        projection = None if layer.projection_DP is None else next(found)
        packed.append(
            replace(
                layer,
                weight_EDO=weight,
                bias_EO=bias,
                keys_PE=keys,
                projection_DP=projection,
                gain_2O=gain.reshape(-1),
            )
        )
    return flat, table_LT, packed


def _best_s(call: Any) -> float:
    """The shortest of some calls, in seconds."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[1:])
