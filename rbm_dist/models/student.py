"""The students: a stack of layers with norm and ReLU between them, each layer dense (MLP) or routed (RbM).

An RbM begins as an MLP. `mlp_to_rbm` turns the one into the other without changing what it computes: every expert
starts as a copy of the dense layer, the weights of a row's experts sum to one, and the output scale exp(t) starts at 1.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rbm_dist.models.norm import make_norm
from rbm_dist.moe.dispatch import Dispatcher, LocalDispatcher
from rbm_dist.moe.experts import StackedExperts
from rbm_dist.moe.keyed_dropout import derive_keys, keyed_dropout
from rbm_dist.moe.routing import Routing, route

_MAX_LOG_SCALE = math.log(100)


@dataclass(frozen=True)
class Trace:
    """What a routed layer saw: the inputs of its auxiliary losses and of its memory's moving average."""

    x_BD: Tensor
    routing: Routing


class DenseLayer(nn.Module):
    """Dropout, then one linear map."""

    def __init__(self, width: int, outputs: int, dropout: float):
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.dropout = dropout

    def forward(self, x_BD: Tensor, key_B: Tensor | None) -> tuple[Tensor, None]:
        # Keyed like expert 0 of a routed layer.
        key_B = None if key_B is None else derive_keys(key_B, 0)
        return self.linear(keyed_dropout(x_BD, key_B, self.dropout)), None


class RoutedLayer(nn.Module):
    """A mixture of linear experts, routed by a memory: `exp(t) · Σ_j stopgrad(a_j) · Linear_{e_j}(dropout(x))`."""

    def __init__(
        self,
        memory_ED: Tensor,
        experts: StackedExperts,
        top_k: int,
        dropout: float,
        dispatcher: Dispatcher | None = None,
    ):
        super().__init__()
        self.memory_ED: Tensor
        self.register_buffer("memory_ED", memory_ED)
        self.experts = experts
        self.log_scale = nn.Parameter(memory_ED.new_zeros(()))
        self.top_k, self.dropout = top_k, dropout
        self.dispatcher = dispatcher or LocalDispatcher(len(memory_ED))

    def forward(self, x_BD: Tensor, key_B: Tensor | None) -> tuple[Tensor, Trace]:
        routing = route(x_BD, self.memory_ED, self.top_k)
        routed = self.dispatcher.dispatch(x_BD, routing.experts_Bk, routing.weights_Bk.detach(), key_B)
        key_R = None if routed.key_R is None else derive_keys(routed.key_R, routed.expert_R)
        outputs_RO = self.experts(keyed_dropout(routed.rows_RD, key_R, self.dropout), routed.counts_L)
        return self.scale * self.dispatcher.combine(outputs_RO, routed.meta), Trace(x_BD, routing)

    @property
    def scale(self) -> Tensor:
        """The output scale, `exp(min(t, log 100))`."""
        return self.log_scale.clamp(max=_MAX_LOG_SCALE).exp()


class Student(nn.Module):
    """Layers, with norm and ReLU between them."""

    def __init__(self, layers: list[nn.Module], norms: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norms = nn.ModuleList(norms)

    def forward(self, x_BD: Tensor, key_B: Tensor | None = None) -> tuple[Tensor, list[Trace]]:
        """Logits `[B, C]`, and a trace per routed layer. `key_B` draws the dropout; None is evaluation."""
        traces = []
        for index, layer in enumerate(self.layers):
            if index:
                x_BD = F.relu(self.norms[index - 1](x_BD))
            x_BD, trace = layer(x_BD, None if key_B is None else derive_keys(key_B, index))
            if trace is not None:
                traces.append(trace)
        return x_BD, traces

    @property
    def routed_layers(self) -> list[RoutedLayer]:
        return [layer for layer in self.layers if isinstance(layer, RoutedLayer)]

    @torch.no_grad()
    def layer_inputs(self, x_BD: Tensor) -> list[Tensor]:
        """The input of each layer, in evaluation."""
        inputs = []
        for index, layer in enumerate(self.layers):
            if index:
                x_BD = F.relu(self.norms[index - 1](x_BD))
            inputs.append(x_BD)
            x_BD, _ = layer(x_BD, None)
        return inputs

    def set_memories(self, memories: list[Tensor]) -> None:
        """Route with these memories from now on."""
        for layer, memory in zip(self.routed_layers, memories, strict=True):
            layer.memory_ED = memory


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
) -> Student:
    """An RbM that computes, without dropout, what the MLP computes.

    `memories`: one `[E, D]` per layer. When experts are sharded, `num_local` of them are here, behind `dispatchers`.
    """  # fmt: skip
    layers: list[nn.Module] = []
    for index, (dense, memory_ED) in enumerate(zip(mlp.layers, memories, strict=True)):
        assert isinstance(dense, DenseLayer)
        local = len(memory_ED) if num_local is None else num_local
        weight_DO, bias_O = dense.linear.weight.detach().T, dense.linear.bias.detach()
        experts = StackedExperts(weight_DO.repeat(local, 1, 1), bias_O.repeat(local, 1))
        layers.append(
            RoutedLayer(memory_ED, experts, top_k, dense.dropout, dispatchers[index] if dispatchers else None)
        )
    return Student(layers, list(mlp.norms))
