"""A student made ready to serve: what depends on no input is computed once, and each batch goes the fastest way.

An RbM that is routed once, to one expert, sorts its rows by expert for all layers. Else, in each layer, a few rows are
multiplied with their experts' weights one by one; with few experts per routed one, all experts in one product, weighed
with a sparse gate, are several times faster than dispatching rows; and with many, rows are sorted by expert.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rbm_dist.models.student import Ensemble, RoutedLayer, Student, Trace
from rbm_dist.moe.experts import grouped_mm, padded
from rbm_dist.moe.routing import Routing
from rbm_dist.moe.sparse_rows import Rows, SparseRows, dense

_FEW_PAIRS = 8  # of rows and experts, up to which copying their experts' weights is faster than sorting
# All experts in one product cost num_experts / top_k times the arithmetic of the chosen; up to here that is faster.
_DENSE_RATIO = 4


def freeze(student: Student) -> Student:
    """A student for inference alone, with the same outputs up to rounding."""
    if isinstance(student, Ensemble):
        return student.eval()
    layers = [_FrozenLayer(layer) if isinstance(layer, RoutedLayer) else layer for layer in student.layers]
    one_each = len(student.memories) == 1 and student.routed_layers[0].top_k == 1
    return (_OneExpertEach if one_each else Student)(layers, list(student.norms), student.inputs).eval()


class _OneExpertEach(Student):
    """Routed once, to one expert: rows are sorted for all layers, and each is an MLP's that its expert picks."""

    def forward(self, x_BD: Rows, key_B: Tensor | None = None) -> tuple[Tensor, list[Trace]]:
        layers: list[_FrozenLayer] = list(self.layers)  # type: ignore[arg-type]
        expert_B = layers[0].cosines(x_BD).argmax(1)
        if len(x_BD) == 1:
            expert = int(expert_B)
            output_BO = layers[0].of_expert(dense(x_BD), expert)
            for norm, layer in zip(self.norms, layers[1:], strict=True):
                output_BO = layer.of_expert(F.relu(norm(output_BO)), expert)
            return output_BO, []
        expert_R, order_R = expert_B.sort(stable=True)
        counts_E = torch.bincount(expert_R, minlength=layers[0].num_experts)
        outputs_RO = layers[0].of_sorted(x_BD[order_R], expert_R, counts_E)
        for norm, layer in zip(self.norms, layers[1:], strict=True):
            outputs_RO = layer.of_sorted(F.relu(norm(outputs_RO)), expert_R, counts_E)
        return torch.empty_like(outputs_RO).index_copy_(0, order_R, outputs_RO), []


class _FrozenLayer(nn.Module):
    @torch.no_grad()
    def __init__(self, layer: RoutedLayer):
        super().__init__()
        weight_EDO = layer.experts.scaled_weight * layer.scale
        self.num_experts, width, self.num_outputs = weight_EDO.shape
        self.top_k, self.temperature = layer.top_k, layer.temperature
        self.memory_DE = None if layer.memory_ED is None else F.normalize(layer.memory_ED, dim=1).T.contiguous()
        self.bias_EO = (layer.experts.bias_LO * layer.scale).detach().clone()
        self.all_in_one = self.top_k > 1 and self.num_experts <= _DENSE_RATIO * self.top_k
        if self.all_in_one:
            self.weight_DP = weight_EDO.permute(1, 0, 2).reshape(width, -1).contiguous()  # P = E · O
            self.weight_EDO = self.weight_DP.view(width, self.num_experts, self.num_outputs).transpose(0, 1)
        else:
            self.weight_EDO = padded(weight_EDO.contiguous())

    def forward(self, x_BD: Rows, key_B: None, routing: Routing | None = None) -> tuple[Tensor, Trace | None]:
        trace = None
        if self.memory_DE is not None:
            cosines_Bk, experts_Bk = self.cosines(x_BD).topk(self.top_k, dim=1)
            routing = Routing(experts_Bk, (cosines_Bk / self.temperature).softmax(1), cosines_Bk)
            trace = Trace(x_BD, routing)
        assert routing is not None, "the first layer has a memory"
        if len(x_BD) * self.top_k <= _FEW_PAIRS:
            return self._one_by_one(dense(x_BD), routing), trace
        return (self._all_in_one if self.all_in_one else self._sorted)(x_BD, routing), trace

    def cosines(self, x_BD: Rows) -> Tensor:
        """Of each row with each memory, `[B, E]`."""
        assert self.memory_DE is not None
        if isinstance(x_BD, SparseRows):
            return x_BD.normalized().matmul(self.memory_DE)
        return (x_BD @ self.memory_DE) / x_BD.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def of_expert(self, x_BD: Tensor, expert: int) -> Tensor:
        """What one expert computes."""
        product_BO = (x_BD @ self.weight_EDO[expert, : x_BD.shape[1]])[:, : self.num_outputs]
        return product_BO + self.bias_EO[expert]

    def of_sorted(self, rows_RD: Rows, expert_R: Tensor, counts_E: Tensor) -> Tensor:
        """What each expert computes of its own rows, in the order of the experts."""
        outputs_RO = grouped_mm(rows_RD, self.weight_EDO, counts_E)
        return outputs_RO[:, : self.num_outputs] + self.bias_EO[expert_R]

    def _one_by_one(self, x_BD: Tensor, routing: Routing) -> Tensor:
        outputs = x_BD.new_zeros(len(x_BD), self.num_outputs)
        chosen = zip(routing.experts_Bk.tolist(), routing.weights_Bk.unbind(), strict=True)
        for row, (experts, weights_k) in enumerate(chosen):
            for expert, weight in zip(experts, weights_k, strict=True):
                outputs[row].addcmul_(self.of_expert(x_BD[row : row + 1], expert)[0], weight)
        return outputs

    def _all_in_one(self, x_BD: Rows, routing: Routing) -> Tensor:
        gate_BE = routing.weights_Bk.new_zeros(len(x_BD), self.num_experts)
        gate_BE.scatter_(1, routing.experts_Bk, routing.weights_Bk)
        if isinstance(x_BD, SparseRows):
            outputs_BP = x_BD.matmul(self.weight_DP) + self.bias_EO.view(-1)
        else:
            outputs_BP = torch.addmm(self.bias_EO.view(-1), x_BD, self.weight_DP)
        outputs_BEO = outputs_BP.view(-1, self.num_experts, self.num_outputs)
        return torch.bmm(gate_BE.unsqueeze(1), outputs_BEO).squeeze(1)

    def _sorted(self, x_BD: Rows, routing: Routing) -> Tensor:
        expert_R, order_R = routing.experts_Bk.flatten().sort(stable=True)
        row_R, counts_E = order_R // self.top_k, torch.bincount(expert_R, minlength=self.num_experts)
        outputs_RO = self.of_sorted(x_BD[row_R], expert_R, counts_E)
        weighted_RO = outputs_RO * routing.weights_Bk.flatten()[order_R, None]
        return outputs_RO.new_zeros(len(x_BD), self.num_outputs).index_add_(0, row_R, weighted_RO)
