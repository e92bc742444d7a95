"""The students: a stack of layers with norm and ReLU between them, each layer dense, routed by memory, or gated.

All dense: an MLP (GLNN); several of them: an ensemble. Gated by a learned gate: the vanilla mixture of experts. An RbM
begins as an MLP. `mlp_to_rbm` turns the one into the other without changing what it computes: every expert starts as a
copy of the dense layer, the weights of a row's experts sum to one, and the output scale exp(t) starts at 1.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rbm_dist.models.norm import make_norm
from rbm_dist.moe.dispatch import Dispatcher, LocalDispatcher
from rbm_dist.moe.experts import MAX_LOG_SCALE, StackedExperts
from rbm_dist.moe.fused import spread_dropped, weighted_sums
from rbm_dist.moe.keyed_dropout import keyed_dropout
from rbm_dist.moe.routing import Routing, route
from rbm_dist.moe.sparse_rows import Rows, SparseRows, matmul
from rbm_dist.randomness.rows import derive_keys, keyed_normal

_GATE_WIDTH = 128
_GATE_TEMPERATURE = 0.5  # of the vanilla mixture's cosine gate before training


@dataclass(frozen=True)
class Trace:
    """What a layer of experts saw: the inputs of its auxiliary losses and of its memory's moving average."""

    x_BD: Rows
    routing: Routing


class DenseLayer(nn.Module):
    """Dropout, then one linear map."""

    def __init__(self, width: int, outputs: int, dropout: float):
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.dropout = dropout

    def forward(self, x_BD: Rows, key_B: Tensor | None, routing: Routing | None = None) -> tuple[Tensor, None]:
        # Keyed like expert 0 of a routed layer.
        key_B = None if key_B is None else derive_keys(key_B, 0)
        x_BD = keyed_dropout(x_BD, key_B, self.dropout)
        if isinstance(x_BD, SparseRows):
            return x_BD.matmul(self.linear.weight.T.contiguous()) + self.linear.bias, None
        return self.linear(x_BD), None


class ExpertsLayer(nn.Module):
    """Linear experts behind a dispatcher: what all mixtures share."""

    def __init__(self, experts: StackedExperts, top_k: int, dropout: float, dispatcher: Dispatcher):
        super().__init__()
        self.experts = experts
        self.top_k, self.dropout, self.dispatcher = top_k, dropout, dispatcher

    def mix(self, x_BD: Rows, experts_Bk: Tensor, weights_Bk: Tensor, key_B: Tensor | None) -> Tensor:
        """`Σ_j a_j · Linear_{e_j}(dropout(x))`, dropout drawn per (row, expert)."""
        routed = self.dispatcher.dispatch(x_BD, experts_Bk, weights_Bk, key_B if self.dropout else None)
        rows_RD = spread_dropped(routed.rows_TD, routed.place_Tk, routed.at_R, routed.key_Tk, self.dropout)
        products_RO = self.experts(rows_RD, routed.counts_L)
        biases_LO, experts_Tk, weights_Tk = self.experts.bias_LO, routed.experts_Tk, routed.weights_Tk
        sums_TO = weighted_sums(products_RO, biases_LO, routed.place_Tk, routed.at_R, experts_Tk, weights_Tk)
        return self.dispatcher.combine(sums_TO, routed.meta)


class RoutedLayer(ExpertsLayer):
    """A mixture of linear experts, routed by a memory: `exp(t) · Σ_j stopgrad(a_j) · Linear_{e_j}(dropout(x))`.

    Without a memory of its own it takes the experts that the last layer with one chose.
    """

    def __init__(
        self,
        memory_ED: Tensor | None,
        experts: StackedExperts,
        top_k: int,
        dropout: float,
        dispatcher: Dispatcher | None = None,
        temperature: float = 1.0,
    ):
        super().__init__(experts, top_k, dropout, dispatcher or LocalDispatcher(len(experts.bias_LO)))
        self.memory_ED: Tensor | None
        self.register_buffer("memory_ED", memory_ED)
        self.log_scale = nn.Parameter(experts.bias_LO.new_zeros(()))
        self.temperature = temperature

    def forward(self, x_BD: Rows, key_B: Tensor | None, routing: Routing | None = None) -> tuple[Tensor, Trace | None]:
        trace = None
        if self.memory_ED is not None:
            routing = route(x_BD, self.memory_ED, self.top_k, self.temperature)
            trace = Trace(x_BD, routing)
        assert routing is not None, "the first layer has a memory"
        weights_Bk = self.scale * routing.weights_Bk.detach()
        return self.mix(x_BD, routing.experts_Bk, weights_Bk, key_B), trace

    @property
    def scale(self) -> Tensor:
        """The output scale, `exp(min(t, log 100))`."""
        return self.log_scale.clamp(max=MAX_LOG_SCALE).exp()


