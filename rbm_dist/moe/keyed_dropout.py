"""Dropout that belongs to a row, not to a rank: of dense rows and of rows of mostly zeros."""

import torch
from torch import Tensor

from rbm_dist.moe.sparse_rows import Rows, SparseRows
from rbm_dist.randomness.rows import dropout_mask


def keyed_dropout(x_BD: Rows, key_B: Tensor | None, p: float) -> Rows:
    """Zero each entry with probability `p` and scale the rest by 1 / (1 − p); no key (evaluation) changes nothing."""
    if key_B is None or p == 0:
        return x_BD
    if isinstance(x_BD, SparseRows):
        return x_BD.with_values(x_BD.value_n * dropout_mask(key_B[x_BD.row_n], x_BD.column_n, p, x_BD.value_n.dtype))
    return x_BD * dropout_mask(key_B[:, None], torch.arange(x_BD.shape[1], device=key_B.device), p, x_BD.dtype)
