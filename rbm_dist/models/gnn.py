"""The teacher: GraphSAGE (Hamilton et al., 2017) with mean aggregation, on sampled neighbourhoods or layer by layer."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from rbm_dist.config.run import Config
from rbm_dist.models.norm import make_norm
from rbm_dist.moe.keyed_dropout import keyed_dropout
from rbm_dist.moe.sparse_rows import Rows, matmul
from rbm_dist.randomness.rows import derive_keys


@dataclass(frozen=True)
class Neighbourhood:
    """A sample as tensors; nodes and edges in order of the hop that found them, the seeds first."""

    node_n: Tensor  # int64 ids
    edge_2m: Tensor  # int64, rows (source, destination), positions in `node_n`
    nodes_per_hop: list[int]
    edges_per_hop: list[int]


class Gnn(nn.Module):
    """One `SAGEConv` per hop; norm, ReLU and dropout between layers."""

    def __init__(
        self, num_features: int, hidden: int, num_classes: int, num_layers: int, dropout: float, norm: str = "none"
    ):
        # Imported here: it takes seconds, and only who builds a teacher needs it.
        from torch_geometric.nn import SAGEConv

        super().__init__()
        widths = [num_features, *[hidden] * (num_layers - 1), num_classes]
        self.convs = nn.ModuleList(SAGEConv(d, o, aggr="mean") for d, o in pairwise(widths))
        self.norms = nn.ModuleList(make_norm(norm, hidden) for _ in range(num_layers - 1))
        self.dropout = dropout
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(()))  # of the logits; set by calibration

    @property
    def num_layers(self) -> int:
        return len(self.convs)

    def forward(self, feat_nF: Rows, neighbourhood: Neighbourhood, key: int | None = None) -> Tensor:
        """Logits of the seeds, `[seeds, classes]`. `key` draws the dropout; None is evaluation."""
        return self.forward_hidden(feat_nF, neighbourhood, key)[0]

    def forward_hidden(
        self, feat_nF: Rows, neighbourhood: Neighbourhood, key: int | None = None
    ) -> tuple[Tensor, Rows]:
        """As `forward`, and the seeds' states before the last layer `[seeds, H]`."""
        x: Rows = feat_nF
        hidden: Rows = feat_nF
        keys = None if key is None else derive_keys(key, neighbourhood.node_n)
        for layer in range(self.num_layers):
            hops = self.num_layers - layer
            num_dst, num_edges = sum(neighbourhood.nodes_per_hop[:hops]), sum(neighbourhood.edges_per_hop[:hops])
            layer_keys = None if keys is None else derive_keys(keys[: len(x)], layer)
            hidden = x
            x = self.layer(layer, x, num_dst, neighbourhood.edge_2m[:, :num_edges], layer_keys)
        assert isinstance(x, Tensor)
        return x, hidden[: neighbourhood.nodes_per_hop[0]]

    def layer(self, layer: int, x_sD: Rows, num_dst: int, edge_2m: Tensor, key_s: Tensor | None = None) -> Tensor:
        """One layer alone: from the states of s source nodes to the new states of the first `num_dst` of them."""
        if layer > 0:
            x_sD = keyed_dropout(x_sD, key_s, self.dropout)
        return self._after(layer, _sage_conv(self.convs[layer], x_sD, num_dst, edge_2m))

    def layer_of_means(self, layer: int, x_nD: Tensor, mean_nD: Tensor) -> Tensor:
        """As `layer`, in evaluation, of nodes whose in-neighbours' mean state is known."""
        conv: Any = self.convs[layer]
        return self._after(layer, conv.lin_l(mean_nD) + conv.lin_r(x_nD))

    def _after(self, layer: int, out_nO: Tensor) -> Tensor:
        if layer == self.num_layers - 1:
            return out_nO / self.temperature
        return self.norms[layer](out_nO).relu()


def _sage_conv(conv: Any, x_sD: Rows, num_dst: int, edge_2m: Tensor) -> Tensor:
    """`W_l · mean of in-neighbours + W_r · self + b`. A mean and a linear map commute: where it narrows, map first."""
    weight_OD = conv.lin_l.weight
    if isinstance(x_sD, Tensor) and weight_OD.shape[0] >= weight_OD.shape[1]:
        return conv((x_sD, x_sD[:num_dst]), edge_2m)
    mapped_sO = matmul(x_sD, weight_OD.T.contiguous())
    mean_nO = conv.aggr_module(mapped_sO[edge_2m[0]], edge_2m[1], dim_size=num_dst)
    return mean_nO + conv.lin_l.bias + matmul(x_sD[:num_dst], conv.lin_r.weight.T.contiguous())


def init_gnn(
    num_features: int, hidden: int, num_classes: int, num_layers: int, dropout: float, seed: int, norm: str = "none"
) -> Gnn:
    """A teacher with seeded weights, the same on every rank, without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Gnn(num_features, hidden, num_classes, num_layers, dropout, norm)


def build_teacher(config: Config, num_features: int, num_classes: int) -> Gnn:
    """The untrained teacher of a configuration; equal on every rank."""
    teacher = config.teacher
    return init_gnn(
        num_features, teacher.hidden, num_classes, len(teacher.fanout), teacher.dropout, config.seed, teacher.norm
    )
