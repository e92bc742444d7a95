"""The teacher against the dense formula, and its layer-by-layer form."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from rbm_dist.graph.sampler import NumbaSampler
from rbm_dist.models.gnn import Gnn, Neighbourhood, seeded
from tests.small_graph import small_graph


def neighbourhood(sampler: NumbaSampler, seeds: np.ndarray, fanout: tuple[int, ...]) -> Neighbourhood:
    sample = sampler.sample(seeds, fanout, 0)
    edges = torch.from_numpy(np.stack([sample.src, sample.dst]))
    return Neighbourhood(torch.from_numpy(sample.nodes), edges, sample.nodes_per_hop, sample.edges_per_hop)


@pytest.fixture(scope="module")
def graph() -> tuple[NumbaSampler, torch.Tensor, sp.csr_array]:
    source = small_graph()
    csc, feat = source.csc, next(source.feat_chunks())
    mean = sp.csr_array((np.ones(csc.num_edges), csc.indices, csc.indptr), shape=(csc.num_nodes, csc.num_nodes))
    mean = sp.diags_array(1 / np.maximum(np.diff(csc.indptr), 1)) @ mean  # row: destination
    return NumbaSampler({0: csc}, np.array([0, csc.num_nodes])), torch.from_numpy(feat), mean


def make_model(norm: str) -> Gnn:
    """A teacher whose norm is not at its start."""
    model = seeded(0, lambda: Gnn(12, 16, 5, num_layers=2, dropout=0.5, norm=norm)).eval()
    rng = torch.Generator().manual_seed(1)
    for tensor in model.norms.parameters():
        tensor.data = torch.rand(tensor.shape, generator=rng) + 0.5
    return model


def normalised(model: Gnn, norm: str, x: np.ndarray) -> np.ndarray:
    if norm == "none":
        return x
    state = {name: tensor.detach().numpy() for name, tensor in model.norms[0].state_dict().items()}
    x = (x - x.mean(axis=1, keepdims=True)) / np.sqrt(x.var(axis=1, keepdims=True) + 1e-5)
    return x * state["weight"] + state["bias"]


def dense_layer(model: Gnn, layer: int, x: np.ndarray, mean: sp.csr_array, norm: str) -> np.ndarray:
    conv = model.convs[layer]
    out = (mean @ x) @ conv.lin_l.weight.detach().numpy().T + conv.lin_l.bias.detach().numpy()
    out = out + x @ conv.lin_r.weight.detach().numpy().T
    return out if layer == model.num_layers - 1 else np.maximum(normalised(model, norm, out), 0)


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_all_neighbours_give_the_dense_formula(
    graph: tuple[NumbaSampler, torch.Tensor, sp.csr_array], norm: str
) -> None:
    sampler, feat, mean = graph
    model = make_model(norm)
    x = feat.numpy()
    for layer in range(2):
        x = dense_layer(model, layer, x, mean, norm)
    seeds = np.array([3, 100, 7, 239])
    hood = neighbourhood(sampler, seeds, (-1, -1))
    with torch.no_grad():
        np.testing.assert_allclose(model(feat[hood.node_n], hood), x[seeds], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_layer_by_layer(graph: tuple[NumbaSampler, torch.Tensor, sp.csr_array], norm: str) -> None:
    sampler, feat, mean = graph
    model = make_model(norm)
    seeds = np.array([5, 6, 200])
    hood = neighbourhood(sampler, seeds, (-1,))
    with torch.no_grad():
        out = model.layer(0, feat[hood.node_n], len(seeds), hood.edge_2m)
    np.testing.assert_allclose(out, dense_layer(model, 0, feat.numpy(), mean, norm)[seeds], rtol=1e-4, atol=1e-5)


def test_samples_of_a_gcn_are_right_on_average() -> None:
    csc, feat = small_graph().csc, torch.from_numpy(next(small_graph().feat_chunks()))
    model = seeded(0, lambda: Gnn(12, 16, 5, num_layers=1, dropout=0, conv="gcn")).eval()
    sampler = NumbaSampler({0: csc}, np.array([0, csc.num_nodes]))
    degree, seeds, found = torch.from_numpy(np.diff(csc.indptr)).float(), np.arange(40), []
    dst = np.repeat(np.arange(csc.num_nodes), np.diff(csc.indptr))
    with torch.no_grad():
        whole = model.convs[0](feat, torch.from_numpy(np.stack([csc.indices, dst])).long())[seeds]
        for key in range(400):
            sample = sampler.sample(seeds, (3,), key)
            edges = torch.from_numpy(np.stack([sample.src, sample.dst]))
            found.append(model.layer(0, feat[sample.nodes], len(seeds), edges, degree[sample.nodes]))
    error = (torch.stack(found) - whole).numpy()
    assert np.abs(error.mean(0)).max() < 5 * error.std(0).max() / 400**0.5
    assert error.std(0).mean() > 0.05
