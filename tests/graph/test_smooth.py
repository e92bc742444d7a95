"""Smoothed soft labels against the formulas as dense matrices and against PyG; whom labels reach, and what is left."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.nn import APPNP

from rbm_dist import storage
from rbm_dist.config.run import SoftLabelsConfig
from rbm_dist.config.source import NpzConfig
from rbm_dist.graph.encodings import Step, fill
from rbm_dist.graph.smooth import ARRAYS, UNSMOOTHED, smooth
from rbm_dist.graph.soft_rows import decode, encode
from rbm_dist.graph.splits import TRAIN, UNSEEN
from rbm_dist.graph.store import GraphStore
from rbm_dist.sources import source
from rbm_dist.sources.source import SourceGraph, hide_unseen
from tests.graph.test_encodings import adjacency, by_input, isolate, with_adjacency
from tests.small_graph import small_graph, write_graph

ISOLATED = 7
METHODS = ["appnp", "correct_and_smooth"]


def undirected() -> SourceGraph:
    graph = isolate(small_graph(), ISOLATED)
    split = graph.split.copy()
    split[ISOLATED] = TRAIN
    return hide_unseen(replace(graph, split=split), 0.3, 5)


def directed() -> SourceGraph:
    """Half of the edges in one direction, among them edges between unseen nodes."""
    graph = undirected()
    unseen = graph.split == UNSEEN
    adj = adjacency(isolate(small_graph(seed=2), ISOLATED)) * (np.random.default_rng(4).random((240, 240)) < 0.5)
    adj *= ~(unseen[None, :] & ~unseen[:, None])
    assert adj[np.ix_(unseen, unseen)].any()
    return with_adjacency(graph, adj)


GRAPHS = {"undirected": undirected(), "directed": directed()}


def teacher(graph: SourceGraph, seed: int = 0) -> np.ndarray:
    """Distributions that lean towards the label, `[N, C]` float32, by the input's ids."""
    logits = np.random.default_rng(seed).normal(size=(graph.csc.num_nodes, graph.num_classes))
    logits[np.arange(len(logits)), graph.label] += 1.5
    return (np.exp(logits) / np.exp(logits).sum(1, keepdims=True)).astype(np.float32)


def settings(store: str = "float32", **smoothing: Any) -> SoftLabelsConfig:
    return SoftLabelsConfig.model_validate({"smooth": smoothing, "store": store, "top_m": 3})


def store_of(url: Path, graph: SourceGraph, said: np.ndarray, num_parts: int = 3) -> GraphStore:
    part_N = np.random.default_rng(num_parts).integers(0, num_parts, graph.csc.num_nodes)
    store = write_graph(str(url), graph, part_N.astype(np.int32))
    files = []
    for part in range(num_parts):
        rows = said[store.gather("orig_id", store.ids(part))]
        files.append(store.write_part(UNSMOOTHED, part, rows.dtype, rows.shape[1:], [rows]))
    store.publish(UNSMOOTHED, files)
    return store


def smoothed(
    url: Path, graph: SourceGraph, said: np.ndarray, config: SoftLabelsConfig, num_parts: int = 3
) -> np.ndarray:
    """The array `soft`, by the input's ids."""
    store = store_of(url, graph, said, num_parts)
    smooth(store, config)
    return by_input(store, "soft")


def dense(graph: SourceGraph, said: np.ndarray, method: str, steps: int, damping: float) -> np.ndarray:
    """The papers' formulas, `S = D^-½ A D^-½` of observed sources; with labels, training nodes keep the teacher's."""
    adj = adjacency(graph) * (graph.split != UNSEEN)[None, :]
    scale = np.maximum(adj.sum(1), 1) ** -0.5
    s, z, train = scale[:, None] * adj * scale[None, :], said.astype(np.float64), graph.split == TRAIN
    start = z.copy()
    if method == "correct_and_smooth":
        y = np.eye(graph.num_classes)[graph.label]
        error = np.where(train[:, None], y - z, 0)
        for _ in range(steps):
            error = np.where(train[:, None], y - z, s @ error)
        start = np.maximum(z + error, 0)
        start = np.where(train[:, None], y, start / start.sum(1, keepdims=True))
    x = start
    for _ in range(steps):
        x = damping * s @ x + (1 - damping) * start
    x = x / x.sum(1, keepdims=True)
    return np.where(train[:, None], z, x) if method == "correct_and_smooth" else x


