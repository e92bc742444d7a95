"""The synthetic graph made in pieces: seeds, pieces, degrees, communities, labels, splits, features."""

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression

from rbm_dist.config.source import SyntheticConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.csc import Csc, build, destinations
from rbm_dist.graph.splits import NO_SPLIT, TEST, TRAIN, VAL
from rbm_dist.sources import synthetic
from rbm_dist.sources.streamed import StreamedSource
from rbm_dist.sources.synthetic import communities, open_synthetic
from tests.sources.pieces import read_edges, read_features

_CONFIG = SyntheticConfig(num_nodes=40_000, num_features=16, num_classes=5, num_communities=20, degree=20)


def changed(**fields: object) -> SyntheticConfig:
    return SyntheticConfig.model_validate(_CONFIG.model_dump() | fields)


def csc(source: StreamedSource) -> Csc:
    return build(*read_edges(source), source.num_nodes, source.undirected)


@pytest.fixture(scope="module")
def graph() -> StreamedSource:
    return open_synthetic(_CONFIG, seed=1)


@pytest.fixture(scope="module")
def community(graph: StreamedSource) -> np.ndarray:
    return communities(_CONFIG, 1, np.arange(_CONFIG.num_nodes))


def test_a_seed_makes_one_graph(graph: StreamedSource) -> None:
    again, other = (open_synthetic(_CONFIG, seed) for seed in (1, 2))
    for made, equal in ((again, True), (other, False)):
        assert np.array_equal(read_features(made), read_features(graph)) == equal
        assert np.array_equal(read_edges(made), read_edges(graph)) == equal
        for name in ("label", "split"):
            assert np.array_equal(getattr(made.nodes(), name), getattr(graph.nodes(), name)) == equal


def test_pieces_are_made_alone_and_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "PIECE_EDGES", 30_001)
    monkeypatch.setattr(synthetic, "PIECE_ROWS", 1 << 14)
    source = open_synthetic(_CONFIG, seed=1)
    assert source.num_edge_pieces == 14
    assert source.feat_offsets.tolist() == [0, 1 << 14, 1 << 15, 40_000]
    elsewhere = pickle.loads(pickle.dumps(source))
    backwards = {piece: list(elsewhere.edges(piece)) for piece in reversed(range(14))}
    chunks = [chunk for piece in range(14) for chunk in backwards[piece]]
    whole = read_edges(source)
    np.testing.assert_array_equal(np.concatenate([src for src, _ in chunks]), whole[0])
    for piece in (2, 0):
        rows = np.concatenate(list(elsewhere.feat(piece)))
        np.testing.assert_array_equal(
            rows, read_features(source)[source.feat_offsets[piece] : source.feat_offsets[piece + 1]]
        )
    # An edge belongs to its number: how edges are cut into pieces changes none.
    monkeypatch.setattr(synthetic, "PIECE_EDGES", 1 << 20)
    np.testing.assert_array_equal(read_edges(open_synthetic(_CONFIG, seed=1)), whole)


def test_shapes_and_types(graph: StreamedSource) -> None:
    feat, (src, dst), nodes = read_features(graph), read_edges(graph), graph.nodes()
    assert (feat.shape, feat.dtype) == ((40_000, 16), np.float32)
    assert len(np.unique(feat, axis=0)) == len(feat)  # chunks have keys of their own
    assert (src.dtype, src.shape, dst.shape) == (np.int32, (400_000,), (400_000,))
    assert (nodes.label.dtype, nodes.split.dtype) == (np.int64, np.int8)
    np.testing.assert_array_equal(nodes.orig_id, np.arange(40_000))


@given(num_nodes=st.integers(1, 3000), seed=st.integers(0, 2**31 - 1))
def test_the_permutation_is_one_and_can_be_undone(num_nodes: int, seed: int) -> None:
    arguments = synthetic._permutation(SyntheticConfig(num_nodes=num_nodes), seed)
    ids = np.arange(num_nodes, dtype=np.uint64)
    synthetic._permute(ids, *arguments)
    np.testing.assert_array_equal(np.sort(ids), np.arange(num_nodes))
    synthetic._unpermute(ids, *arguments)
    np.testing.assert_array_equal(ids, np.arange(num_nodes))


def test_the_mean_degree_is_as_asked_but_for_duplicates(graph: StreamedSource) -> None:
    degree = np.diff(csc(graph).indptr)
    assert 0.9 * 20 < degree.mean() < 20
    assert np.sum(degree == 0) < 0.001 * 40_000


@pytest.mark.parametrize("power", [2.3, 2.5, 3.5])
def test_degrees_follow_the_power_law(power: float) -> None:
    """The complementary distribution falls with exponent 1 - power, between the bulk and the hubs."""
    source = open_synthetic(changed(power=power, num_nodes=200_000, homophily=1.0, num_communities=5), seed=3)
    degree = np.bincount(np.concatenate(read_edges(source)), minlength=200_000)
    at = np.geomspace(25, 400 if power < 3 else 120, 12)
    above = np.array([np.mean(degree >= d) for d in at])
    slope = np.polyfit(np.log(at), np.log(above), 1)[0]
    assert slope == pytest.approx(1 - power, abs=0.15)


