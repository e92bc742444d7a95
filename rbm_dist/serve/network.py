"""A trained student made ready to serve: what depends on no input is done once, and each batch goes the fastest way.

It needs numpy and Numba alone. A few rows go one by one through a compiled loop; with more, rows are sorted by expert
and each expert multiplies its own at once. From how many on is measured when it is first asked. An RbM that is routed
once, to one expert, sorts its rows once for all layers.
"""

import functools
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
from threadpoolctl import ThreadpoolController

from rbm_dist.serve import kernels

Rows: TypeAlias = np.ndarray | sp.csr_array
Facts = Mapping[str, Any]
Tensors = Mapping[str, np.ndarray]
_MAX_SCALE = math.log(100)  # of exp(t), exp(c) and the vanilla mixture's temperature
_MOST_ONE_BY_ONE = 64
_SPARSE = 8
_NO_CSR = np.zeros(1, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32)
_ROWS, _ROWS_PER_EXPERT = 4096, 128  # that are sorted at once


@dataclass(frozen=True)
class Routing:
    """Where the rows that one memory (or gate) routes went."""

    expert_Bk: np.ndarray  # int64, best first
    weight_Bk: np.ndarray
    cosine_Bk: np.ndarray


@dataclass(frozen=True)
class Layer:
    """A layer as it is computed: experts (one: a plain layer), who chooses among them, and the norm behind."""

    weight_EDO: np.ndarray  # int8 if they have scales
    bias_EO: np.ndarray
    keys_PE: np.ndarray | None  # what a row is compared with; None: it goes where it went in the layer before
    projection_DP: np.ndarray | None  # before it is compared
    top_k: int
    over_all: bool  # whether weights are a softmax over all experts, or over the chosen
    norm: int
    gain_2O: np.ndarray  # gain and offset of the norm behind it
    temperature: float = 1.0  # that scores were divided by: times it they are cosines
    scale_ED: np.ndarray | None = None  # what each row of the experts' weights is to be multiplied by

    def in_full(self, expert: int) -> np.ndarray:
        """`[D, O]`, those of one expert."""
        if self.scale_ED is None:
            return self.weight_EDO[expert]
        full_DO = np.empty(self.weight_EDO.shape[1:], self.scale_ED.dtype)
        kernels.in_full(self.weight_EDO[expert], self.scale_ED[expert], full_DO)
        return full_DO

    @property
    def multiply_adds(self) -> int:
        """Of the matrix products of one row, routing included."""
        experts, width, outputs = self.weight_EDO.shape
        routing = 0 if self.keys_PE is None else self.keys_PE.size
        routing += 0 if self.projection_DP is None else self.projection_DP.size
        return routing + min(self.top_k, experts) * width * outputs