class GatedLayer(ExpertsLayer):
    """The vanilla mixture: a cosine gate on a learned projection, with noise; softmax over all experts, top-k of it.

    `y = Σ_{j in top-k} softmax(cos(x·P, G)/τ + noise/E)_j · Linear_j(dropout(x))`, τ learned (Shazeer et al., 2017;
    Chi et al., 2022).
    """

    def __init__(
        self,
        projection_DP: Tensor,
        gate_EP: Tensor,
        experts: StackedExperts,
        top_k: int,
        dropout: float,
        dispatcher: Dispatcher | None = None,
    ):
        super().__init__(experts, top_k, dropout, dispatcher or LocalDispatcher(len(gate_EP)))
        self.projection_DP, self.gate_EP = nn.Parameter(projection_DP), nn.Parameter(gate_EP)
        self.log_inverse_temperature = nn.Parameter(projection_DP.new_tensor(1 / _GATE_TEMPERATURE).log())

    def forward(self, x_BD: Rows, key_B: Tensor | None, routing: Routing | None = None) -> tuple[Tensor, Trace]:
        projected_BP = F.normalize(matmul(x_BD, self.projection_DP), dim=1)
        scale = self.log_inverse_temperature.clamp(max=MAX_LOG_SCALE).exp()
        scores_BE = projected_BP @ F.normalize(self.gate_EP, dim=1).T * scale
        num_experts = scores_BE.shape[1]
        if key_B is not None:
            noise_BE = keyed_normal(derive_keys(key_B, num_experts), num_experts, scores_BE.dtype)
            scores_BE = scores_BE + noise_BE / num_experts
        scores_Bk, experts_Bk = scores_BE.topk(self.top_k, dim=1)
        weights_Bk = scores_BE.softmax(1).gather(1, experts_Bk)
        routing = Routing(experts_Bk, weights_Bk, scores_Bk)
        return self.mix(x_BD, experts_Bk, weights_Bk, key_B), Trace(x_BD, routing)


class Student(nn.Module):
    """Layers, with norm and ReLU between them. `inputs` are the arrays of a node that make its input row."""

    def __init__(self, layers: list[nn.Module], norms: list[nn.Module], inputs: tuple[str, ...] = ("feat",)):
        super().__init__()
        self.inputs = inputs
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(norms)

    def forward(self, x_BD: Rows, key_B: Tensor | None = None) -> tuple[Tensor, list[Trace]]:
        """Logits `[B, C]`, and a trace per layer that chooses experts. `key_B` draws the dropout; None: evaluation."""
        logits_BC, _, traces = self.forward_hidden(x_BD, key_B)
        return logits_BC, traces

    def forward_hidden(self, x_BD: Rows, key_B: Tensor | None = None) -> tuple[Tensor, Rows, list[Trace]]:
        """As `forward`, and the input of the last layer `[B, H]`."""
        traces: list[Trace] = []
        before_BD, out_BO = x_BD, torch.empty(0)
        for index, layer in enumerate(self.layers):
            if index:
                before_BD = F.relu(self.norms[index - 1](out_BO))
            routing = traces[-1].routing if traces else None
            out_BO, trace = layer(before_BD, None if key_B is None else derive_keys(key_B, index), routing)
            if trace is not None:
                traces.append(trace)
        return out_BO, before_BD, traces

    @property
    def routed_layers(self) -> list[RoutedLayer]:
        return [layer for layer in self.layers if isinstance(layer, RoutedLayer)]

    @property
    def memories(self) -> list[Tensor]:
        """The routing memories `[E, D]`: one per layer, or that of the first, which then routes for all."""
        return [layer.memory_ED for layer in self.routed_layers if layer.memory_ED is not None]

    @torch.no_grad()
    def layer_inputs(self, x_BD: Rows) -> list[Rows]:
        """The input of each layer, in evaluation."""
        inputs, routing = [], None
        for index, layer in enumerate(self.layers):
            if index:
                x_BD = F.relu(self.norms[index - 1](x_BD))
            inputs.append(x_BD)
            x_BD, trace = layer(x_BD, None, routing)
            routing = trace.routing if trace else routing
        return inputs

    def set_memories(self, memories: list[Tensor]) -> None:
        """Route with these memories from now on."""
        routers = [layer for layer in self.routed_layers if layer.memory_ED is not None]
        for layer, memory in zip(routers, memories, strict=True):
            layer.memory_ED = memory