def test_degrees_against_the_closed_form(graph: StreamedSource, community: np.ndarray) -> None:
    """The node at position p of n has the share (F(p + 1) - F(p)) of its community's ends, F(p) ~ (p + 1)^(1/3) - 1."""
    degree = np.bincount(np.concatenate(read_edges(graph)), minlength=40_000)
    for c in (0, 7):
        found = np.sort(degree[community == c])[::-1]
        n = len(found)
        share = np.diff((np.arange(n + 1) + 1.0) ** (1 / 3)) / ((n + 1) ** (1 / 3) - 1)
        np.testing.assert_allclose(found[:10], share[:10] * n * 20, rtol=0.12)
        top = n // 100
        assert found[:top].sum() / found.sum() == pytest.approx(share[:top].sum(), rel=0.1)
        assert found[:top].sum() / found.sum() > 0.09  # the top 1 % of nodes


@pytest.mark.parametrize("homophily", [0.0, 0.7, 1.0])
def test_homophily_is_the_share_of_edges_within_a_community(homophily: float, community: np.ndarray) -> None:
    src, dst = read_edges(open_synthetic(changed(homophily=homophily), seed=1))
    assert np.mean(community[src] == community[dst]) == pytest.approx(homophily, abs=0.003)


def test_all_communities_have_the_same_mean_degree(graph: StreamedSource, community: np.ndarray) -> None:
    degree = np.bincount(np.concatenate(read_edges(graph)), minlength=40_000)
    size = np.bincount(community)
    np.testing.assert_allclose(np.bincount(community, degree) / size, 20, rtol=0.1)
    np.testing.assert_allclose(size / 40_000, np.diff(np.sqrt(np.arange(21) / 20)), atol=1e-3)


def test_communities_are_scattered_over_the_ids(community: np.ndarray) -> None:
    share = np.bincount(community) / 40_000
    for block in community.reshape(20, 2000):
        np.testing.assert_allclose(np.bincount(block, minlength=20) / 2000, share, atol=0.035)
    # A neighbour in id space is of the same community as often as any node is.
    for distance in (1, 2, 3, 64):
        assert np.mean(community[distance:] == community[:-distance]) == pytest.approx(np.sum(share**2), abs=0.02)


def test_labels_and_split(graph: StreamedSource, community: np.ndarray) -> None:
    nodes = graph.nodes()
    np.testing.assert_array_equal(nodes.label, community % 5)
    assert nodes.split is not None
    for code, share in ((TRAIN, 0.08), (VAL, 0.02), (TEST, 0.9)):
        assert np.mean(nodes.split == code) == pytest.approx(share, abs=0.005)
        assert len(np.unique(nodes.label[nodes.split == code])) == 5


def test_nodes_in_no_split_have_no_label(community: np.ndarray) -> None:
    nodes = open_synthetic(changed(train_share=0.1, val_share=0.05, test_share=0.05), seed=1).nodes()
    assert nodes.split is not None
    assert np.mean(nodes.split == NO_SPLIT) == pytest.approx(0.8, abs=0.01)
    np.testing.assert_array_equal(nodes.label, np.where(nodes.split == NO_SPLIT, -1, community % 5))


def test_label_noise_gives_any_other_class(community: np.ndarray) -> None:
    label = open_synthetic(changed(label_noise=0.3), seed=1).nodes().label
    step = (label - community) % 5
    np.testing.assert_allclose(np.bincount(step) / 40_000, [0.7, *[0.075] * 4], atol=0.008)


def test_features_tell_the_class_and_neighbours_tell_it_better(graph: StreamedSource, community: np.ndarray) -> None:
    feat, label, graph_csc = read_features(graph), graph.nodes().label, csc(graph)
    total = np.zeros_like(feat)
    np.add.at(total, destinations(graph_csc), feat[graph_csc.indices])
    mean = total / np.maximum(np.diff(graph_csc.indptr), 1)[:, None]
    scores = [
        LogisticRegression(max_iter=200).fit(rows[:4000], label[:4000]).score(rows[4000:12_000], label[4000:12_000])
        for rows in (feat, np.c_[feat, mean])
    ]
    assert scores[0] > np.bincount(label).max() / 40_000 + 0.1
    assert scores[1] > scores[0] + 0.1
    centre = np.stack([feat[community == c].mean(axis=0) for c in range(20)])
    np.testing.assert_allclose(np.linalg.norm(centre, axis=1), 1, atol=0.1)
    np.testing.assert_allclose((feat - centre[community]).std(axis=0), 0.5, rtol=0.02)
    # Those of one class are nearer to each other, by the share that a class has in a centre.
    cosine, same = centre @ centre.T, np.equal.outer(np.arange(20) % 5, np.arange(20) % 5)
    assert cosine[same & ~np.eye(20, dtype=bool)].mean() > cosine[~same].mean() + 0.3


def test_the_shape_of_papers100m_in_pieces() -> None:
    config = SyntheticConfig(
        num_nodes=111_059_956, num_features=128, num_classes=172, num_communities=1376, degree=29.1
    )
    source = open_synthetic(config, seed=0)
    assert source.num_edge_pieces == 1542
    ((src, dst),) = source.edges(1000)
    assert max(src.max(), dst.max()) < config.num_nodes
    assert np.mean(communities(config, 0, src) == communities(config, 0, dst)) == pytest.approx(0.7, abs=0.002)
    rows = next(source.feat(700))
    assert (rows.shape, rows.dtype) == ((8192, 128), np.float32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_communities": 4}, r"source\.num_communities: 4 for 5 classes"),
        ({"train_share": 0.2}, r"add up to 1\.12, which is more than 1"),
        ({"power": 2.0}, "power"),
        ({"num_classes": 1}, "num_classes"),
        ({"degree": 0}, "degree"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        changed(**fields)


def test_communities_smaller_than_the_degree_are_refused() -> None:
    with pytest.raises(InputError, match=r"source\.num_communities: the smallest of 20 communities has 5 of 200 nodes"):
        open_synthetic(changed(num_nodes=200), seed=0)
