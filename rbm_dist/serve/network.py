"""A trained student made ready to serve: what depends on no input is done once, and each batch goes the fastest way.

It needs numpy and Numba alone. A few rows go one by one through a compiled loop; with more, rows are sorted by expert
and each expert multiplies its own at once. From how many on is measured when it is first asked. An RbM that is routed
once, to one expert, sorts its rows once for all layers.
"""

import functools
import threading
import time
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import scipy.sparse as sp
from threadpoolctl import ThreadpoolController

from rbm_dist.serve import kernels
from rbm_dist.serve.layers import Facts, Layer, Tensors, members_of

Rows: TypeAlias = np.ndarray | sp.csr_array
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


_PLACES = {
    "weight_EDO": kernels.WEIGHT, "bias_EO": kernels.BIAS, "gain_2O": kernels.GAIN, "keys_PE": kernels.KEYS,
    "projection_DP": kernels.PROJECTION, "scale_ED": kernels.SCALE,
}  # fmt: skip
"""Arrays of a layer, and the column of the table that says where each begins."""


def _packed(layers: list[Layer]) -> tuple[np.ndarray, np.ndarray, list[Layer]]:
    """All weights as one flat array, the table of what is where, and the layers as views of it."""
    dtype, size = layers[0].bias_EO.dtype, 0
    table_LT = np.full((len(layers), kernels.TABLE_COLUMNS), -1, np.int64)
    for row, layer in zip(table_LT, layers, strict=True):
        row[kernels.EXPERTS], row[kernels.WIDTH], row[kernels.OUTPUTS] = layer.weight_EDO.shape
        row[kernels.TOP_K], row[kernels.OVER_ALL], row[kernels.NORM] = layer.top_k, layer.over_all, layer.norm
        row[kernels.PROJECTED] = 0 if layer.projection_DP is None else layer.projection_DP.shape[1]
        for name, column in _PLACES.items():
            array = getattr(layer, name)
            if array is not None:
                items = -(-array.nbytes // dtype.itemsize) if array.dtype == np.int8 else array.size
                row[column], size = size, size + -(-items // 16) * 16  # at cache lines
    flat, packed = np.zeros(size, dtype), []
    for row, layer in zip(table_LT, layers, strict=True):
        views: dict[str, Any] = {}
        for name, column in _PLACES.items():
            array = getattr(layer, name)
            if array is not None:
                rest = flat[row[column] :]
                views[name] = (rest.view(np.int8) if array.dtype == np.int8 else rest)[: array.size].reshape(
                    array.shape
                )
                views[name][...] = array
        packed.append(replace(layer, **views | {"gain_2O": views["gain_2O"].reshape(-1)}))
    return flat, table_LT, packed


def _best_s(call: Any) -> float:
    """The shortest of some calls, in seconds."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[1:])
