"""Encodings against dense power iterations in float64; what they must not depend on; and what is left of a cut-off."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from rbm_dist.config.run import EncodingsConfig
from rbm_dist.config.source import NpzConfig
from rbm_dist.graph.csc import Csc
from rbm_dist.graph.encodings import Step, arrays, encode, encode_in_process, fill
from rbm_dist.graph.splits import NO_SPLIT, TEST, TRAIN, UNSEEN, VAL
from rbm_dist.graph.store import GraphStore
from rbm_dist.randomness.bits import key
from rbm_dist.sources import source
from rbm_dist.sources.source import SourceGraph, hide_unseen
from tests.small_graph import small_graph, write_graph

SEED = 5
FASTRP = EncodingsConfig(positional="fastrp", positional_dim=24)
DEEPWALK = EncodingsConfig(positional="deepwalk", positional_dim=16)
LABELS = EncodingsConfig(label_propagation=True)
ALL = [pytest.param(FASTRP, id="fastrp"), pytest.param(DEEPWALK, id="deepwalk"), pytest.param(LABELS, id="labels")]


def isolate(graph: SourceGraph, node: int) -> SourceGraph:
    """The graph without the edges of a node."""
    adj = adjacency(graph)
    adj[node] = adj[:, node] = 0
    return with_adjacency(graph, adj)


def adjacency(graph: SourceGraph) -> np.ndarray:
    """`[N, N]` float64, 1 where the column's node is an in-neighbour of the row's."""
    adj = np.zeros((graph.csc.num_nodes, graph.csc.num_nodes))
    for node in range(graph.csc.num_nodes):
        adj[node, graph.csc.indices[graph.csc.indptr[node] : graph.csc.indptr[node + 1]]] = 1
    return adj


def with_adjacency(graph: SourceGraph, adj: np.ndarray) -> SourceGraph:
    indptr = np.concatenate([[0], np.cumsum(adj.sum(1))]).astype(np.int64)
    return replace(graph, csc=Csc(indptr, np.nonzero(adj)[1].astype(np.int32)))


def transition(graph: SourceGraph) -> np.ndarray:
    adj = adjacency(graph)
    return adj / np.maximum(adj.sum(1, keepdims=True), 1)


def scaled(x: np.ndarray, order: int) -> np.ndarray:
    size = np.linalg.norm(x, ord=order, axis=1, keepdims=True)
    return x / np.where(size > 0, size, 1)


def encoded(url: Path, graph: SourceGraph, config: EncodingsConfig, num_parts: int = 3) -> np.ndarray:
    """The one configured array, by the input's ids."""
    part_N = np.random.default_rng(num_parts).integers(0, num_parts, graph.csc.num_nodes)
    store = write_graph(str(url), graph, part_N.astype(np.int32))
    encode_in_process(store, config, SEED)
    return by_input(store, arrays(config)[0])


def by_input(store: GraphStore, name: str) -> np.ndarray:
    ids = np.arange(store.num_nodes)
    return store.gather(name, ids)[np.argsort(store.gather("orig_id", ids))]


