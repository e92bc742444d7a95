"""What a mixture does with rows before and after its products: a pass over memory each, where torch needs several.

Rows come as `[B, D]` with k places each among the rows grouped by expert, `place_Bk` (−1: none). On a CPU both passes
are Numba's, on as many threads as torch has; elsewhere, and in tests as their reference, they are torch's.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from rbm_dist.moe.keyed_dropout import keyed_dropout
from rbm_dist.moe.sparse_rows import Rows, SparseRows
from rbm_dist.randomness.rows import bits32, threshold_of

_LEAST_ROWS = 256  # of a thread


def spread_dropped(x_BD: Rows, place_Bk: Tensor, at_R: Tensor, key_Bk: Tensor | None, p: float) -> Rows:
    """Rows grouped by expert, `[R, D]`: a copy of each row at its places, with dropout by the keys of these.

    at_R: what has each place, in the flattened `[B, k]`. No keys: no dropout.
    """
    if isinstance(x_BD, SparseRows) or x_BD.device.type != "cpu":
        return spread_dropped_torch(x_BD, at_R, key_Bk, p, place_Bk.shape[1])
    return _Spread.apply(x_BD, place_Bk, len(at_R), key_Bk, p)


def weighted_sums(
    y_RO: Tensor, bias_LO: Tensor, place_Bk: Tensor, at_R: Tensor, expert_Bk: Tensor, weights_Bk: Tensor
) -> Tensor:
    """`Σ_j a_bj · (y[place_bj] + bias[expert_bj])`, `[B, O]`; y may be wider than the bias, whose width counts."""
    if y_RO.device.type != "cpu":
        return weighted_sums_torch(y_RO, bias_LO, at_R, expert_Bk, weights_Bk)
    return _Weighted.apply(y_RO, bias_LO, place_Bk, expert_Bk, weights_Bk)


def spread_dropped_torch(x_BD: Rows, at_R: Tensor, key_Bk: Tensor | None, p: float, k: int) -> Rows:
    """As `spread_dropped`, on any device, for any rows."""
    rows_RD = x_BD[at_R.div(k, rounding_mode="floor")]
    return keyed_dropout(rows_RD, None if key_Bk is None else key_Bk.flatten()[at_R], p)


def weighted_sums_torch(
    y_RO: Tensor, bias_LO: Tensor, at_R: Tensor, expert_Bk: Tensor, weights_Bk: Tensor
) -> Tensor:  # fmt: skip
    """As `weighted_sums`, on any device."""
    biased_RO = y_RO[:, : bias_LO.shape[1]] + bias_LO[expert_Bk.flatten()[at_R]]
    weighed_RO = biased_RO * weights_Bk.flatten()[at_R, None]
    row_R = at_R.div(weights_Bk.shape[1], rounding_mode="floor")
    return weighed_RO.new_zeros(len(weights_Bk), bias_LO.shape[1]).index_add(0, row_R, weighed_RO)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, place_Bk: Tensor, count: int, key_Bk: Tensor | None, p: float) -> Tensor:
        ctx.place_Bk, ctx.p, ctx.shape = place_Bk, 0.0 if key_Bk is None else p, x_BD.shape
        ctx.key_Bk = torch.zeros_like(place_Bk) if key_Bk is None else key_Bk
        out_RD = x_BD.new_empty(count, x_BD.shape[1])
        arrays = (x_BD.detach().contiguous().numpy(), place_Bk.numpy(), ctx.key_Bk.numpy(), out_RD.numpy())
        _in_threads(_spread, len(x_BD), *arrays, *_mask_of(ctx.p, x_BD.dtype))
        return out_RD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        grad_RD = grads[0].contiguous()
        grad_BD = grad_RD.new_empty(ctx.shape)
        arrays = (grad_BD.numpy(), ctx.place_Bk.numpy(), ctx.key_Bk.numpy(), grad_RD.numpy())
        _in_threads(_gather, len(grad_BD), *arrays, *_mask_of(ctx.p, grad_RD.dtype))
        return grad_BD, None, None, None, None


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y_RO: Tensor, bias_LO: Tensor, place_Bk: Tensor, expert_Bk: Tensor, weights_Bk: Tensor
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(y_RO, bias_LO, place_Bk, expert_Bk, weights_Bk)
        out_BO = y_RO.new_empty(len(place_Bk), bias_LO.shape[1])
        _in_threads(_sum, len(out_BO), out_BO.numpy(), *_arrays(y_RO, bias_LO, place_Bk, expert_Bk, weights_Bk))
        return out_BO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, Tensor]:
        y_RO, bias_LO, place_Bk, expert_Bk, weights_Bk = ctx.saved_tensors
        grad_BO = grads[0].contiguous()
        grad_RO, grad_Bk = torch.empty_like(y_RO), torch.empty_like(weights_Bk)
        shares: dict[int, np.ndarray] = {}  # of each range of rows: threads that end in any order add up in one

        def spread(low: int, high: int, *arrays: np.ndarray) -> None:
            shares[low] = np.zeros(bias_LO.shape, arrays[0].dtype)
            _spread_gradient(low, high, *arrays, shares[low])

        given = _arrays(grad_BO, y_RO, bias_LO, place_Bk, expert_Bk, weights_Bk)
        _in_threads(spread, len(grad_BO), *given, grad_RO.numpy(), grad_Bk.numpy())
        grad_LO = torch.zeros_like(bias_LO)
        for low in sorted(shares):
            grad_LO += torch.from_numpy(shares[low])
        return grad_RO, grad_LO, None, None, grad_Bk


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [each.detach().contiguous().numpy() for each in tensors]


def _mask_of(p: float, dtype: torch.dtype) -> tuple[np.int32, Any, bool]:
    """The bits that are dropped are below the first; the others are scaled by the second; whether any are."""
    scale = np.float32(1 / (1 - p)) if dtype == torch.float32 else np.float64(1 / (1 - p))
    return np.int32(threshold_of(p)), scale, p > 0


def _in_threads(kernel: Callable[..., None], rows: int, *arguments: Any) -> None:
    """Call `kernel(low, high, *arguments)` for ranges of all rows, on torch's number of threads."""
    threads = max(1, min(torch.get_num_threads(), rows // _LEAST_ROWS))
    if threads == 1:
        if rows:
            kernel(0, rows, *arguments)
        return
    bounds = [rows * each // threads for each in range(threads + 1)]
    list(_pool(threads).map(lambda low, high: kernel(low, high, *arguments), bounds[:-1], bounds[1:]))


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


@njit(cache=True, nogil=True)
def _spread(low, high, x, place, key, out, threshold, scale, drops):  # type: ignore[no-untyped-def]
    for b in range(low, high):
        for j in range(place.shape[1]):
            r = place[b, j]
            if r < 0:
                continue
            if drops:
                for d in range(x.shape[1]):
                    out[r, d] = x[b, d] * scale if bits32(key[b, j], d) >= threshold else 0
            else:
                out[r] = x[b]


@njit(cache=True, nogil=True)
def _gather(low, high, grad_x, place, key, grad_out, threshold, scale, drops):  # type: ignore[no-untyped-def]
    for b in range(low, high):
        grad_x[b] = 0
        for j in range(place.shape[1]):
            r = place[b, j]
            if r < 0:
                continue
            if drops:
                for d in range(grad_x.shape[1]):
                    grad_x[b, d] += grad_out[r, d] * scale if bits32(key[b, j], d) >= threshold else 0
            else:
                grad_x[b] += grad_out[r]


@njit(cache=True, nogil=True)
def _sum(low, high, out, y, bias, place, expert, weights):  # type: ignore[no-untyped-def]
    for b in range(low, high):
        out[b] = 0
        for j in range(place.shape[1]):
            r = place[b, j]
            if r < 0:
                continue
            e, weight = expert[b, j], weights[b, j]
            for o in range(out.shape[1]):
                out[b, o] += weight * (y[r, o] + bias[e, o])


@njit(cache=True, nogil=True, fastmath={"reassoc"})
def _spread_gradient(low, high, grad, y, bias, place, expert, weights, grad_y, grad_weights, grad_bias):  # type: ignore[no-untyped-def]
    outputs = grad.shape[1]
    for b in range(low, high):
        for j in range(place.shape[1]):
            r = place[b, j]
            grad_weights[b, j] = 0
            if r < 0:
                continue
            e, weight = expert[b, j], weights[b, j]
            total = weight * 0
            for o in range(outputs):
                total += grad[b, o] * (y[r, o] + bias[e, o])
                grad_y[r, o] = weight * grad[b, o]
                grad_bias[e, o] += weight * grad[b, o]
            for o in range(outputs, grad_y.shape[1]):
                grad_y[r, o] = 0
            grad_weights[b, j] = total
