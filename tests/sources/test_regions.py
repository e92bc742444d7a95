"""The synthetic graph: what it promises about regions, rules, features, edges and seeds; and as a source."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from rbm_dist.config.source import RegionsConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.csc import destinations
from rbm_dist.graph.splits import TEST, TRAIN, UNSEEN, VAL
from rbm_dist.sources.regions import Regions, generate
from rbm_dist.sources.source import read

_CONFIG = RegionsConfig(num_nodes=20_000, num_features=16, num_classes=4, num_regions=5)


@pytest.fixture(scope="module")
def graph() -> Regions:
    return generate(_CONFIG, seed=1)


def features(graph: Regions) -> np.ndarray:
    return np.concatenate(list(graph.feat_chunks()))


def changed(**fields: object) -> RegionsConfig:
    return RegionsConfig.model_validate(_CONFIG.model_dump() | fields)


def probe(feat: np.ndarray, label: np.ndarray) -> LogisticRegression:
    return LogisticRegression(max_iter=300).fit(feat, label)


def test_a_seed_draws_one_graph(graph: Regions) -> None:
    again, other = generate(_CONFIG, seed=1), generate(_CONFIG, seed=2)
    for name in ("label", "region"):
        np.testing.assert_array_equal(getattr(again, name), getattr(graph, name))
        assert not np.array_equal(getattr(other, name), getattr(graph, name))
    np.testing.assert_array_equal(again.csc.indptr, graph.csc.indptr)
    np.testing.assert_array_equal(again.csc.indices, graph.csc.indices)
    assert not np.array_equal(other.csc.indptr, graph.csc.indptr)
    np.testing.assert_array_equal(features(again), features(graph))
    np.testing.assert_array_equal(features(graph), features(graph))
    assert not np.array_equal(features(other), features(graph))


def test_no_two_rows_are_drawn_alike(graph: Regions) -> None:
    feat = features(graph)
    assert (feat.shape, feat.dtype, graph.label.dtype) == ((20_000, 16), np.float32, np.int64)
    assert len(np.unique(feat, axis=0)) == len(feat)  # chunks have keys of their own


def test_regions_are_uneven_and_classes_even(graph: Regions) -> None:
    share = np.bincount(graph.region) / 20_000
    expected = 1 / np.sqrt([1, 2, 3, 4, 5])
    np.testing.assert_allclose(share, expected / expected.sum(), atol=0.02)
    np.testing.assert_allclose(np.bincount(graph.label) / 20_000, 0.25, atol=0.07)


def test_regions_are_directions_with_unit_spread_and_noise(graph: Regions) -> None:
    feat = features(graph)
    centre = np.stack([feat[graph.region == r].mean(axis=0) for r in range(5)])
    np.testing.assert_allclose(np.linalg.norm(centre, axis=1), 8, rtol=0.03)
    unit = centre / np.linalg.norm(centre, axis=1, keepdims=True)
    assert np.mean((feat @ unit.T).argmax(axis=1) == graph.region) > 0.97
    np.testing.assert_allclose((feat - centre[graph.region]).std(axis=0), np.sqrt(1 + 0.3**2), rtol=0.03)


def test_without_noise_a_linear_rule_gives_the_class() -> None:
    clear = generate(changed(noise=0.0), seed=1)
    feat, rows = features(clear), np.flatnonzero(clear.region == 0)
    train, test = rows[:4000], rows[4000:]
    assert probe(feat[train], clear.label[train]).score(feat[test], clear.label[test]) > 0.95


def test_noise_hides_the_class_and_changes_nothing_else(graph: Regions) -> None:
    noisy, feat = generate(changed(noise=1.0), seed=1), features(graph)
    np.testing.assert_array_equal(noisy.label, graph.label)
    np.testing.assert_array_equal(noisy.csc.indices, graph.csc.indices)
    rows = np.flatnonzero(graph.region == 0)
    train, test = rows[:4000], rows[4000:]
    scores = [probe(x[train], graph.label[train]).score(x[test], graph.label[test]) for x in (feat, features(noisy))]
    assert scores[1] < scores[0] - 0.1


def test_a_rule_fails_in_other_regions(graph: Regions) -> None:
    feat = features(graph)
    for r in range(5):  # centred, so that nothing but the rule differs
        feat[graph.region == r] -= feat[graph.region == r].mean(axis=0)
    own, elsewhere = [], []
    for r in range(5):
        rows = np.flatnonzero(graph.region == r)
        half = len(rows) // 2
        rule = probe(feat[rows[:half]], graph.label[rows[:half]])
        own.append(rule.score(feat[rows[half:]], graph.label[rows[half:]]))
        elsewhere.append(rule.score(feat[graph.region != r], graph.label[graph.region != r]))
    assert min(own) > 0.75
    assert np.mean(elsewhere) < 0.4  # one of four classes by chance


def test_edges(graph: Regions) -> None:
    csc = graph.csc
    src, dst = csc.indices, destinations(csc)
    links = set(zip(src.tolist(), dst.tolist(), strict=True))
    assert len(links) == csc.num_edges
    assert all((v, u) in links and u != v for u, v in links)
    degree = np.diff(csc.indptr)
    assert 9.5 < degree.mean() <= 10
    assert degree.max() > 5 * degree.mean()
    alike = (graph.region[src] == graph.region[dst]) & (graph.label[src] == graph.label[dst])
    # The other 20 % fall into one of about 20 groups by chance.
    assert 0.79 < alike.mean() < 0.83


@pytest.mark.parametrize(("homophily", "expected"), [(0.0, 0.056), (1.0, 1.0)])
def test_homophily(homophily: float, expected: float) -> None:
    graph = generate(changed(homophily=homophily), seed=0)
    group = graph.region * 4 + graph.label
    alike = np.mean(group[graph.csc.indices] == group[destinations(graph.csc)])
    assert alike == pytest.approx(expected, abs=0.015)


def test_neighbours_make_the_class_clearer(graph: Regions) -> None:
    """A GNN's gain: the own row joined by the neighbours' mean tells more than the own row."""
    feat, csc = features(graph), graph.csc
    total = np.zeros_like(feat)
    np.add.at(total, destinations(csc), feat[csc.indices])
    both = np.c_[feat, total / np.maximum(np.diff(csc.indptr), 1)[:, None]]
    rows = np.flatnonzero(graph.region == 0)
    train, test = rows[:4000], rows[4000:]
    scores = [probe(x[train], graph.label[train]).score(x[test], graph.label[test]) for x in (feat, both)]
    assert scores[1] > scores[0] + 0.05


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_nodes": 4}, r"source\.num_regions: 5 regions for 4 nodes"),
        ({"num_nodes": 10}, r"source\.degree: 10 neighbours, but there are 10 nodes"),
        ({"num_classes": 1}, r"source\.num_classes: 1 classes, of which 1 occur"),
        ({"num_nodes": 20, "num_classes": 21}, r"source\.num_classes: 21 classes, of which \d+ occur among 20 nodes"),
        ({"num_features": 1, "num_classes": 5}, r"source\.num_classes: 5 classes, of which \d occur"),
    ],
)
def test_what_cannot_be_drawn_is_refused(fields: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(changed(**({"num_regions": 1} if "num_features" in fields else {}) | fields), seed=0)


def test_as_a_source(graph: Regions) -> None:
    config = changed(train_per_class=100, val_per_class=50)
    found = read(config, seed=1)
    assert (found.csc.num_nodes, found.num_features, found.num_classes) == (20_000, 16, 4)
    np.testing.assert_array_equal(found.label, graph.label)
    np.testing.assert_array_equal(np.concatenate(list(found.feat_chunks())), features(graph))
    for cls in range(4):
        split = found.split[found.label == cls]
        assert [int(np.sum(split == code)) for code in (TRAIN, VAL)] == [100, 50]
        assert np.sum(split == TEST) == len(split) - 150


def test_as_a_source_of_unseen_nodes() -> None:
    found = read(changed(unseen_share=0.2), seed=1)
    assert np.mean(found.split == UNSEEN) == pytest.approx(0.2, abs=0.01)