@pytest.mark.parametrize("hops", [1, 2, 3, 5])
def test_fastrp_is_the_dense_power_iteration(tmp_path: Path, hops: int) -> None:
    graph = isolate(small_graph(), 7)
    num_nodes, dim = graph.csc.num_nodes, FASTRP.positional_dim
    drawn = [[key(SEED, 0xE0, node, column) % 6 for column in range(dim)] for node in range(num_nodes)]
    h = np.array([3**0.5, -(3**0.5), 0, 0, 0, 0])[np.array(drawn)]
    assert np.mean(h != 0) == pytest.approx(1 / 3, abs=0.02)
    assert abs(h.mean()) < 0.05
    states = []
    for _ in range(hops):
        h = scaled(transition(graph) @ h, 2)
        states.append(h)
    summed = states[2:] or states[-1:]
    found = encoded(tmp_path, graph, FASTRP.model_copy(update={"hops": hops}))
    np.testing.assert_allclose(found, scaled(sum(summed), 2), rtol=1e-4, atol=1e-5)
    assert found.dtype == np.float32
    assert not found[7].any()
    np.testing.assert_allclose(np.linalg.norm(np.delete(found, 7, 0), axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(("damping", "iterations", "folds"), [(0.9, 10, 5), (0.5, 1, 2), (0.0, 3, 4)])
def test_labels_are_propagated_as_in_dense_power_iterations(
    tmp_path: Path, damping: float, iterations: int, folds: int
) -> None:
    graph = isolate(small_graph(), 7)
    fold = np.array([key(SEED, 0xE1, node) % folds for node in range(graph.csc.num_nodes)])
    expected = np.zeros((graph.csc.num_nodes, graph.num_classes))
    for left_out in [*range(folds), None]:
        y = np.eye(graph.num_classes)[graph.label] * ((graph.split == TRAIN) & (fold != left_out))[:, None]
        f = y
        for _ in range(iterations):
            f = damping * transition(graph) @ f + (1 - damping) * y
        own = graph.split != TRAIN if left_out is None else (graph.split == TRAIN) & (fold == left_out)
        expected[own] = f[own]
    settings = {"damping": damping, "iterations": iterations, "folds": folds}
    found = encoded(tmp_path, graph, LABELS.model_copy(update=settings))
    np.testing.assert_allclose(found, scaled(expected, 1), rtol=1e-4, atol=1e-6)
    assert not found[7].any()
    sums = found.sum(1)
    np.testing.assert_allclose(sums[sums > 0], 1, rtol=1e-5)


def test_no_label_leaks(tmp_path: Path) -> None:
    graph = hide_unseen(small_graph(), 0.3, SEED)
    before = encoded(tmp_path / "before", graph, LABELS)
    rng = np.random.default_rng(0)
    hidden = graph.split != TRAIN
    label = np.where(hidden, rng.permutation(graph.label), graph.label)
    assert np.any(label != graph.label)
    after = encoded(tmp_path / "others", replace(graph, label=label), LABELS)
    np.testing.assert_array_equal(after, before, err_msg="labels of val, test and unseen nodes change nothing")
    for node in rng.choice(np.flatnonzero(~hidden), 4, replace=False):
        label = graph.label.copy()
        label[node] = (label[node] + 1) % graph.num_classes
        after = encoded(tmp_path / str(node), replace(graph, label=label), LABELS)
        np.testing.assert_array_equal(after[node], before[node], err_msg="a node's own label does not reach it")
        assert np.any(after != before), "but others"


@pytest.mark.parametrize("config", ALL)
def test_the_partition_changes_nothing(tmp_path: Path, config: EncodingsConfig) -> None:
    graph = hide_unseen(small_graph(), 0.3, SEED)
    whole = encoded(tmp_path / "whole", graph, config, num_parts=1)
    for num_parts in (2, 5):
        cut = encoded(tmp_path / str(num_parts), graph, config, num_parts)
        np.testing.assert_allclose(cut, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", ALL)
def test_the_seed_decides(tmp_path: Path, config: EncodingsConfig) -> None:
    stores = [write_graph(f"{tmp_path}/{i}", small_graph(), np.zeros(240, np.int32)) for i in range(3)]
    first, again, other = (
        (encode_in_process(store, config, seed), by_input(store, arrays(config)[0]))[1]
        for store, seed in zip(stores, (1, 1, 2), strict=True)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


@pytest.mark.parametrize("config", ALL)
def test_unseen_nodes_change_nothing_and_get_the_mean_of_their_observed_neighbours(
    tmp_path: Path, config: EncodingsConfig
) -> None:
    graph = hide_unseen(small_graph(), 0.5, SEED)
    unseen = graph.split == UNSEEN
    # One that only unseen nodes point to, one that none points to.
    adj = adjacency(graph)
    alone, none = np.flatnonzero(unseen)[:2]
    adj[alone, ~unseen] = 0
    adj[alone, none] = 1
    adj[none] = 0
    graph = with_adjacency(graph, adj)
    found = encoded(tmp_path / "all", graph, config)
    kept = np.flatnonzero(~unseen)
    observed = replace(
        with_adjacency(graph, adj[np.ix_(kept, kept)]),
        orig_id=kept, label=graph.label[kept], split=graph.split[kept],
        feat_chunks=lambda: iter([next(graph.feat_chunks())[kept]]),
    )  # fmt: skip
    np.testing.assert_allclose(found[kept], encoded(tmp_path / "kept", observed, config), rtol=1e-4, atol=1e-5)
    seen = adj * ~unseen
    means = scaled(seen @ found / np.maximum(seen.sum(1, keepdims=True), 1), 1 if config is LABELS else 2)
    np.testing.assert_allclose(found[unseen], means[unseen], rtol=1e-4, atol=1e-5)
    assert not found[[alone, none]].any()
    assert np.count_nonzero(found[unseen].any(1)) > 20


def test_deepwalk_finds_communities(tmp_path: Path) -> None:
    graph = isolate(small_graph(), 7)
    pos = encoded(tmp_path, graph, DEEPWALK)
    assert not pos[7].any()
    np.testing.assert_allclose(np.linalg.norm(np.delete(pos, 7, 0), axis=1), 1, rtol=1e-5)
    cosine, same = pos @ pos.T, graph.label[:, None] == graph.label
    assert cosine[same & ~np.eye(240, dtype=bool)].mean() > cosine[~same].mean() + 0.1


def test_a_graph_without_edges_has_zeros(tmp_path: Path) -> None:
    graph = with_adjacency(small_graph(), np.zeros((240, 240)))
    for config in (FASTRP, DEEPWALK, LABELS):
        assert not encoded(tmp_path / arrays(config)[0] / config.positional, graph, config).any()


class CutOffError(Exception):
    """A kill."""


def cut_off_after(calls: int) -> Callable[[GraphStore, Step], list]:
    """Fills the parts of steps one by one, and fails after some."""
    left = calls

    def run_step(store: GraphStore, step: Step) -> list:
        nonlocal left
        files = []
        for part in range(store.num_parts):
            if left == 0:
                raise CutOffError
            left -= 1
            files += fill(step, store, [part])
        return files

    return run_step


def test_a_run_cut_off_goes_on_and_leaves_nothing_behind(tmp_path: Path) -> None:
    config = FASTRP.model_copy(update={"label_propagation": True, "iterations": 4})
    graph, part_N = small_graph(), np.random.default_rng(0).integers(0, 3, 240).astype(np.int32)
    whole = write_graph(f"{tmp_path}/whole", graph, part_N)
    encode_in_process(whole, config, SEED)
    before = write_graph(f"{tmp_path}/before", graph, part_N)
    store = write_graph(f"{tmp_path}/cut", graph, part_N)
    ended, runs = False, 0
    while not ended:
        runs += 1
        assert runs < 20, "every run gets further"
        run_step = cut_off_after(4)
        try:
            encode(GraphStore.open(store.url), config, SEED, lambda step: run_step(store, step))  # noqa: B023
            ended = True
        except CutOffError:
            assert len(list(Path(store.url, "part-00000").glob("p*_*.npy"))) <= 7, "what is not needed any more is gone"
    assert runs > 5
    for name in ("pos", "prop"):
        np.testing.assert_array_equal(by_input(GraphStore.open(store.url), name), by_input(whole, name))
    added = {path.name for path in Path(store.url).rglob("*")} - {path.name for path in Path(before.url).rglob("*")}
    assert added == {"pos.npy", "prop.npy", "pos.json", "prop.json"}


def test_nothing_is_done_for_what_is_not_configured(tmp_path: Path) -> None:
    store = write_graph(str(tmp_path), small_graph(), np.zeros(240, np.int32))
    before = sorted(tmp_path.rglob("*"))
    encode_in_process(store, EncodingsConfig(), SEED)
    assert sorted(tmp_path.rglob("*")) == before


def test_cora(tmp_path: Path, data_dir: Path) -> None:
    """The encodings know the classes; and a training node is told no more about its own than a test node is."""
    graph = source.read(NpzConfig(path=str(data_dir / "cora.npz")), seed=0)
    assert np.sum(graph.split == NO_SPLIT) > 0
    prop = encoded(tmp_path / "prop", graph, LABELS)
    right = prop.argmax(1) == graph.label
    accuracy = {code: right[graph.split == code].mean() for code in (TRAIN, VAL, TEST)}
    assert accuracy[TEST] > 0.65
    assert accuracy[TRAIN] < 0.85
    pos = encoded(tmp_path / "pos", graph, EncodingsConfig(positional="fastrp"))
    train, test = graph.split == TRAIN, graph.split == TEST
    model = LogisticRegression(C=10, max_iter=1000).fit(pos[train], graph.label[train])
    assert model.score(pos[test], graph.label[test]) > 0.45
