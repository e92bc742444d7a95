"""Stacked experts: many linear layers of one shape as two tensors, applied to rows grouped by expert."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rbm_dist.moe.sparse_rows import Rows, SparseRows

MAX_LOG_SCALE = math.log(100)


class StackedExperts(nn.Module):
    """L linear experts: `weight_LDO`, `bias_LO`; with `input_attention` each scales its input by exp(c) first."""

    def __init__(self, weight_LDO: Tensor, bias_LO: Tensor, input_attention: bool = False):
        super().__init__()
        self.weight_LDO = nn.Parameter(weight_LDO)
        self.bias_LO = nn.Parameter(bias_LO)
        self.log_attention_LD = nn.Parameter(weight_LDO.new_zeros(weight_LDO.shape[:2])) if input_attention else None

    @property
    def scaled_weight(self) -> Tensor:
        """What the rows are multiplied with: `exp(min(c, log 100)) ⊙ W`."""
        if self.log_attention_LD is None:
            return self.weight_LDO
        return self.weight_LDO * self.log_attention_LD.clamp(max=MAX_LOG_SCALE).exp()[:, :, None]

    def forward(self, rows_RD: Rows, counts_L: Tensor) -> Tensor:
        """The products of expert l with its `counts_L[l]` consecutive rows, without biases; `[R, O]` or a bit wider."""
        weight = self.scaled_weight
        if isinstance(rows_RD, Tensor) and torch.is_autocast_enabled(rows_RD.device.type):  # which leaves these alone
            dtype = torch.get_autocast_dtype(rows_RD.device.type)
            rows_RD, weight = rows_RD.to(dtype), weight.to(dtype)
        if isinstance(rows_RD, Tensor) and not len(rows_RD):
            # Stay connected to every input, so that all ranks run the same collectives backward.
            return rows_RD.new_zeros(0, weight.shape[2]) + (rows_RD.sum() + weight.sum()) * 0
        if isinstance(rows_RD, SparseRows):
            return grouped_mm(rows_RD, weight, counts_L)
        return _ContiguousGradient.apply(grouped_mm(rows_RD, padded(weight), counts_L))


def padded(weight_LDO: Tensor) -> Tensor:
    """With zeros up to the next width that `F.grouped_mm` takes: inner strides must be multiples of 16 bytes."""
    if weight_LDO.dtype == torch.float64:  # it does not take these at all
        return weight_LDO
    step = 16 // weight_LDO.element_size()
    pad_d, pad_o = -weight_LDO.shape[1] % step, -weight_LDO.shape[2] % step
    return F.pad(weight_LDO, (0, pad_o, 0, pad_d)) if pad_d or pad_o else weight_LDO


def grouped_mm(rows_RD: Rows, weight_LDO: Tensor, counts_L: Tensor) -> Tensor:
    """The first `counts_L[0]` rows times the first matrix, the next times the second, and so on; all `padded`."""
    if isinstance(rows_RD, SparseRows):
        return rows_RD.grouped_matmul(weight_LDO[:, : rows_RD.width], counts_L)
    rows_RD = F.pad(rows_RD, (0, weight_LDO.shape[1] - rows_RD.shape[1]))
    if rows_RD.dtype == torch.float64:
        groups = rows_RD.split(counts_L.tolist())
        return torch.cat([rows @ w for rows, w in zip(groups, weight_LDO, strict=True)])
    if rows_RD.device.type != "cpu" and rows_RD.dtype != torch.bfloat16:
        return batched_mm(rows_RD, weight_LDO, counts_L)
    return F.grouped_mm(rows_RD.contiguous(), weight_LDO, offs=counts_L.cumsum(0).to(torch.int32))


def batched_mm(rows_RD: Tensor, weight_LDO: Tensor, counts_L: Tensor) -> Tensor:
    """As `grouped_mm`, by one batched product of groups that are filled up with zeros to the size of the largest.

    On a GPU `F.grouped_mm` has a kernel for bfloat16 alone; of other types it multiplies group by group, and waits for
    each. This waits once, for the size of the largest group.
    """
    index_L = torch.arange(len(counts_L), device=counts_L.device)
    expert_R = index_L.repeat_interleave(counts_L, output_size=len(rows_RD))
    slot_R = torch.arange(len(rows_RD), device=counts_L.device) - (counts_L.cumsum(0) - counts_L)[expert_R]
    filled = rows_RD.new_zeros(len(counts_L), int(counts_L.max()), rows_RD.shape[1])
    return (filled.index_put((expert_R, slot_R), rows_RD) @ weight_LDO)[expert_R, slot_R]


class _ContiguousGradient(torch.autograd.Function):
    """Identity; grouped_mm's backward refuses the expanded gradients that a mean or sum makes."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()
