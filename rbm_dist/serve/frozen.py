"""A student made ready to serve: what does not depend on the input is computed once.

With few experts per routed one, computing all of them as one matrix product and weighing them with a sparse gate is
several times faster than dispatching rows; with many, the routed layer is left as it is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rbm_dist.models.student import Ensemble, RoutedLayer, Student
from rbm_dist.moe.sparse_rows import Rows, SparseRows

# All experts in one product cost num_experts / top_k times the arithmetic of the chosen; up to here that is faster.
_DENSE_RATIO = 4


def freeze(student: Student) -> Student:
    """A student for inference alone, with the same outputs up to rounding. It gives no traces."""
    if isinstance(student, Ensemble):
        return student.eval()
    layers = [
        _DenseRoutedLayer(layer)
        if isinstance(layer, RoutedLayer) and len(layer.memory_ED) <= _DENSE_RATIO * layer.top_k
        else layer
        for layer in student.layers
    ]
    return Student(layers, list(student.norms), student.inputs).eval()


class _DenseRoutedLayer(nn.Module):
    @torch.no_grad()
    def __init__(self, layer: RoutedLayer):
        super().__init__()
        weight_EDO = layer.experts.scaled_weight * layer.scale
        self.num_experts, width, self.num_outputs = weight_EDO.shape
        self.top_k, self.temperature = layer.top_k, layer.temperature
        self.memory_DE = F.normalize(layer.memory_ED, dim=1).T.contiguous()
        self.weight_DP = weight_EDO.permute(1, 0, 2).reshape(width, -1).contiguous()  # P = E · O
        self.bias_P = (layer.experts.bias_LO * layer.scale).reshape(-1)

    def forward(self, x_BD: Rows, key_B: None) -> tuple[Tensor, None]:
        if isinstance(x_BD, SparseRows):
            cosines_BE = x_BD.normalized().matmul(self.memory_DE)
            outputs_BP = x_BD.matmul(self.weight_DP) + self.bias_P
        else:
            cosines_BE = (x_BD @ self.memory_DE) / x_BD.norm(dim=1, keepdim=True).clamp_min(1e-12)
            outputs_BP = torch.addmm(self.bias_P, x_BD, self.weight_DP)
        cosines_Bk, experts_Bk = cosines_BE.topk(self.top_k, dim=1)
        gate_BE = torch.zeros_like(cosines_BE).scatter_(1, experts_Bk, (cosines_Bk / self.temperature).softmax(1))
        outputs_BEO = outputs_BP.view(-1, self.num_experts, self.num_outputs)
        return torch.bmm(gate_BE.unsqueeze(1), outputs_BEO).squeeze(1), None