@pytest.mark.parametrize(("steps", "damping"), [(1, 0.5), (2, 0.8), (10, 0.9), (3, 0.0)])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", GRAPHS)
def test_they_are_the_dense_formulas(tmp_path: Path, kind: str, method: str, steps: int, damping: float) -> None:
    graph = GRAPHS[kind]
    said = teacher(graph)
    found = smoothed(tmp_path, graph, said, settings(method=method, steps=steps, damping=damping))
    np.testing.assert_allclose(found, dense(graph, said, method, steps, damping), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[ISOLATED], said[ISOLATED], rtol=1e-5)


def test_on_a_real_graph_they_are_those_of_pyg(tmp_path: Path, data_dir: Path) -> None:
    graph = source.read(NpzConfig(kind="npz", path=str(data_dir / "cora.npz")), 0)
    said = teacher(graph)
    found = smoothed(tmp_path, graph, said, settings(method="appnp", damping=0.7), num_parts=4)
    dst = np.repeat(np.arange(graph.csc.num_nodes), np.diff(graph.csc.indptr))
    edges = torch.from_numpy(np.stack([graph.csc.indices.astype(np.int64), dst]))
    expected = APPNP(K=10, alpha=0.3, add_self_loops=False)(torch.from_numpy(said).double(), edges).numpy()
    np.testing.assert_allclose(found, expected / expected.sum(1, keepdims=True), rtol=1e-4, atol=1e-6)
    assert np.abs(found - said).mean() > 0.05


@pytest.mark.parametrize("method", METHODS)
def test_labels_of_training_nodes_alone_and_unseen_nodes_reach_nobody(tmp_path: Path, method: str) -> None:
    graph, config = GRAPHS["directed"], settings(method=method)
    said, train, unseen = teacher(graph), graph.split == TRAIN, graph.split == UNSEEN
    before = smoothed(tmp_path / "before", graph, said, config)
    other = (graph.label + 1) % graph.num_classes
    after = smoothed(tmp_path / "others", replace(graph, label=np.where(train, graph.label, other)), said, config)
    np.testing.assert_array_equal(after, before, err_msg="labels that are evaluated change nothing")
    after = smoothed(tmp_path / "train", replace(graph, label=np.where(train, other, graph.label)), said, config)
    assert np.any(after != before) == (method == "correct_and_smooth")
    np.testing.assert_array_equal(after[train], before[train], err_msg="nor does a label reach its own node")
    node = np.flatnonzero(unseen)[adjacency(graph)[:, unseen].any(0)][0]  # leads to another
    changed = said.copy()
    changed[node] = np.roll(changed[node], 1)
    after = smoothed(tmp_path / "unseen", graph, changed, config)
    assert np.flatnonzero((after != before).any(1)).tolist() == [node]


@pytest.mark.parametrize("store", ["float16", "top_m"])
def test_stored_in_fewer_bytes(tmp_path: Path, store: str) -> None:
    graph = GRAPHS["undirected"]
    whole = smoothed(tmp_path / "whole", graph, teacher(graph), settings(method="appnp"), 1)
    found = smoothed(tmp_path / store, graph, teacher(graph), settings(store, method="appnp"), 1)
    np.testing.assert_array_equal(found, decode(encode(whole, store, 3), graph.num_classes))


@pytest.mark.parametrize("method", METHODS)
def test_cut_off_at_any_step_it_goes_on_with_few_arrays_at_a_time(tmp_path: Path, method: str) -> None:
    graph, config = GRAPHS["undirected"], settings(method=method, steps=4)
    expected = smoothed(tmp_path / "whole", graph, teacher(graph), config)
    store, made = store_of(tmp_path / "cut", graph, teacher(graph)), []

    def cut_off(step: Step) -> list[storage.FileInfo]:
        if len(made) % 3 == 2:
            made.append("")
            fill(step, store, [1])  # a part is there, the index is not
            raise RuntimeError("cut off")
        made.append(step.name)
        infos = fill(step, store, range(store.num_parts))
        there = {path.stem for path in (tmp_path / "cut" / "graph" / "part-00000").glob("*.npy")}
        assert len(there & {UNSMOOTHED, *made}) <= 4
        return infos

    while True:
        try:
            smooth(store, config, cut_off)
            break
        except RuntimeError:
            continue
    names = [name for name in made if name]
    assert len(set(names)) == len(names) == (5 if method == "appnp" else 10), "nothing is made twice"
    np.testing.assert_array_equal(by_input(store, "soft"), expected)
    store.remove_matching(ARRAYS)
    there = {path.name for path in (tmp_path / "cut" / "graph").rglob("*.npy")}
    assert not [name for name in there if name.startswith(("smooth", "residual", UNSMOOTHED))]
    assert "soft.npy" in there
