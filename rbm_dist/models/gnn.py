"""The teacher: convolutions of PyG, first of all GraphSAGE's (Hamilton et al., 2017), on samples or layer by layer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rbm_dist.config.teacher import GCN, MEAN
from rbm_dist.errors import InputError
from rbm_dist.models.norm import make_norm
from rbm_dist.moe.keyed_dropout import keyed_dropout
from rbm_dist.moe.sparse_rows import Rows, dense, matmul
from rbm_dist.randomness.rows import derive_keys

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Neighbourhood:
    """A sample as tensors; nodes and edges in order of the hop that found them, the seeds first."""

    node_n: Tensor  # int64 ids
    edge_2m: Tensor  # int64, rows (source, destination), positions in `node_n`
    nodes_per_hop: list[int]
    edges_per_hop: list[int]
    degree_n: Tensor | None = None  # float32, in-neighbours of each node in the whole graph; for the convolution `GCN`


class Gnn(nn.Module):
    """A convolution per hop; norm, ReLU and dropout between layers.

    With `residual`, inner layers add their input, mapped where widths differ. See `make_conv` for `conv`. With
    `jumping`, max or cat, all layers are inner ones, and the head tells classes from all their states.
    """

    def __init__(
        self, num_features: int, hidden: int, num_classes: int, num_layers: int, dropout: float, norm: str = "none",
        conv: str = MEAN, arguments: Mapping[str, Any] | None = None, residual: bool = False, jumping: str = "none",
    ):  # fmt: skip
        super().__init__()
        self.num_inner = num_layers - (jumping == "none")  # layers that are followed by norm and ReLU
        widths = list(pairwise([num_features, *[hidden] * self.num_inner, num_classes]))[:num_layers]
        self.convs = nn.ModuleList(
            make_conv(conv, d, o, at == self.num_inner, arguments or {}) for at, (d, o) in enumerate(widths)
        )
        self.norms = nn.ModuleList(make_norm(norm, hidden) for _ in range(self.num_inner))
        self._jumping, joined = jumping, hidden * (num_layers if jumping == "cat" else 1)
        self.head = None if jumping == "none" else nn.Linear(joined, num_classes)
        inner = widths[: self.num_inner] if residual else []
        self.residuals = nn.ModuleList(nn.Identity() if d == o else nn.Linear(d, o, bias=False) for d, o in inner)
        self.dropout, self._averages, self.reads_degrees = dropout, conv == MEAN, conv == GCN
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
        """As `forward`, and the seeds' last hidden states `[seeds, H]`."""
        x: Rows = feat_nF
        hidden: Rows = feat_nF
        seeds, states_nH = neighbourhood.nodes_per_hop[0], []
        keys = None if key is None else derive_keys(key, neighbourhood.node_n)
        for layer in range(self.num_layers):
            hops = self.num_layers - layer
            num_dst, num_edges = sum(neighbourhood.nodes_per_hop[:hops]), sum(neighbourhood.edges_per_hop[:hops])
            layer_keys = None if keys is None else derive_keys(keys[: len(x)], layer)
            hidden = x
            edge_2m, degree_n = neighbourhood.edge_2m[:, :num_edges], neighbourhood.degree_n
            x = self.layer(layer, x, num_dst, edge_2m, degree_n, layer_keys)
            if self.head is not None:
                states_nH.append(x[:seeds].clone())  # a view would keep the states of all nodes
        if self.head is not None:
            head_keys = None if keys is None else derive_keys(keys[:seeds], self.num_layers)
            return self.jumped(states_nH, head_keys), states_nH[-1]
        assert isinstance(x, Tensor)
        return x, hidden[:seeds]

    def jumped(self, states_nH: list[Tensor], key_n: Tensor | None = None) -> Tensor:
        """Logits `[n, classes]` of nodes whose states after each layer are known, with jumping knowledge."""
        joined = torch.cat(states_nH, 1) if self._jumping == "cat" else torch.stack(states_nH).amax(0)
        assert self.head is not None
        logits_nC: Tensor = self.head(keyed_dropout(joined, key_n, self.dropout))
        return logits_nC / self.temperature

    def layer(
        self, layer: int, x_sD: Rows, num_dst: int, edge_2m: Tensor, degree_s: Tensor | None = None,
        key_s: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """One layer alone: from the states of s source nodes to the new states of the first `num_dst` of them.

        degree_s: in-degrees of the sources, of more nodes if need be; see `Neighbourhood`.
        """
        if layer > 0:
            x_sD = keyed_dropout(x_sD, key_s, self.dropout)
        if self._averages:
            out_nO = _sage_conv(self.convs[layer], x_sD, num_dst, edge_2m)
        elif self.reads_degrees:
            assert degree_s is not None
            out_nO = _gcn_conv(self.convs[layer], x_sD, num_dst, edge_2m, degree_s[: len(x_sD)])
        else:
            x_sD = dense(x_sD)
            out_nO = self.convs[layer]((x_sD, x_sD[:num_dst]), edge_2m)
        return self._after(layer, out_nO, x_sD[:num_dst])

    def layer_of_means(self, layer: int, x_nD: Tensor, mean_nD: Tensor) -> Tensor:
        """As `layer`, in evaluation, of nodes whose in-neighbours' mean state is known; of the convolution `MEAN`."""
        conv: Any = self.convs[layer]
        return self._after(layer, conv.lin_l(mean_nD) + conv.lin_r(x_nD), x_nD)

    def _after(self, layer: int, out_nO: Tensor, x_nD: Rows) -> Tensor:
        if layer == self.num_inner:
            return out_nO / self.temperature
        if self.residuals:
            mapped = self.residuals[layer]
            out_nO = out_nO + (
                matmul(x_nD, mapped.weight.T.contiguous()) if isinstance(mapped, nn.Linear) else dense(x_nD)
            )
        return self.norms[layer](out_nO).relu()


def _sage_conv(conv: Any, x_sD: Rows, num_dst: int, edge_2m: Tensor) -> Tensor:
    """`W_l · mean of in-neighbours + W_r · self + b`. A mean and a linear map commute: where it narrows, map first."""
    weight_OD = conv.lin_l.weight
    if isinstance(x_sD, Tensor) and weight_OD.shape[0] >= weight_OD.shape[1]:
        return conv((x_sD, x_sD[:num_dst]), edge_2m)
    mapped_sO = matmul(x_sD, weight_OD.T.contiguous())
    mean_nO = conv.aggr_module(mapped_sO[edge_2m[0]], edge_2m[1], dim_size=num_dst)
    return mean_nO + conv.lin_l.bias + matmul(x_sD[:num_dst], conv.lin_r.weight.T.contiguous())


def _gcn_conv(conv: Any, x_sD: Rows, num_dst: int, edge_2m: Tensor, degree_s: Tensor) -> Tensor:
    """`W · (Σ_j x_j / √(d̃_i d̃_j) + x_i / d̃_i) + b`, d̃ = 1 + in-degree in the whole graph (Kipf & Welling, 2017).

    The sum is in-degree times the mean over the sampled sources: what a sample gives is right on average.
    """
    root_s1 = (1 + degree_s).rsqrt()[:, None]
    scaled_sO = root_s1 * matmul(x_sD, conv.lin.weight.T.contiguous())
    sum_nO = scaled_sO.new_zeros(num_dst, scaled_sO.shape[1]).index_add(0, edge_2m[1], scaled_sO[edge_2m[0]])
    drawn_n = torch.bincount(edge_2m[1], minlength=num_dst).clamp(min=1)
    stands_for_n1 = (degree_s[:num_dst] / drawn_n)[:, None]
    return root_s1[:num_dst] * (stands_for_n1 * sum_nO + scaled_sO[:num_dst]) + conv.bias


def make_conv(name: str, inputs: int, outputs: int, last: bool, arguments: Mapping[str, Any]) -> nn.Module:
    """A layer that is called as PyG's are on bipartite graphs: `conv((x_sources, x_destinations), edge_index)`.

    name: one of `CONVS`, or `module:Class` for `Class(inputs, outputs, **arguments)`. Heads of `gat` and `gatv2` are
    joined, those of the last layer averaged. Raises `InputError` for a class that is not there or is another thing.
    """
    # Imported here: it takes seconds, and only who builds a teacher needs it.
    from torch_geometric.nn import GATConv, GATv2Conv, GCNConv, SAGEConv

    if name in ("sage", "sage_max"):
        return SAGEConv(inputs, outputs, aggr="max" if name == "sage_max" else "mean")
    if name == GCN:
        return GCNConv(inputs, outputs)
    if name in ("gat", "gatv2"):
        heads = arguments["heads"]
        kind = GATConv if name == "gat" else GATv2Conv
        return kind(inputs, outputs if last else outputs // heads, heads=heads, concat=not last)
    module, _, attribute = name.partition(":")
    try:
        conv = getattr(import_module(module), attribute)(inputs, outputs, **arguments)
        of_two = conv((torch.zeros(2, inputs), torch.zeros(1, inputs)), torch.tensor([[0, 1], [0, 0]]))
        shape = [*of_two.shape]
    except Exception as error:  # whatever a class of the user's raises
        raise InputError(
            f"teacher.conv: {name} with {inputs} inputs, {outputs} outputs and teacher.arguments, called on two "
            f"sources and one destination: {type(error).__name__}: {error}. Its module must be importable on every host"
        ) from None
    if shape != [1, outputs]:
        raise InputError(f"teacher.conv: {name}: gave {shape} for one destination, expected [1, {outputs}]")
    return conv


def seeded(seed: int, make: Callable[[], Model]) -> Model:
    """A model with weights that the seed decides, the same on every rank, without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
