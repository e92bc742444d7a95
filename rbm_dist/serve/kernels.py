"""Compiled loops of the student at work: a row through the whole network in one call, and all between the products.

A network is one flat array of weights and a table that says where each layer's are (`network.py`), because a call
costs by the number of arrays it is given. A single row reads its experts' weights once, and of these only the rows
that belong to inputs other than zero: after a ReLU that is half of them, of a bag of words a hundredth. Weights may be
int8 with a scale for each of their rows, by which the input is multiplied instead: a quarter of the bytes to read.
"""

# mypy: disable-error-code="no-untyped-def"
import numpy as np
from numba import njit

# Columns of a network's table, one row per layer. Offsets are into the flat weights; −1: there is none.
WIDTH, OUTPUTS, EXPERTS, TOP_K, WEIGHT, BIAS, KEYS, PROJECTION, PROJECTED, OVER_ALL, NORM, GAIN, SCALE = range(13)
TABLE_COLUMNS = 13
NO_NORM, AFFINE, LAYER_NORM = range(3)
NO_ROWS, SUM, LENGTH = range(3)
_EPS = 1e-5  # of torch.nn.LayerNorm
_FLOOR = 1e-12  # of torch.nn.functional.normalize
_BLOCK = 512  # rows at once, which stay in a cache between the layers
# OpenBLAS copies large matrices before it multiplies: for a few rows that takes two to three times as long as they do.
LARGE, WEIGHTS_PER_ROW = 1 << 18, 1 << 16


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def _add_product(x_D, weight_DO, scale_D, factor, place_D, y_O):
    """`y += factor · x @ weight`, four rows of weights at a time, without those of zeros.

    scale_D: of weights in int8, what their rows are to be multiplied by; else None.
    """
    found = 0
    for d in range(len(x_D)):
        place_D[found] = d
        found += x_D[d] != 0
    outputs = weight_DO.shape[1]
    i = 0
    while i + 4 <= found:
        p, q, r, s = place_D[i], place_D[i + 1], place_D[i + 2], place_D[i + 3]
        a, b, c, d = factor * x_D[p], factor * x_D[q], factor * x_D[r], factor * x_D[s]
        if scale_D is not None:
            a, b, c, d = a * scale_D[p], b * scale_D[q], c * scale_D[r], d * scale_D[s]
        row_p, row_q, row_r, row_s = weight_DO[p], weight_DO[q], weight_DO[r], weight_DO[s]
        for o in range(outputs):
            y_O[o] += a * row_p[o] + b * row_q[o] + c * row_r[o] + d * row_s[o]
        i += 4
    while i < found:
        a, row_p = factor * x_D[place_D[i]], weight_DO[place_D[i]]
        if scale_D is not None:
            a *= scale_D[place_D[i]]
        for o in range(outputs):
            y_O[o] += a * row_p[o]
        i += 1


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def in_full(weight_DO, scale_D, full_DO):
    """Weights in int8 times the scales of their rows."""
    for d in range(len(weight_DO)):
        for o in range(weight_DO.shape[1]):
            full_DO[d, o] = weight_DO[d, o] * scale_D[d]


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def _norm_and_relu(y_O, kind, gain_2O, relu):
    """In place: layer norm or an affine map, then ReLU; `gain_2O` holds gain and offset."""
    outputs = len(y_O)
    if kind == LAYER_NORM:
        total = y_O.dtype.type(0)
        for o in range(outputs):
            total += y_O[o]
        mean, squares = y_O.dtype.type(total / outputs), y_O.dtype.type(0)
        for o in range(outputs):
            squares += (y_O[o] - mean) * (y_O[o] - mean)
        scale = y_O.dtype.type(1 / np.sqrt(squares / outputs + _EPS))
        for o in range(outputs):
            y_O[o] = (y_O[o] - mean) * scale * gain_2O[o] + gain_2O[outputs + o]
    elif kind == AFFINE:
        for o in range(outputs):
            y_O[o] = y_O[o] * gain_2O[o] + gain_2O[outputs + o]
    if relu:
        zero = y_O.dtype.type(0)
        for o in range(outputs):
            y_O[o] = max(y_O[o], zero)


