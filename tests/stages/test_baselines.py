"""The baselines against counting by hand and a plain minimisation of the regression's objective."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.special

from rbm_dist.graph.splits import SPLIT_NAMES, TEST, TRAIN, VAL
from rbm_dist.graph.store import GraphStore
from rbm_dist.serve.accuracy import Hits, hits
from rbm_dist.sources.source import SourceGraph
from rbm_dist.stages import baselines
from rbm_dist.stages.evaluate import baseline_classes
from tests.small_graph import small_graph, with_sparse_features, write_graph


def write(url: Path, graph: SourceGraph) -> GraphStore:
    return write_graph(str(url), graph, (np.arange(graph.csc.num_nodes) % 3).astype(np.int32))


def regression(store: GraphStore, ids: np.ndarray) -> np.ndarray:
    return baselines.FeatureRegression(store, seed=0).classes(store, ids)


def baseline_hits(store: GraphStore) -> dict[str, Hits]:
    fitted = (baselines.majority_class(store), baselines.FeatureRegression(store, seed=0))
    return {name: hits(store, classes) for name, classes in baseline_classes(store, fitted).items()}


def scaled_by(graph: SourceGraph, factor_F: np.ndarray | float, shift_F: np.ndarray | float = 0.0) -> SourceGraph:
    """The same graph in other units."""
    [feat] = graph.feat_chunks()
    return replace(graph, feat_chunks=lambda: iter([(feat * factor_F + shift_F).astype(np.float32)]))


def test_majority_class_is_the_most_frequent_of_training(tmp_path: Path) -> None:
    graph = small_graph()
    label = np.where(graph.split == TRAIN, np.arange(240) % 2 * 3, 1)  # 0 and 3 in training, elsewhere all are 1
    label[np.flatnonzero(graph.split == TRAIN)[:30]] = 3
    store = write(tmp_path, replace(graph, label=label))
    assert baselines.majority_class(store) == 3
    assert baseline_hits(store)["majority"].accuracy() == {"val": 0.0, "test": 0.0, "unseen": None}


@pytest.mark.parametrize("sparse", [False, True])
def test_the_regression_minimises_the_penalised_likelihood(tmp_path: Path, sparse: bool) -> None:
    graph = with_sparse_features(small_graph()) if sparse else small_graph()
    store = write(tmp_path, graph)
    ids = np.arange(240)
    x, label, split = (store.gather(name, ids) for name in ("feat", "label", "split"))
    train = split == TRAIN
    x = x.astype(np.float64)
    if sparse:
        scale = np.sqrt(np.mean(x[train] ** 2, axis=0))
    else:
        x, scale = x - x[train].mean(axis=0), x[train].std(axis=0)
    x *= 1 / np.median(scale)  # all deviations lie within a factor of ten
    target = np.eye(5)[label[train]]

    def objective(flat: np.ndarray) -> float:
        weight, bias = flat[:-5].reshape(-1, 5), flat[-5:]
        log_p = scipy.special.log_softmax(x[train] @ weight + bias, axis=1)
        return float(np.sum(weight**2) / 2 - baselines._INVERSE_PENALTY * np.sum(target * log_p))

    best = scipy.optimize.minimize(objective, np.zeros(5 * x.shape[1] + 5), options={"maxiter": 40}).x
    expected = (x @ best[:-5].reshape(-1, 5) + best[-5:]).argmax(axis=1)
    found = regression(store, ids)
    assert np.mean(found == expected) > 0.97
    accuracy = baseline_hits(store)["regression"].accuracy()
    for code in (VAL, TEST):
        assert accuracy[SPLIT_NAMES[code]] == np.mean((found == label)[split == code])
    if not sparse:
        assert accuracy["test"] > 0.5, "there is something to learn"


def test_units_do_not_matter(tmp_path: Path) -> None:
    graph = small_graph()
    ids = np.arange(240)
    expected = regression(write(tmp_path / "plain", graph), ids)
    for number, factor in enumerate((1e-12, 1e30)):
        other = write(tmp_path / str(number), scaled_by(graph, factor))
        np.testing.assert_array_equal(regression(other, ids), expected)
    # A column in seconds since 1970 and one in 1e30ths; then a constant, and none that varies.
    factor = np.ones(12)
    factor[[0, 1]] = 1e8, 1e30
    shift = np.zeros(12)
    shift[0] = 1.6e9
    mixed = write(tmp_path / "mixed", scaled_by(graph, factor, shift))
    assert np.mean(regression(mixed, ids) == expected) > 0.8
    constant = write(tmp_path / "constant", scaled_by(graph, 0.0, 1e9))
    assert len(set(regression(constant, ids))) == 1


def test_a_single_class_and_a_bounded_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = small_graph()
    store = write(tmp_path / "one", replace(graph, label=np.where(graph.split == TRAIN, 2, graph.label)))
    np.testing.assert_array_equal(regression(store, np.arange(10)), np.full(10, 2))
    store = write(tmp_path / "many", graph)
    asked: list[np.ndarray] = []
    inputs = GraphStore.inputs

    def asking(self: GraphStore, ids: np.ndarray) -> object:
        asked.append(ids)
        return inputs(self, ids)

    monkeypatch.setattr(GraphStore, "inputs", asking)
    for name, most in (("SAMPLED_ROWS", 20), ("SAMPLED_VALUES", 20 * store.num_features)):
        with monkeypatch.context() as patch:
            patch.setattr(baselines, name, most)
            for seed in (0, 0, 1):
                baselines.FeatureRegression(store, seed)
    assert len(asked) == 6
    assert all(len(ids) == 20 and np.all(store.gather("split", ids) == TRAIN) for ids in asked)
    np.testing.assert_array_equal(asked[0], asked[1])
    assert not np.array_equal(asked[0], asked[2])
