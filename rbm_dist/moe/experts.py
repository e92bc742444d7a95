"""Stacked experts: many linear layers of one shape as two tensors, applied to rows grouped by expert."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class StackedExperts(nn.Module):
    """L linear experts: `weight_LDO`, `bias_LO`."""

    def __init__(self, weight_LDO: Tensor, bias_LO: Tensor):
        super().__init__()
        self.weight_LDO = nn.Parameter(weight_LDO)
        self.bias_LO = nn.Parameter(bias_LO)

    def forward(self, rows_RD: Tensor, counts_L: Tensor) -> Tensor:
        """Apply expert l to its `counts_L[l]` consecutive rows; gives `[R, O]`."""
        weight, bias = self.weight_LDO, self.bias_LO
        if not len(rows_RD):
            # Stay connected to every input, so that all ranks run the same collectives backward.
            return rows_RD.new_zeros(0, weight.shape[2]) + (rows_RD.sum() + weight.sum() + bias.sum()) * 0
        bias_RO = bias.repeat_interleave(counts_L, dim=0, output_size=len(rows_RD))
        if rows_RD.dtype == torch.float64:  # grouped_mm refuses it
            groups = rows_RD.split(counts_L.tolist())
            return torch.cat([rows @ w for rows, w in zip(groups, weight, strict=True)]) + bias_RO
        return _grouped_mm(rows_RD, weight, counts_L) + bias_RO


def _grouped_mm(rows_RD: Tensor, weight_LDO: Tensor, counts_L: Tensor) -> Tensor:
    # Inner strides must be multiples of 16 bytes, so odd widths are padded with zeros.
    step = 16 // rows_RD.element_size()
    width, outputs = rows_RD.shape[1], weight_LDO.shape[2]
    pad_d, pad_o = -width % step, -outputs % step
    if pad_d or pad_o:
        rows_RD, weight_LDO = F.pad(rows_RD, (0, pad_d)), F.pad(weight_LDO, (0, pad_o, 0, pad_d))
    ends_L = counts_L.cumsum(0).to(torch.int32)
    out_RO = F.grouped_mm(rows_RD.contiguous(), weight_LDO, offs=ends_L)
    # A copy, so that the gradient that comes back is contiguous too.
    return out_RO[:, :outputs].contiguous() if pad_o else _ContiguousGradient.apply(out_RO)


class _ContiguousGradient(torch.autograd.Function):
    """Identity; grouped_mm's backward refuses the expanded gradients that a mean or sum makes."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()