@njit(cache=True, nogil=True)
def _choose(score_E, top_k, over_all, expert_k, weight_k):
    """The `top_k` highest scores, best first, as `torch.topk`, and their softmax over these or over all."""
    for k in range(top_k):
        best = -1
        for e in range(len(score_E)):
            taken = False
            for j in range(k):
                taken = taken or expert_k[j] == e
            if not taken and (best < 0 or score_E[e] > score_E[best]):
                best = e
        expert_k[k] = best
    highest, total = score_E[expert_k[0]], score_E.dtype.type(0)
    for k in range(top_k):
        weight_k[k] = np.exp(score_E[expert_k[k]] - highest)
        total += weight_k[k]
    if over_all:
        total = np.exp(score_E - highest).sum()
    for k in range(top_k):
        weight_k[k] /= total


@njit(cache=True, nogil=True)
def choose(score_BE, row_BP, top_k, over_all, expert_Bk, weight_Bk, score_Bk):
    """`_choose` for many rows, whose scores are still to be divided by the rows' lengths; `score_Bk`: of the chosen."""
    for b in range(len(score_BE)):
        score_E = score_BE[b]
        length = max(np.sqrt(np.dot(row_BP[b], row_BP[b])), score_E.dtype.type(_FLOOR))
        if top_k == 1 and not over_all:  # then the softmax does not matter
            best = 0
            for e in range(1, len(score_E)):
                if score_E[e] > score_E[best]:
                    best = e
            expert_Bk[b, 0], weight_Bk[b, 0], score_Bk[b, 0] = best, 1, score_E[best] / length
            continue
        for e in range(len(score_E)):
            score_E[e] /= length
        _choose(score_E, top_k, over_all, expert_Bk[b], weight_Bk[b])
        for k in range(top_k):
            score_Bk[b, k] = score_E[expert_Bk[b, k]]


@njit(cache=True, nogil=True)
def sort_by_expert(expert_Bk, weight_Bk, start_E, row_R, weight_R):
    """Rows and weights in the order of their experts: a counting sort. start_E: `[E + 1]`, filled."""
    start_E[:] = 0
    for expert in expert_Bk.flat:
        start_E[expert + 1] += 1
    for e in range(1, len(start_E)):
        start_E[e] += start_E[e - 1]
    next_E = start_E[:-1].copy()
    for b in range(len(expert_Bk)):
        for k in range(expert_Bk.shape[1]):
            place = next_E[expert_Bk[b, k]]
            next_E[expert_Bk[b, k]] += 1
            row_R[place], weight_R[place] = b, weight_Bk[b, k]