class Ensemble(Student):
    """Several students; its logits are the logarithm of their mean probabilities."""

    def __init__(self, members: list[Student]):
        super().__init__([], [])
        self.members = nn.ModuleList(members)

    def forward(self, x_BD: Rows, key_B: Tensor | None = None) -> tuple[Tensor, list[Trace]]:
        logits_MBC = torch.stack([member(x_BD, key_B)[0] for member in self.members])
        return logits_MBC.log_softmax(2).logsumexp(0) - math.log(len(self.members)), []


def make_mlp(
    num_features: int, hidden: int, num_classes: int, num_layers: int, norm: str, dropout: float, seed: int
) -> Student:
    """An MLP student (GLNN) with seeded weights, the same on every rank."""
    widths = [num_features, *[hidden] * (num_layers - 1), num_classes]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = [DenseLayer(d, o, dropout) for d, o in pairwise(widths)]
    return Student(layers, [make_norm(norm, hidden) for _ in range(num_layers - 1)])


def mlp_to_rbm(
    mlp: Student,
    memories: list[Tensor],
    top_k: int,
    dispatchers: list[Dispatcher] | None = None,
    num_local: int | None = None,
    temperature: float = 1.0,
    input_attention: bool = False,
) -> Student:
    """An RbM that computes, without dropout, what the MLP computes.

    `memories`: one `[E, D]` per layer, or one for the first layer, which then routes for all. When experts are sharded,
    `num_local` of them are here, behind `dispatchers`.
    """  # fmt: skip
    layers: list[nn.Module] = []
    assert len(memories) in (1, len(mlp.layers))
    for index, layer in enumerate(mlp.layers):
        assert isinstance(layer, DenseLayer)
        memory_ED = memories[index] if index < len(memories) else None
        local = len(memories[0]) if num_local is None else num_local
        weight_DO, bias_O = layer.linear.weight.detach().T, layer.linear.bias.detach()
        experts = StackedExperts(weight_DO.repeat(local, 1, 1), bias_O.repeat(local, 1), input_attention)
        dispatcher = dispatchers[index] if dispatchers else None
        layers.append(RoutedLayer(memory_ED, experts, top_k, layer.dropout, dispatcher, temperature))
    return Student(layers, list(mlp.norms))


@torch.no_grad()
def rbm_to_mlp(rbm: Student) -> Student:
    """The MLP with the mean of each layer's experts as its layers: what an RbM computes whose experts are all alike.

    A row's weights sum to one, so the mean of copies loses nothing; of experts that differ, it is another network.
    """
    layers: list[nn.Module] = []
    for layer in rbm.routed_layers:
        weight_DO = layer.experts.scaled_weight.mean(0) * layer.scale
        width, outputs = weight_DO.shape
        dense = DenseLayer(width, outputs, layer.dropout).to(weight_DO)
        dense.linear.weight.copy_(weight_DO.T)
        dense.linear.bias.copy_(layer.experts.bias_LO.mean(0) * layer.scale)
        layers.append(dense)
    return Student(layers, list(rbm.norms), rbm.inputs)


def make_moe(
    mlp: Student,
    num_experts: int,
    top_k: int,
    seed: int,
    dispatchers: list[Dispatcher] | None = None,
    local: range | None = None,
) -> Student:
    """A vanilla mixture of experts of the MLP's shape, with seeded weights of its own; the norms are the MLP's.

    When experts are sharded, those numbered `local` are here, behind `dispatchers`.
    """
    layers: list[nn.Module] = []
    here = slice(0, num_experts) if local is None else slice(local.start, local.stop)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for index, layer in enumerate(mlp.layers):
            assert isinstance(layer, DenseLayer)
            width, outputs = layer.linear.in_features, layer.linear.out_features
            drawn = [nn.Linear(width, outputs) for _ in range(num_experts)]
            weight_EDO = torch.stack([each.weight.detach().T for each in drawn])
            bias_EO = torch.stack([each.bias.detach() for each in drawn])
            projection_DP = nn.Linear(width, min(width, _GATE_WIDTH)).weight.detach().T.contiguous()
            gate_EP = torch.randn(num_experts, projection_DP.shape[1])
            layers.append(
                GatedLayer(
                    projection_DP,
                    gate_EP,
                    StackedExperts(weight_EDO[here], bias_EO[here]),
                    top_k,
                    layer.dropout,
                    dispatchers[index] if dispatchers else None,
                )
            )
    return Student(layers, list(mlp.norms))
