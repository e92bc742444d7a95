"""Partitioners: balanced, seeded, and (KaMinPar) far better than chance; the graphs that have nothing to cut."""

import itertools
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

from rbm_dist.config import NpzConfig, PartitionConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.csc import Csc, build
from rbm_dist.graph.partition import PARTITIONERS, edge_cut, partition
from rbm_dist.graph.source import read

METHODS = sorted(PARTITIONERS)


@pytest.fixture(scope="module")
def cora(data_dir: Path) -> Csc:
    """Cora's structure."""
    return read(NpzConfig(path=str(data_dir / "cora.npz")), seed=0).csc


@pytest.fixture(scope="module")
def communities() -> Csc:
    """Six hundred nodes in six communities, and twenty nodes without any edge."""
    graph = nx.planted_partition_graph(6, 100, 0.1, 0.005, seed=3)
    src, dst = np.array(graph.edges).T
    return build(src, dst, 620, undirected=True)


def parts_of(csc: Csc, method: str, num_parts: int, imbalance: float = 0.03, seed: int = 0) -> np.ndarray:
    return partition(csc, PartitionConfig(method=method, num_parts=num_parts, imbalance=imbalance), seed)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("num_parts", "imbalance"), [(1, 0.03), (2, 0.03), (6, 0.03), (7, 0.2), (32, 0.1)])
def test_every_node_has_a_part_and_parts_are_balanced(
    communities: Csc, method: str, num_parts: int, imbalance: float
) -> None:
    part_N = parts_of(communities, method, num_parts, imbalance)
    assert (part_N.shape, part_N.dtype) == ((620,), np.int32)
    sizes = np.bincount(part_N, minlength=num_parts)
    assert len(sizes) == num_parts
    assert sizes.max() <= np.ceil((1 + imbalance) * np.ceil(620 / num_parts))
    assert sizes.min() > 0


@pytest.mark.parametrize("method", METHODS)
def test_parts_depend_on_the_seed_alone(cora: Csc, method: str) -> None:
    first = parts_of(cora, method, 4, seed=1)
    other = parts_of(cora, method, 4, seed=2)
    np.testing.assert_array_equal(parts_of(cora, method, 4, seed=1), first)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("num_parts", [2, 4, 8])
def test_kaminpar_cuts_far_fewer_edges_than_chance(cora: Csc, num_parts: int) -> None:
    part_N = parts_of(cora, "kaminpar", num_parts)
    sizes = np.bincount(part_N, minlength=num_parts)
    assert sizes.max() <= np.ceil(1.03 * np.ceil(cora.num_nodes / num_parts))
    by_chance = cora.num_edges * (1 - 1 / num_parts)
    assert edge_cut(cora, parts_of(cora, "random", num_parts)) == pytest.approx(by_chance, rel=0.1)
    assert edge_cut(cora, part_N) < 0.25 * by_chance


def test_kaminpar_finds_separate_cliques() -> None:
    graph = nx.disjoint_union_all([nx.complete_graph(12)] * 4)
    order = np.random.default_rng(0).permutation(48)
    src, dst = order[np.array(graph.edges).T]
    csc = build(src, dst, 48, undirected=True)
    part_N = parts_of(csc, "kaminpar", 4)
    assert edge_cut(csc, part_N) == 0
    np.testing.assert_array_equal(np.bincount(part_N), [12] * 4)


def test_kaminpar_takes_a_directed_graph_as_undirected() -> None:
    # Two directed rings, joined by one edge.
    rings = [(start + i, start + (i + 1) % 20) for start in (0, 20) for i in range(20)]
    src, dst = np.array([*rings, (3, 25)]).T
    csc = build(src, dst, 40, undirected=False)
    assert edge_cut(csc, parts_of(csc, "kaminpar", 2)) <= 3


def test_kaminpar_says_nothing_on_the_terminal(communities: Csc, capfd: pytest.CaptureFixture[str]) -> None:
    parts_of(communities, "kaminpar", 4)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("method", METHODS)
def test_a_graph_without_edges(method: str) -> None:
    csc = Csc(np.zeros(11, np.int64), np.empty(0, np.int32))
    np.testing.assert_array_equal(np.sort(np.bincount(parts_of(csc, method, 4))), [2, 2, 3, 3])
    assert edge_cut(csc, parts_of(csc, method, 4)) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_nodes", [1, 2, 9])
def test_as_many_parts_as_nodes(method: str, num_nodes: int) -> None:
    pairs = np.array(list(itertools.combinations(range(num_nodes), 2))).reshape(-1, 2)
    csc = build(*pairs.T, num_nodes, undirected=True)
    part_N = parts_of(csc, method, num_nodes)
    assert set(part_N.tolist()) == set(range(num_nodes))


@pytest.mark.parametrize("method", METHODS)
def test_more_parts_than_nodes_are_refused(method: str) -> None:
    csc = build(np.array([0]), np.array([1]), 3, undirected=True)
    with pytest.raises(InputError, match=r"partition\.num_parts: 4 parts for a graph of 3 node"):
        parts_of(csc, method, 4)


def test_edge_cut_counts_edges_between_parts(communities: Csc) -> None:
    part_N = np.random.default_rng(0).integers(0, 5, communities.num_nodes)
    graph = nx.DiGraph()
    graph.add_edges_from(
        (int(u), v) for v in range(620) for u in communities.indices[slice(*communities.indptr[v : v + 2])]
    )
    assert edge_cut(communities, part_N) == sum(part_N[u] != part_N[v] for u, v in graph.edges)