@njit(cache=True, nogil=True)
def one_by_one(x_BD, flat, table_LT, logits_BC):
    """Rows through the network one after another: for few rows, for which sorting by expert would cost more."""
    widest, most = 0, 1
    for layer in range(len(table_LT)):
        at = table_LT[layer]
        widest = max(widest, at[WIDTH], at[OUTPUTS], at[EXPERTS], at[PROJECTED])
        most = max(most, at[TOP_K])
    place, score_E = np.empty(widest, np.int64), np.empty(widest, flat.dtype)
    projected, rows_2 = np.empty(widest, flat.dtype), np.empty((2, widest), flat.dtype)
    expert_k, weight_k = np.zeros(most, np.int64), np.ones(most, flat.dtype)
    as_int8 = flat.view(np.int8)
    for b in range(len(x_BD)):
        x_D = x_BD[b]
        for layer in range(len(table_LT)):
            at = table_LT[layer]
            width, outputs, experts, top_k = at[WIDTH], at[OUTPUTS], at[EXPERTS], at[TOP_K]
            if at[KEYS] >= 0:
                row_D, wide = x_D, width
                if at[PROJECTION] >= 0:
                    wide = at[PROJECTED]
                    row_D = projected[:wide]
                    row_D[:] = 0
                    start = at[PROJECTION]
                    weight = flat[start : start + width * wide].reshape(width, wide)
                    _add_product(x_D, weight, None, flat.dtype.type(1), place, row_D)
                length = np.sqrt(np.dot(row_D, row_D))
                keys_DE = flat[at[KEYS] : at[KEYS] + wide * experts].reshape(wide, experts)
                score = score_E[:experts]
                score[:] = 0
                _add_product(row_D, keys_DE, None, flat.dtype.type(1 / max(length, _FLOOR)), place, score)
                _choose(score, top_k, at[OVER_ALL] == 1, expert_k, weight_k)
            last = layer == len(table_LT) - 1
            y_O = logits_BC[b] if last else rows_2[layer % 2, :outputs]
            y_O[:] = 0
            for k in range(top_k):
                expert = expert_k[k] if experts > 1 else 0
                weight = weight_k[k] if experts > 1 else flat.dtype.type(1)
                start = at[BIAS] + expert * outputs
                for o in range(outputs):
                    y_O[o] += weight * flat[start + o]
                size = width * outputs
                if at[SCALE] < 0:
                    start = at[WEIGHT] + expert * size
                    full_DO = flat[start : start + size].reshape(width, outputs)
                    _add_product(x_D, full_DO, None, weight, place, y_O)
                else:
                    start = at[WEIGHT] * flat.itemsize + expert * size
                    small_DO = as_int8[start : start + size].reshape(width, outputs)
                    scale_D = flat[at[SCALE] + expert * width : at[SCALE] + (expert + 1) * width]
                    _add_product(x_D, small_DO, scale_D, weight, place, y_O)
            if not last:
                _norm_and_relu(y_O, at[NORM], flat[at[GAIN] : at[GAIN] + 2 * outputs], True)
            x_D = y_O


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def thin_product(x_nD, weight_DO, out_nO):
    """`out = x @ weight` of so few rows that reading the weights is most of it: they are read once, and not copied."""
    width, outputs = weight_DO.shape
    out_nO[:] = 0
    d = 0
    while d + 4 <= width:
        row_p, row_q, row_r, row_s = weight_DO[d], weight_DO[d + 1], weight_DO[d + 2], weight_DO[d + 3]
        for n in range(len(x_nD)):
            y_O, p, q, r, s = out_nO[n], x_nD[n, d], x_nD[n, d + 1], x_nD[n, d + 2], x_nD[n, d + 3]
            for o in range(outputs):
                y_O[o] += p * row_p[o] + q * row_q[o] + r * row_r[o] + s * row_s[o]
        d += 4
    while d < width:
        for n in range(len(x_nD)):
            for o in range(outputs):
                out_nO[n, o] += x_nD[n, d] * weight_DO[d, o]
        d += 1


@njit(cache=True, nogil=True)
def add_weighed(out_nO, bias_O, row_n, weight_n, y_BO):
    """`y[row] += weight · (out + bias)` for one expert's rows."""
    for n in range(len(row_n)):
        y_O, out_O, weight = y_BO[row_n[n]], out_nO[n], weight_n[n]
        for o in range(len(y_O)):
            y_O[o] += weight * (out_O[o] + bias_O[o])


@njit(cache=True, nogil=True)
def norm_and_relu(y_BO, kind, gain_2O):
    """In place, by row."""
    for b in range(len(y_BO)):
        _norm_and_relu(y_BO[b], kind, gain_2O, True)


@njit(cache=True, nogil=True, fastmath={"contract", "reassoc", "nsz"})
def sparse_product(indptr, column, value, row_n, weight_DO, out_nO):
    """`out = x[rows] @ weight` of sparse rows in CSR."""
    outputs = out_nO.shape[1]
    for n in range(len(out_nO)):
        y_O = out_nO[n]
        y_O[:] = 0
        i, stop = indptr[row_n[n]], indptr[row_n[n] + 1]
        while i + 4 <= stop:
            v, w, x, y = value[i], value[i + 1], value[i + 2], value[i + 3]
            row_v, row_w = weight_DO[column[i]], weight_DO[column[i + 1]]
            row_x, row_y = weight_DO[column[i + 2]], weight_DO[column[i + 3]]
            for o in range(outputs):
                y_O[o] += v * row_v[o] + w * row_w[o] + x * row_x[o] + y * row_y[o]
            i += 4
        while i < stop:
            v, row_v = value[i], weight_DO[column[i]]
            for o in range(outputs):
                y_O[o] += v * row_v[o]
            i += 1


