"""Every convolution a teacher may have: sampled with all neighbours, and exactly, it is PyG's on the whole graph."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import JumpingKnowledge

from rbm_dist.config.run import Config
from rbm_dist.errors import InputError
from rbm_dist.graph.csc import Csc
from rbm_dist.graph.store import GraphStore
from rbm_dist.models.gnn import Gnn
from rbm_dist.models.teacher import build_teacher
from rbm_dist.serve.artifact import save_weights
from rbm_dist.sources.source import SourceGraph
from rbm_dist.stages.local import MetricsRecorder, over_parts_here
from rbm_dist.stages.run import Run
from rbm_dist.stages.soft_labels import write_soft_labels
from tests.small_graph import small_graph, with_sparse_features, write_graph

HERE = "tests.models.test_convs"
CONVS: dict[str, dict[str, Any]] = {
    "sage": {"conv": "sage"},
    "sage, residual": {"conv": "sage", "residual": True},
    "sage, max": {"conv": "sage_max", "norm": "layer"},
    "gcn": {"conv": "gcn"},
    "gcn, residual": {"conv": "gcn", "residual": True, "norm": "layer"},
    "gat": {"conv": "gat", "heads": 2},
    "gatv2, residual": {"conv": "gatv2", "heads": 4, "residual": True},
    "sage, jumping": {"conv": "sage", "jumping_knowledge": "max"},
    "gcn, jumping": {"conv": "gcn", "jumping_knowledge": "cat", "residual": True, "norm": "layer"},
    "gat, jumping": {"conv": "gat", "heads": 2, "jumping_knowledge": "cat"},
    "PyG's own": {"conv": "torch_geometric.nn:TransformerConv", "arguments": {"heads": 2, "concat": False}},
    "one's own": {"conv": f"{HERE}:Gated", "arguments": {"slope": 0.3}},
}


class Gated(nn.Module):
    """A layer of the user's: the sum over sources, each through a gate of the destination's."""

    def __init__(self, inputs: int, outputs: int, slope: float):
        super().__init__()
        self.message, self.gate = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)
        self.slope = slope

    def forward(self, x: tuple[Tensor, Tensor] | Tensor, edge_index: Tensor) -> Tensor:
        sources, destinations = x if isinstance(x, tuple) else (x, x)
        total = sources.new_zeros(len(destinations), self.message.out_features)
        total = total.index_add(0, edge_index[1], self.message(sources)[edge_index[0]])
        return nn.functional.leaky_relu(self.gate(destinations), self.slope) * total


class Shrinks(nn.Module):
    """One that does not give what it is asked for."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs - 1)

    def forward(self, x: tuple[Tensor, Tensor], edge_index: Tensor) -> Tensor:
        return self.linear(x[1])


def config(url: Path, **teacher: Any) -> Config:
    settings = {"hidden": 8, "fanout": [-1, -1, -1], "dropout": 0.4} | teacher
    return Config.model_validate(
        {"run_dir": str(url), "teacher": settings, "soft_labels": {"batch_size": 50, "hidden": True}}
    )


def on_the_whole_graph(model: Gnn, graph: SourceGraph, jumping: str) -> tuple[np.ndarray, np.ndarray]:
    """Class probabilities and last hidden states by PyG's layers, called as they are on a whole graph."""
    csc = graph.csc
    edge_2E = torch.from_numpy(np.stack([csc.indices, np.repeat(np.arange(csc.num_nodes), np.diff(csc.indptr))])).long()
    chunks = [x.toarray() if hasattr(x, "toarray") else x for x in graph.feat_chunks()]
    x = torch.from_numpy(np.concatenate(chunks))
    states = []
    for layer, conv in enumerate(model.convs):
        out = conv(x, edge_2E)
        if layer < len(model.convs) - 1 or jumping != "none":
            out = out + model.residuals[layer](x) if len(model.residuals) else out
            out = model.norms[layer](out).relu()
        x = out
        states.append(x)
    if jumping != "none":
        assert model.head is not None
        x = model.head(JumpingKnowledge(jumping)(states))
        states.append(x)
    return x.softmax(1).numpy(), states[-2].numpy()


def directed(graph: SourceGraph) -> SourceGraph:
    """The graph without some of its edges in one direction; a node has none that lead to it."""
    csc = graph.csc
    dst = np.repeat(np.arange(csc.num_nodes), np.diff(csc.indptr))
    kept = (np.random.default_rng(6).random(csc.num_edges) < 0.6) & (dst != 11)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(dst[kept], minlength=csc.num_nodes))])
    return replace(graph, csc=Csc(indptr, csc.indices[kept]))


GRAPHS = {
    "dense": small_graph(),
    "sparse": with_sparse_features(small_graph()),
    "directed": directed(small_graph()),
}


@pytest.mark.parametrize("kind", GRAPHS)
@pytest.mark.parametrize("name", CONVS)
def test_it_is_pygs_on_the_whole_graph(tmp_path: Path, name: str, kind: str) -> None:
    graph = GRAPHS[kind]
    part_N = np.random.default_rng(2).integers(0, 3, 240).astype(np.int32)
    for inference in ("exact", "sampled"):
        url = tmp_path / inference
        store = write_graph(str(url), graph, part_N)
        settings = config(url, **CONVS[name])
        model = build_teacher(settings, store.num_features, store.num_classes).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.4)
            expected, hidden = on_the_whole_graph(model, graph, settings.teacher.jumping_knowledge)
        save_weights(f"{url}/teacher/model.safetensors", model)
        settings = settings.model_copy(
            update={"soft_labels": settings.soft_labels.model_copy(update={"inference": inference})}
        )
        write_soft_labels(Run(settings, str(url), MetricsRecorder()), over_parts_here)
        written = GraphStore.open(store.url)
        ids = np.arange(240)
        found, place = written.gather("soft", ids), written.gather("orig_id", ids)
        np.testing.assert_allclose(found, expected[place], rtol=1e-4, atol=1e-5, err_msg=inference)
        np.testing.assert_allclose(
            written.gather("hidden", ids), hidden[place], rtol=1e-4, atol=1e-5, err_msg=inference
        )
    assert expected.std() > 0.01, "it says something"


def test_seeds_decide_the_weights(tmp_path: Path) -> None:
    one, same, other = (
        build_teacher(config(tmp_path, conv="gat").model_copy(update={"seed": seed}), 12, 5).state_dict()
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"conv": "no_such_package:Conv"}, r"teacher.conv: no_such_package:Conv .*ModuleNotFoundError.*on every host$"),
        ({"conv": f"{HERE}:Missing"}, "AttributeError"),
        ({"conv": f"{HERE}:Gated"}, "TypeError: .*slope"),
        ({"conv": f"{HERE}:Shrinks"}, r"gave \[1, 7\] for one destination, expected \[1, 8\]"),
        ({"conv": "torch:zeros"}, "TypeError|not callable"),
    ],
)
def test_what_is_no_convolution_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_teacher(config(tmp_path, **settings), 12, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"conv": "gin"},
            "teacher.conv: 'gin' is none of sage, sage_max, gcn, gat, gatv2, nor of the form module:Class",
        ),
        ({"conv": "gat", "heads": 3}, "teacher.heads: 3 does not divide teacher.hidden: 8"),
        ({"conv": "gat", "arguments": {"heads": 2}}, "teacher.arguments: are for a module:Class"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)