class Network:
    """A student for inference alone: `logits(rows)`. One of a single kind of network, not an ensemble."""

    def __init__(self, layers: list[Layer], few: int | None = None):
        """few: up to how many rows go one by one; None: measured when it is first asked."""
        self.dtype = layers[0].bias_EO.dtype
        self.width, self.num_classes = layers[0].weight_EDO.shape[1], layers[-1].weight_EDO.shape[2]
        self._few = few
        self._flat, self._table_LT, self._layers = _packed(layers)
        routers = [layer for layer in layers if layer.keys_PE is not None]
        # Then a row is its expert's alone, from its features to its logits; a plain network is one expert.
        once = len(routers) == 1 and routers[0].top_k == 1 and not routers[0].over_all
        self._is_one_expert_each = once or not routers

    def logits(self, x_BD: Rows) -> np.ndarray:
        """Logits `[B, C]` of rows `[B, D]` as they were learned from, dense or sparse."""
        if isinstance(x_BD, np.ndarray):
            x_BD = np.ascontiguousarray(x_BD, self.dtype)
            if len(x_BD) <= self.few or (len(x_BD) <= _MOST_ONE_BY_ONE and _is_mostly_zeros(x_BD)):
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
        """Logits and routings of rows sorted by expert, some at a time: what is in between stays in a cache."""
        logits_BC = np.empty((len_of(x_BD), self.num_classes), self.dtype)
        found: list[list[Routing]] = []
        at_once = max(_ROWS, _ROWS_PER_EXPERT * len(self._layers[0].weight_EDO))
        for start in range(0, max(len_of(x_BD), 1), at_once):
            own = slice(start, start + at_once)
            rows = x_BD if len_of(x_BD) <= at_once else x_BD[own]
            some = self._one_expert_each if self._is_one_expert_each else self._layer_by_layer
            with _one_thread:
                found.append(some(rows, logits_BC[own]))
        return logits_BC, [_joined(parts) for parts in zip(*found, strict=True)]

    def _one_expert_each(self, x_BD: Rows, logits_BC: np.ndarray) -> list[Routing]:
        """An expert's rows go through all layers at once."""
        first = self._layers[0]
        if first.keys_PE is None:
            every_row = np.arange(len_of(x_BD))
            self._expert_by_expert(x_BD, every_row, np.array([0, len(every_row)]), logits_BC)
            return []
        routing = _route(first, first.keys_PE, x_BD)
        start_E, row_R, _ = _sorted_by_expert(routing, len(first.weight_EDO))
        self._expert_by_expert(x_BD, row_R, start_E, logits_BC)
        return [routing]

    def _expert_by_expert(self, x_BD: Rows, row_R: np.ndarray, start_E: np.ndarray, logits_BC: np.ndarray) -> None:
        csr = _NO_CSR
        if not isinstance(x_BD, np.ndarray):
            csr = x_BD.indptr, x_BD.indices, x_BD.data.astype(self.dtype, copy=False)
            x_BD = np.empty((0, self.width), self.dtype)
        kernels.expert_by_expert(x_BD, csr, row_R, start_E, self._flat, self._table_LT, logits_BC)

    def _layer_by_layer(self, x_BD: Rows, logits_BC: np.ndarray) -> list[Routing]:
        """In each layer, every expert's output is added to its rows."""
        routings: list[Routing] = []
        for index, layer in enumerate(self._layers):
            if layer.keys_PE is not None:
                routings.append(_route(layer, layer.keys_PE, x_BD))
                groups = _by_expert(routings[-1], len(layer.weight_EDO))
            last = index == len(self._layers) - 1
            y_BO = logits_BC if last else np.empty((len_of(x_BD), layer.weight_EDO.shape[2]), self.dtype)
            y_BO[:] = 0
            for expert, row_n, weight_n in groups:
                out_nO = np.empty((len(row_n), y_BO.shape[1]), self.dtype)
                _product(x_BD, row_n, layer.in_full(expert), out_nO)
                kernels.add_weighed(out_nO, layer.bias_EO[expert], row_n, weight_n, y_BO)
            if not last:
                kernels.norm_and_relu(y_BO, layer.norm, layer.gain_2O)
            x_BD = y_BO
        return routings


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


def _is_mostly_zeros(x_BD: np.ndarray) -> bool:
    """Whether rows are such as bags of words: one by one only what is not zero is multiplied."""
    return bool(_SPARSE * np.count_nonzero(x_BD) < x_BD.size)


class _OneThread:
    """Products of numpy on one thread, as long as anyone is inside: several would wait for each other longer than such
    small products take. Threads share the setting, so the last to leave restores what the first found."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._limits: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                blas = _blas()
                already = all(library.num_threads == 1 for library in blas.lib_controllers)
                self._limits = None if already else blas.limit(limits=1)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._limits is not None:
                self._limits.restore_original_limits()


_one_thread = _OneThread()


@functools.cache
def _blas() -> ThreadpoolController:
    import scipy.linalg.cython_blas  # noqa: F401  # loads the library that compiled loops multiply by

    return ThreadpoolController().select(user_api="blas")


def _sorted_by_expert(routing: Routing, num_experts: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each expert's rows begin, `[E + 1]`, the rows, and their weights."""
    pairs = routing.expert_Bk.size
    start_E, row_R = np.empty(num_experts + 1, np.int64), np.empty(pairs, np.int64)
    weight_R = np.empty(pairs, routing.weight_Bk.dtype)
    kernels.sort_by_expert(routing.expert_Bk, routing.weight_Bk, start_E, row_R, weight_R)
    return start_E, row_R, weight_R