@njit(cache=True, nogil=True)
def expert_by_expert(x_BD, csr, row_R, start_E, flat, table_LT, logits_BC):
    """Rows of one expert each through all layers at once: first those of the first expert, some at a time, and so on.

    csr: of sparse rows `indptr`, `column` and `value`; `x_BD` has no rows then. The rows: see `sort_by_expert`.
    """
    indptr, column, value = csr
    widest, weights = 0, 0
    for layer in range(len(table_LT)):
        at = table_LT[layer]
        widest, weights = max(widest, at[WIDTH], at[OUTPUTS]), max(weights, at[WIDTH] * at[OUTPUTS])
    buffer_2 = np.empty((2, min(len(row_R), _BLOCK) * widest), flat.dtype)
    full = np.empty(weights if table_LT[0, SCALE] >= 0 else 0, flat.dtype)
    as_int8 = flat.view(np.int8)
    for expert in range(len(start_E) - 1):
        for first in range(start_E[expert], start_E[expert + 1], _BLOCK):
            row_n = row_R[first : min(first + _BLOCK, start_E[expert + 1])]
            rows, width = len(row_n), table_LT[0, WIDTH]
            x_nD = buffer_2[0, : rows * width].reshape(rows, width)
            if len(x_BD):
                for n in range(rows):
                    x_nD[n] = x_BD[row_n[n]]
            for layer in range(len(table_LT)):
                at = table_LT[layer]
                width, outputs = at[WIDTH], at[OUTPUTS]
                size, last = width * outputs, layer == len(table_LT) - 1
                if at[SCALE] < 0:
                    start = at[WEIGHT] + expert * size
                    weight_DO = flat[start : start + size].reshape(width, outputs)
                else:
                    start = at[WEIGHT] * flat.itemsize + expert * size
                    weight_DO = full[:size].reshape(width, outputs)
                    scale_D = flat[at[SCALE] + expert * width : at[SCALE] + (expert + 1) * width]
                    in_full(as_int8[start : start + size].reshape(width, outputs), scale_D, weight_DO)
                y_nO = buffer_2[(layer + 1) % 2, : rows * outputs].reshape(rows, outputs)
                if layer == 0 and not len(x_BD):
                    sparse_product(indptr, column, value, row_n, weight_DO, y_nO)
                elif size >= max(LARGE, rows * WEIGHTS_PER_ROW):
                    thin_product(x_nD, weight_DO, y_nO)
                else:
                    np.dot(x_nD, weight_DO, y_nO)
                bias_O = flat[at[BIAS] + expert * outputs : at[BIAS] + (expert + 1) * outputs]
                gain_2O = flat[at[GAIN] : at[GAIN] + 2 * outputs]
                for n in range(rows):
                    y_O = y_nO[n]
                    for o in range(outputs):
                        y_O[o] += bias_O[o]
                    if not last:
                        _norm_and_relu(y_O, at[NORM], gain_2O, True)
                x_nD = y_nO
            for n in range(rows):
                logits_BC[row_n[n]] = x_nD[n]


@njit(cache=True, nogil=True)
def softmax(logits_BC):
    """In place, by row."""
    for b in range(len(logits_BC)):
        row_C = logits_BC[b]
        highest = row_C.max()
        total = row_C.dtype.type(0)
        for c in range(len(row_C)):
            row_C[c] = np.exp(row_C[c] - highest)
            total += row_C[c]
        for c in range(len(row_C)):
            row_C[c] /= total


@njit(cache=True, nogil=True)
def scale(x_BF, fill_F, shift_F, factor_F, rows, indicators, missing, scaled_BG):
    """Features as they are learned from (`sources/scaling.py`), `[B, G]`; gives the first place that is not finite.

    That place is `b · F + f`, −1 if there is none; with `missing`, NaN is a missing value.
    """
    width = x_BF.shape[1]
    row_F = np.empty(width, np.float64)
    for b in range(len(x_BF)):
        norm = 0.0
        for f in range(width):
            value = np.float64(x_BF[b, f])
            if not np.isfinite(value):
                if not (missing and np.isnan(value)):
                    return b * width + f
                value = fill_F[f]
            row_F[f] = (value - shift_F[f]) * factor_F[f]
            if rows == SUM:
                norm += abs(row_F[f])
            elif rows == LENGTH:
                norm += row_F[f] * row_F[f]
        norm = np.sqrt(norm) if rows == LENGTH else norm
        if norm == 0:
            norm = 1.0
        for f in range(width):
            scaled_BG[b, f] = row_F[f] / norm
        for i in range(len(indicators)):
            scaled_BG[b, width + i] = 1.0 if np.isnan(x_BF[b, indicators[i]]) else 0.0
    return -1
