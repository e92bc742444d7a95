"""Sources: the digits, the real graphs against their README and scipy, and odd graphs that are fine."""

from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.datasets import load_digits

from rbm_dist.config.source import DigitsConfig, NpzConfig, RegionsConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.splits import TEST, TRAIN, UNSEEN, VAL
from rbm_dist.sources.source import SourceGraph, hide_unseen, read
from tests.sources.npz_input import LABELS, NODES, Arrays, npz_arrays, with_edges, without_masks


def read_npz(folder: Path, arrays: Arrays, seed: int = 0, **config: Any) -> SourceGraph:
    path = folder / "graph.npz"
    np.savez(path, **arrays)
    return read(NpzConfig(path=str(path), **config), seed)


def features(graph: SourceGraph) -> np.ndarray:
    return np.concatenate(list(graph.feat_chunks()))


def edges_of(graph: SourceGraph) -> set[tuple[int, int]]:
    indptr, indices = graph.csc.indptr, graph.csc.indices
    return {(int(src), dst) for dst in range(graph.csc.num_nodes) for src in indices[indptr[dst] : indptr[dst + 1]]}


def test_digits_link_each_image_to_its_nearest() -> None:
    graph, digits = read(DigitsConfig(neighbors=5), seed=0), load_digits()
    assert (graph.csc.num_nodes, graph.num_features, graph.num_classes) == (1797, 64, 10)
    assert not graph.sparse_feat
    np.testing.assert_array_equal(graph.label, digits.target)
    np.testing.assert_allclose(features(graph), digits.data, rtol=1e-6)
    squared = (digits.data**2).sum(1)
    distance = squared[:, None] + squared - 2 * digits.data @ digits.data.T
    np.fill_diagonal(distance, np.inf)
    fifth = np.sort(distance, axis=1)[:, 4]
    linked = np.zeros_like(distance, bool)
    for src, dst in edges_of(graph):
        linked[src, dst] = True
    # Ties at the fifth place may go either way, so: all that are nearer, and none that is farther from both ends.
    assert np.all(linked[distance < fifth[:, None]])
    assert not np.any(linked[(distance > fifth[:, None]) & (distance > fifth)])
    assert np.array_equal(linked, linked.T)
    counts = np.array(
        [[np.sum((digits.target == cls) & (graph.split == code)) for code in (0, 1)] for cls in range(10)]
    )
    np.testing.assert_array_equal(counts, [[20, 30]] * 10)
    assert np.all(graph.split >= 0)


def test_more_neighbours_than_digits_are_refused() -> None:
    with pytest.raises(InputError, match=r"source\.neighbors: 1797 neighbours, but there are 1797 images"):
        read(DigitsConfig(neighbors=1797), seed=0)


@pytest.mark.parametrize(
    ("name", "num_nodes", "links", "num_features", "num_classes", "public"),
    [
        ("cora", 2_708, 5_278, 1_433, 7, True),
        ("citeseer", 3_327, 4_552, 3_703, 6, True),
        ("pubmed", 19_717, 44_324, 500, 3, True),
        ("amazon-photo", 7_650, 119_081, 745, 8, False),
        ("coauthor-cs", 18_333, 81_894, 6_805, 15, False),
    ],
)
def test_real_graph(
    data_dir: Path, name: str, num_nodes: int, links: int, num_features: int, num_classes: int, public: bool
) -> None:
    path = data_dir / f"{name}.npz"
    graph = read(NpzConfig(path=str(path)), seed=0)
    assert (graph.csc.num_nodes, graph.csc.num_edges) == (num_nodes, 2 * links)
    assert (graph.num_features, graph.num_classes) == (num_features, num_classes)
    assert (graph.dropped_self_loops, graph.dropped_duplicates) == (0, 0)
    with np.load(path, allow_pickle=False) as raw:
        arrays = {key: raw[key] for key in raw.files}
    np.testing.assert_array_equal(graph.label, arrays["labels"])
    adjacency = sp.csr_array(
        (arrays["adj_data"], arrays["adj_indices"], arrays["adj_indptr"]), tuple(arrays["adj_shape"])
    )
    both_ways = sp.csc_array(adjacency + adjacency.T)
    both_ways.sort_indices()
    np.testing.assert_array_equal(graph.csc.indptr, both_ways.indptr)
    np.testing.assert_array_equal(graph.csc.indices, both_ways.indices)
    if public:
        for code, split in ((TRAIN, "train"), (VAL, "val"), (TEST, "test")):
            np.testing.assert_array_equal(graph.split == code, arrays[f"{split}_mask"])
    else:
        for cls in range(num_classes):
            assert [int(np.sum((graph.split == code) & (graph.label == cls))) for code in (TRAIN, VAL)] == [20, 30]
        assert np.array_equal(graph.split >= 0, graph.label >= 0)
    start = 0
    attr = sp.csr_array(
        (arrays["attr_data"], arrays["attr_indices"], arrays["attr_indptr"]), tuple(arrays["attr_shape"])
    )
    assert graph.sparse_feat == (attr.nnz < 0.2 * attr.shape[0] * attr.shape[1])
    for stored in graph.feat_chunks():
        chunk = stored.toarray() if graph.sparse_feat else stored
        rows = attr[start : start + len(chunk)]
        assert (stored.dtype, np.count_nonzero(chunk)) == (np.float32, rows.count_nonzero())
        some = np.arange(0, len(chunk), 97)
        dense = rows[some].toarray()
        np.testing.assert_allclose(chunk[some], dense, rtol=1e-6)
        start += len(chunk)
    assert start == num_nodes


