"""Rows of mostly zeros, as bag-of-words features are: the input of a first layer without its zeros.

A product with a weight matrix reads the weights of the non-zero columns alone, and so does its gradient: with 1 % of
them non-zero, a step costs a tenth of the dense one. Functions that take either kind of rows stand at the end.
"""

from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from numba import njit
from torch import Tensor

_TINY = 1e-12


class SparseRows:
    """A batch `[B, D]` in CSR: row b has the `column_n` and `value_n` from `indptr_B1[b]` to `indptr_B1[b + 1]`."""

    def __init__(self, indptr_B1: Tensor, column_n: Tensor, value_n: Tensor, width: int):
        self.indptr_B1, self.column_n, self.value_n, self.width = indptr_B1, column_n, value_n, width

    @classmethod
    def of(cls, rows: sp.csr_array, dtype: torch.dtype = torch.float32) -> "SparseRows":
        """From a scipy matrix."""
        indptr, column = (torch.from_numpy(each.astype(np.int64)) for each in (rows.indptr, rows.indices))
        return cls(indptr, column, torch.from_numpy(np.array(rows.data)).to(dtype), rows.shape[1])

    def __len__(self) -> int:
        return len(self.indptr_B1) - 1

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self), self.width))

    @cached_property
    def row_n(self) -> Tensor:
        """The row of every stored value."""
        return torch.from_numpy(np.repeat(np.arange(len(self)), np.diff(self.indptr_B1.numpy())))

    def __getitem__(self, rows: Tensor | slice) -> "SparseRows":
        """Some rows, by position; a row may be taken several times."""
        index = torch.arange(len(self))[rows]
        arrays = (each.numpy() for each in (self.indptr_B1, self.column_n, self.value_n, index))
        indptr, column, value = map(torch.from_numpy, _take(*arrays))
        return SparseRows(indptr, column, value, self.width)

    def with_values(self, value_n: Tensor) -> "SparseRows":
        """The same places, other values."""
        rows = SparseRows(self.indptr_B1, self.column_n, value_n, self.width)
        rows.__dict__["row_n"] = self.row_n
        return rows

    def dense(self) -> Tensor:
        """As a plain tensor."""
        return self.value_n.new_zeros(self.shape).index_put_((self.row_n, self.column_n), self.value_n, accumulate=True)

    def normalized(self) -> "SparseRows":
        """Each row scaled to length 1, rows of zeros left as they are; as `torch.nn.functional.normalize`."""
        return self.with_values(self.value_n / lengths(self)[self.row_n])

    def transposed(self) -> "SparseRows":
        """The matrix `[D, B]`."""
        return SparseRows.of(self.scipy().tocsc().T, self.value_n.dtype)

    def scipy(self) -> sp.csr_array:
        """The same matrix, with 32-bit indices while they fit: scikit-learn knows no others."""
        small = max(len(self.column_n), *self.shape) <= np.iinfo(np.int32).max
        column, indptr = (
            each.numpy().astype(np.int32 if small else np.int64) for each in (self.column_n, self.indptr_B1)
        )
        return sp.csr_array((self.value_n.numpy(), column, indptr), shape=self.shape)

    def matmul(self, weight_DO: Tensor) -> Tensor:
        """`self @ weight`, `[B, O]`, with a gradient for the weight."""
        return _Matmul.apply(weight_DO, self)

    def grouped_matmul(self, weight_LDO: Tensor, counts_L: Tensor) -> Tensor:
        """The first `counts_L[0]` rows times the first matrix, the next times the second, and so on."""
        count_L = self.indptr_B1[F.pad(counts_L.cumsum(0), (1, 0))].diff().numpy()  # stored values of each group
        column = self.column_n + torch.from_numpy(np.repeat(np.arange(len(count_L)) * self.width, count_L))
        stacked = SparseRows(self.indptr_B1, column, self.value_n, self.width * len(counts_L))
        return stacked.matmul(weight_LDO.flatten(0, 1))


Rows = Tensor | SparseRows


@njit(cache=True, nogil=True)
def _take(indptr, column, value, rows):  # type: ignore[no-untyped-def]
    taken_indptr = np.zeros(len(rows) + 1, np.int64)
    for i in range(len(rows)):
        taken_indptr[i + 1] = taken_indptr[i] + indptr[rows[i] + 1] - indptr[rows[i]]
    taken_column, taken_value = np.empty(taken_indptr[-1], column.dtype), np.empty(taken_indptr[-1], value.dtype)
    for i in range(len(rows)):
        low, high, start = indptr[rows[i]], indptr[rows[i] + 1], taken_indptr[i]
        taken_column[start : start + high - low] = column[low:high]
        taken_value[start : start + high - low] = value[low:high]
    return taken_indptr, taken_column, taken_value


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_DO: Tensor, rows: SparseRows) -> Tensor:
        ctx.rows = rows
        return _bag(rows, weight_DO)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # embedding_bag's own gradient adds row by row into the whole matrix, ten times slower.
        return _bag(ctx.rows.transposed(), grads[0].contiguous()), None


def _bag(rows: SparseRows, weight_DO: Tensor) -> Tensor:
    return F.embedding_bag(
        rows.column_n, weight_DO, rows.indptr_B1, mode="sum", per_sample_weights=rows.value_n, include_last_offset=True
    )


def to_rows(array: np.ndarray | sp.csr_array, device: torch.device, dtype: torch.dtype) -> Rows:
    """Rows for a model: sparse on a CPU if they are, else dense."""
    if isinstance(array, np.ndarray):
        return torch.from_numpy(array).to(device, dtype)
    if device.type == "cpu":
        return SparseRows.of(array, dtype)
    return torch.from_numpy(array.toarray()).to(device, dtype)


def to_scipy(rows: Rows) -> np.ndarray | sp.csr_array:
    """Rows for other libraries."""
    return rows.cpu().numpy() if isinstance(rows, Tensor) else rows.scipy()


def lengths(rows: Rows) -> Tensor:
    """The length of each row, `[B]`; a tiny one for a row of zeros, as `torch.nn.functional.normalize` has it."""
    if isinstance(rows, SparseRows):
        squares_B = rows.value_n.new_zeros(len(rows)).index_add_(0, rows.row_n, rows.value_n.square())
        return squares_B.sqrt().clamp_min(_TINY)
    return torch.linalg.vector_norm(rows, dim=1).clamp_min(_TINY)


def unit(rows: Rows) -> Rows:
    """Each row scaled to length 1."""
    return rows.normalized() if isinstance(rows, SparseRows) else F.normalize(rows, dim=1)


def matmul(rows: Rows, weight_DO: Tensor) -> Tensor:
    """`rows @ weight`."""
    return rows.matmul(weight_DO) if isinstance(rows, SparseRows) else rows @ weight_DO


def dense(rows: Rows) -> Tensor:
    """As a plain tensor."""
    return rows.dense() if isinstance(rows, SparseRows) else rows