def _by_expert(routing: Routing, num_experts: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Of each expert that has any: its number, its rows, and their weights."""
    start_E, row_R, weight_R = _sorted_by_expert(routing, num_experts)
    spans = ((e, slice(start_E[e], start_E[e + 1])) for e in np.flatnonzero(np.diff(start_E)).tolist())
    return [(expert, row_R[own], weight_R[own]) for expert, own in spans]


def _joined(parts: tuple[Routing, ...]) -> Routing:
    """Routings of some rows after those of others."""
    if len(parts) == 1:
        return parts[0]
    names = ("expert_Bk", "weight_Bk", "cosine_Bk")
    return Routing(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _route(layer: Layer, keys_PE: np.ndarray, x_BD: Rows) -> Routing:
    row_BP, rows = x_BD, len_of(x_BD)
    if layer.projection_DP is not None:
        row_BP = _product(x_BD, None, layer.projection_DP, np.empty((rows, len(keys_PE)), keys_PE.dtype))
    score_BE = _product(row_BP, None, keys_PE, np.empty((rows, keys_PE.shape[1]), keys_PE.dtype))
    if not isinstance(row_BP, np.ndarray):  # its length is all that is asked of it
        row_BP = np.sqrt(row_BP.power(2).sum(1)).astype(keys_PE.dtype)[:, None]
    expert_Bk = np.empty((len(score_BE), layer.top_k), np.int64)
    weight_Bk, score_Bk = np.empty((2, *expert_Bk.shape), keys_PE.dtype)
    kernels.choose(score_BE, row_BP, layer.top_k, layer.over_all, expert_Bk, weight_Bk, score_Bk)
    return Routing(expert_Bk, weight_Bk, score_Bk * keys_PE.dtype.type(layer.temperature))


def _product(x_BD: Rows, row_n: np.ndarray | None, weight_DO: np.ndarray, out_nO: np.ndarray) -> np.ndarray:
    """`x[rows] @ weight`, written to `out`; rows None: all."""
    if isinstance(x_BD, np.ndarray):
        x_nD = x_BD if row_n is None else x_BD.take(row_n, axis=0)
        if weight_DO.size >= max(kernels.LARGE, len(x_nD) * kernels.WEIGHTS_PER_ROW):
            kernels.thin_product(x_nD, weight_DO, out_nO)
            return out_nO
        return np.dot(x_nD, weight_DO, out=out_nO)
    value = x_BD.data.astype(weight_DO.dtype, copy=False)
    row_n = np.arange(len(out_nO)) if row_n is None else row_n
    kernels.sparse_product(x_BD.indptr, x_BD.indices, value, row_n, weight_DO, out_nO)
    return out_nO


def len_of(rows: Rows) -> int:
    return int(rows.shape[0])


def _dense(network: Facts, tensors: Tensors, layer: int) -> Layer:
    weight_OD, bias_O = tensors[f"layers.{layer}.linear.weight"], tensors[f"layers.{layer}.linear.bias"]
    scale_D = tensors.get(f"layers.{layer}.linear.scale_D")
    return Layer(
        weight_OD.T[None], bias_O[None], None, None, 1, False, *_norm(tensors, layer, len(bias_O)),
        scale_ED=None if scale_D is None else scale_D[None],
    )  # fmt: skip


def _routed(network: Facts, tensors: Tensors, layer: int) -> Layer:
    at = f"layers.{layer}"
    scale = np.exp(np.minimum(tensors[f"{at}.log_scale"], _MAX_SCALE))
    weight_EDO, bias_EO, scale_ED = _experts(tensors, at, scale)
    memory_ED = tensors.get(f"{at}.memory_ED")
    temperature = network["routing_temperature"]
    keys = None if memory_ED is None else _unit(memory_ED).T / temperature
    norm = _norm(tensors, layer, bias_EO.shape[1])
    return Layer(weight_EDO, bias_EO * scale, keys, None, network["top_k"], False, *norm, temperature, scale_ED)


def _gated(network: Facts, tensors: Tensors, layer: int) -> Layer:
    at = f"layers.{layer}"
    weight_EDO, bias_EO, scale_ED = _experts(tensors, at)
    inverse = np.exp(np.minimum(tensors[f"{at}.log_inverse_temperature"], _MAX_SCALE))
    keys = _unit(tensors[f"{at}.gate_EP"]).T * inverse
    norm = _norm(tensors, layer, bias_EO.shape[1])
    projection_DP = tensors[f"{at}.projection_DP"]
    temperature = float(1 / inverse)
    return Layer(weight_EDO, bias_EO, keys, projection_DP, network["top_k"], True, *norm, temperature, scale_ED)


def _experts(tensors: Tensors, at: str, factor: Any = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Weights times `factor` and input attention, biases as they are, and the scales of weights in int8."""
    weight_EDO, bias_EO = tensors[f"{at}.experts.weight_LDO"], tensors[f"{at}.experts.bias_LO"]
    scale_ED = tensors.get(f"{at}.experts.scale_LD")
    attention_ED = tensors.get(f"{at}.experts.log_attention_LD")
    if attention_ED is not None:
        factor = factor * np.exp(np.minimum(attention_ED, _MAX_SCALE))
    if scale_ED is not None:
        return weight_EDO, bias_EO, scale_ED * factor
    return weight_EDO * (factor if attention_ED is None else factor[:, :, None]), bias_EO, None


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
    dtype, size = layers[0].bias_EO.dtype, 0
    table_LT = np.full((len(layers), kernels.TABLE_COLUMNS), -1, np.int64)
    arrays: list[tuple[int, np.ndarray]] = []

    def place(array: np.ndarray) -> int:
        nonlocal size
        items = -(-array.nbytes // dtype.itemsize) if array.dtype == np.int8 else array.size
        start, size = size, size + -(-items // 16) * 16  # at cache lines
        arrays.append((start, array))
        return start

    for row, layer in zip(table_LT, layers, strict=True):
        experts, width, outputs = layer.weight_EDO.shape
        sizes = {kernels.WIDTH: width, kernels.OUTPUTS: outputs, kernels.EXPERTS: experts, kernels.TOP_K: layer.top_k}
        places = {kernels.WEIGHT: layer.weight_EDO, kernels.BIAS: layer.bias_EO, kernels.GAIN: layer.gain_2O}
        places |= {} if layer.keys_PE is None else {kernels.KEYS: layer.keys_PE}
        places |= {} if layer.projection_DP is None else {kernels.PROJECTION: layer.projection_DP}
        places |= {} if layer.scale_ED is None else {kernels.SCALE: layer.scale_ED}
        for column, value in (sizes | {column: place(array) for column, array in places.items()}).items():
            row[column] = value
        row[kernels.PROJECTED] = 0 if layer.projection_DP is None else layer.projection_DP.shape[1]
        row[kernels.OVER_ALL], row[kernels.NORM] = int(layer.over_all), layer.norm
    flat = np.zeros(size, dtype)
    views = []
    for start, array in arrays:
        view = flat[start:].view(np.int8) if array.dtype == np.int8 else flat[start:]
        views.append(view[: array.size].reshape(array.shape))
        views[-1][...] = array
    found = iter(views)
    packed = []
    for layer in layers:
        weight, bias, gain = next(found), next(found), next(found)
        keys = None if layer.keys_PE is None else next(found)
        projection = None if layer.projection_DP is None else next(found)
        scale = None if layer.scale_ED is None else next(found)
        packed.append(
            replace(
                layer,
                weight_EDO=weight,
                bias_EO=bias,
                keys_PE=keys,
                projection_DP=projection,
                gain_2O=gain.reshape(-1),
                scale_ED=scale,
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