def test_the_public_split_is_kept(tmp_path: Path) -> None:
    graph = read_npz(tmp_path, npz_arrays(), seed=3)
    np.testing.assert_array_equal(graph.split, [0, 0, 1, 1, 2, -1, 2, 2])
    assert edges_of(graph) == {(u, v) for u in range(NODES) for v in ((u + 1) % NODES, (u - 1) % NODES)}


def test_the_rule_per_class_where_there_is_no_split(tmp_path: Path) -> None:
    graph = read_npz(tmp_path, without_masks(npz_arrays()), train_per_class=1, val_per_class=1)
    np.testing.assert_array_equal(np.bincount(graph.split[LABELS == 0]), [1, 1, 3])
    np.testing.assert_array_equal(np.bincount(graph.split[LABELS == 1]), [1, 1, 1])


def test_a_class_of_very_few_nodes_is_still_trained_on(tmp_path: Path) -> None:
    label = np.array([0, 0, 0, 0, 0, 0, 0, 1])
    graph = read_npz(tmp_path, without_masks(npz_arrays()) | {"labels": label})
    assert graph.split[7] == TRAIN
    assert set(graph.split[:7].tolist()) == {TRAIN, VAL, TEST}


@pytest.mark.parametrize("undirected", [True, False])
def test_self_loops_and_duplicates_are_dropped_and_counted(tmp_path: Path, undirected: bool) -> None:
    edges = [(0, 1), (0, 1), (0, 1), (1, 0), (2, 2), (2, 2), (3, 4), (5, 5)]
    graph = read_npz(tmp_path, with_edges(npz_arrays(), edges), undirected=undirected)
    assert (graph.dropped_self_loops, graph.dropped_duplicates) == (3, 2)
    assert edges_of(graph) == {(0, 1), (1, 0), (3, 4)} | ({(4, 3)} if undirected else set())


@pytest.mark.parametrize("kind", ["digits", "regions", "npz", "npz, one way"])
def test_a_source_says_whether_its_graph_is_symmetric(tmp_path: Path, kind: str) -> None:
    np.savez(tmp_path / "graph.npz", **with_edges(npz_arrays(), [(0, 1), (2, 3)]))
    config = {
        "digits": DigitsConfig(neighbors=3),
        "regions": RegionsConfig(num_nodes=300, num_regions=2, num_classes=2),
        "npz": NpzConfig(path=f"{tmp_path}/graph.npz"),
        "npz, one way": NpzConfig(path=f"{tmp_path}/graph.npz", undirected=False),
    }[kind]
    links = edges_of(read(config, seed=0))
    assert links
    assert config.symmetric == (links == {(dst, src) for src, dst in links})


def test_isolated_nodes_are_kept(tmp_path: Path) -> None:
    graph = read_npz(tmp_path, with_edges(npz_arrays(), [(0, 1)]))
    assert graph.csc.num_nodes == len(graph.label) == len(features(graph)) == NODES
    assert edges_of(graph) == {(0, 1), (1, 0)}


def test_a_graph_without_edges(tmp_path: Path) -> None:
    graph = read_npz(tmp_path, with_edges(npz_arrays(), []))
    assert (graph.csc.num_nodes, graph.csc.num_edges) == (NODES, 0)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int64", "uint8", "bool"])
def test_features_of_any_number_type(tmp_path: Path, dtype: str) -> None:
    values = npz_arrays()["attr_data"].astype(dtype)
    expected = values.astype(np.float64).reshape(NODES, 3)
    graph = read_npz(tmp_path, npz_arrays() | {"attr_data": values})
    assert features(graph).dtype == np.float32
    np.testing.assert_allclose(features(graph), expected, rtol=1e-6)


def test_sparse_features_are_the_same_numbers(tmp_path: Path) -> None:
    """Entries given in pieces count as their sum."""
    indptr = np.array([0, 3, 4, 4, 5, 6, 7, 8, 9])
    arrays = {
        "attr_data": np.array([3, -2, -1, 5, 1, 1, 1, 1, 0.0]), "attr_indices": np.array([4, 4, 9, 7, 1, 2, 3, 4, 5]),
        "attr_indptr": indptr, "attr_shape": np.array([NODES, 10]),
    }  # fmt: skip
    graph = read_npz(tmp_path, npz_arrays() | arrays)
    assert graph.sparse_feat
    (chunk,) = graph.feat_chunks()
    assert chunk.dtype == np.float32
    assert chunk.has_canonical_format, "one entry per place"
    expected = np.zeros((NODES, 10))
    expected[0, [4, 9]] = 1, -1
    expected[[1, 3, 4, 5, 6], [7, 1, 2, 3, 4]] = 5, 1, 1, 1, 1
    np.testing.assert_allclose(chunk.toarray(), expected)
    dense = read_npz(tmp_path, npz_arrays() | arrays | {"attr_data": np.array([4, 0.0, 0, 0, 0, 0, 0, 0, 0])})
    np.testing.assert_array_equal(next(dense.feat_chunks()).toarray()[0], 4 * np.eye(10)[4])


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_unseen_nodes_cannot_be_reached(data_dir: Path, share: float) -> None:
    settings = {"path": str(data_dir / "citeseer.npz"), "unseen_share": share}
    graph, whole = (read(NpzConfig(**settings | changes), seed=4) for changes in ({}, {"unseen_share": 0}))
    unseen = graph.split == UNSEEN
    assert unseen.sum() == round(share * np.sum(whole.split == TEST))
    assert np.all(whole.split[unseen] == TEST)
    np.testing.assert_array_equal(graph.split[~unseen], whole.split[~unseen])
    links, all_links = edges_of(graph), edges_of(whole)
    assert links == {(src, dst) for src, dst in all_links if unseen[dst] or not unseen[src]}
    assert len(links) < len(all_links)
    np.testing.assert_array_equal(read(NpzConfig(**settings), seed=4).split, graph.split)
    assert not np.array_equal(read(NpzConfig(**settings), seed=5).split, graph.split)


def test_hiding_all_or_none(tmp_path: Path) -> None:
    graph = read_npz(tmp_path, npz_arrays())
    assert edges_of(hide_unseen(graph, 0.1, seed=0)) == edges_of(graph), "a tenth of three is no node"
    hidden = hide_unseen(graph, 1.0, seed=0)
    np.testing.assert_array_equal(hidden.split, [0, 0, 1, 1, UNSEEN, -1, UNSEEN, UNSEEN])
    # On the ring: 4, 6 and 7 point at none but each other, and are still pointed at by all their neighbours.
    assert edges_of(hidden) == {(u, v) for u, v in edges_of(graph) if u not in (4, 6, 7) or v in (4, 6, 7)}


@pytest.mark.parametrize("name", ["citeseer", "amazon-photo"])
def test_the_largest_component(data_dir: Path, name: str) -> None:
    path = str(data_dir / f"{name}.npz")
    graph, whole = (read(NpzConfig(path=path, largest_component=largest), seed=0) for largest in (True, False))
    nodes = np.array(sorted(max(nx.connected_components(nx.Graph(edges_of(whole))), key=len)))
    assert len(nodes) < whole.csc.num_nodes
    assert whole.orig_id is None
    np.testing.assert_array_equal(graph.orig_id, nodes)
    np.testing.assert_array_equal(graph.label, whole.label[nodes])
    kept = set(nodes.tolist())
    links = {(int(nodes[u]), int(nodes[v])) for u, v in edges_of(graph)}
    assert links == {(u, v) for u, v in edges_of(whole) if u in kept}
    if name == "citeseer":  # its split is the input's, not drawn anew
        np.testing.assert_array_equal(graph.split, whole.split[nodes])
    rows = sp.vstack([sp.csr_array(chunk) for chunk in whole.feat_chunks()], format="csr")[nodes]
    found = sp.vstack([sp.csr_array(chunk) for chunk in graph.feat_chunks()], format="csr")
    assert abs(found - rows).max() < 1e-7


def test_features_can_be_read_again(tmp_path: Path) -> None:
    graph = read_npz(tmp_path, npz_arrays())
    np.testing.assert_array_equal(features(graph), features(graph))


def test_unlabelled_nodes_are_in_no_split(tmp_path: Path) -> None:
    label = LABELS.copy()
    label[[4, 5]] = -1
    graph = read_npz(tmp_path, without_masks(npz_arrays()) | {"labels": label}, train_per_class=1, val_per_class=1)
    assert np.flatnonzero(graph.split == -1).tolist() == [4, 5]
