"""The built-in sampler: exact against brute force, uniform, and independent of part layout and of seed order."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from rbm_dist.graph.csc import Csc
from rbm_dist.graph.sampler import NumbaSampler, Sample
from rbm_dist.storage import open_array
from tests.graph.reference import Graph, check_sample, cut, cuts, graphs

FANOUTS = st.lists(st.sampled_from([-1, 0, 1, 2, 3, 100]), max_size=4).map(tuple)
KEYS = st.integers(0, 2**64 - 1)
RING = Graph(10, frozenset((u, v) for u in range(10) for v in range(10) if u != v))


def sampler(graph: Graph, offsets: np.ndarray | None = None) -> NumbaSampler:
    offsets = np.array([0, graph.num_nodes], np.int64) if offsets is None else offsets
    return NumbaSampler(dict(enumerate(cut(graph.csc(), offsets))), offsets)


def assert_equal(sample: Sample, other: Sample) -> None:
    np.testing.assert_array_equal(sample.nodes, other.nodes)
    np.testing.assert_array_equal(sample.src, other.src)
    np.testing.assert_array_equal(sample.dst, other.dst)
    assert sample.nodes_per_hop == other.nodes_per_hop
    assert sample.edges_per_hop == other.edges_per_hop


@given(data=st.data(), graph=graphs(), fanout=FANOUTS, key=KEYS)
def test_a_sample_is_exact(data: st.DataObject, graph: Graph, fanout: tuple[int, ...], key: int) -> None:
    offsets = data.draw(cuts(graph.num_nodes))
    seeds = data.draw(st.lists(st.integers(0, graph.num_nodes - 1), unique=True))
    sample = sampler(graph, offsets).sample(np.array(seeds, np.int64), fanout, key)
    check_sample(graph, sample, seeds, fanout)


@given(data=st.data(), graph=graphs(), fanout=FANOUTS, key=KEYS)
def test_a_sample_does_not_depend_on_how_the_graph_is_cut(
    data: st.DataObject, graph: Graph, fanout: tuple[int, ...], key: int
) -> None:
    seeds = np.array(data.draw(st.lists(st.integers(0, graph.num_nodes - 1), unique=True)), np.int64)
    whole = sampler(graph).sample(seeds, fanout, key)
    assert_equal(sampler(graph, data.draw(cuts(graph.num_nodes))).sample(seeds, fanout, key), whole)


@given(data=st.data(), graph=graphs(), width=st.integers(1, 3), key=KEYS)
def test_a_seed_draws_the_same_in_any_company(data: st.DataObject, graph: Graph, width: int, key: int) -> None:
    seeds = data.draw(st.lists(st.integers(0, graph.num_nodes - 1), unique=True, min_size=1))
    together = sampler(graph).sample(np.array(seeds), (width,), key)
    for at, seed in enumerate(seeds):
        alone = sampler(graph).sample(np.array([seed]), (width,), key)
        drawn = together.nodes[together.src[together.dst == at]]
        np.testing.assert_array_equal(drawn, alone.nodes[alone.src])


def test_the_same_key_gives_the_same_sample_and_another_key_another() -> None:
    seeds, kernel = np.arange(5), sampler(RING)
    first = kernel.sample(seeds, (3, 3), key=7)
    assert_equal(kernel.sample(seeds, (3, 3), key=7), first)
    assert not np.array_equal(kernel.sample(seeds, (3, 3), key=8).nodes, first.nodes)


def test_hops_draw_independently() -> None:
    # Node 1 sees ten leaves. It draws three of them once as a seed, and once when it is met from node 0.
    kernel = sampler(Graph(12, frozenset({(leaf, 1) for leaf in range(2, 12)} | {(1, 0)})))
    equal = 0
    for key in range(300):
        as_seed = kernel.sample(np.array([1]), (3,), key)
        when_met = kernel.sample(np.array([0]), (1, 3), key)
        equal += set(as_seed.nodes[1:]) == set(when_met.nodes[2:])
    assert equal < 15  # one in C(10, 3) = 120 by chance


@pytest.mark.parametrize("over", ["keys", "nodes"])
@pytest.mark.parametrize(("degree", "width"), [(7, 1), (7, 2), (6, 3), (7, 5), (4, 3)])
def test_every_set_of_neighbours_is_equally_likely(over: str, degree: int, width: int) -> None:
    sets = {chosen: 0 for chosen in itertools.combinations(range(degree), width)}
    rounds = 200 * len(sets)
    stars = 1 if over == "keys" else rounds
    # `stars` centres, then the degree leaves they all see.
    indptr = np.arange(stars + 1, dtype=np.int64) * degree
    indptr = np.concatenate([indptr, np.full(degree, indptr[-1])])
    indices = np.tile(np.arange(stars, stars + degree, dtype=np.int32), stars)
    kernel = NumbaSampler({0: Csc(indptr, indices)}, np.array([0, stars + degree]))
    for key in range(rounds // stars):
        sample = kernel.sample(np.arange(stars), (width,), key)
        drawn = np.sort(sample.nodes[sample.src].reshape(stars, width) - stars, axis=1)
        for chosen in drawn.tolist():
            sets[tuple(chosen)] += 1
    counts = np.array(list(sets.values()))
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
    # Per neighbour: draws without replacement vary less than draws with it, by (degree - width) / (degree - 1).
    share = np.array([sum(count for chosen, count in sets.items() if leaf in chosen) for leaf in range(degree)])
    expected, thinner = rounds * width / degree, (degree - width) / (degree - 1)
    statistic = np.sum((share - expected) ** 2) / expected / thinner
    assert scipy.stats.chi2.sf(statistic, degree - 1) > 1e-4


def test_two_nodes_draw_independently() -> None:
    edges = {(src, dst) for src in range(2, 7) for dst in (0, 1)}
    kernel = sampler(Graph(7, frozenset(edges)))
    table = np.zeros((5, 5))
    for key in range(5000):
        sample = kernel.sample(np.array([0, 1]), (1,), key)
        first, second = sample.nodes[sample.src] - 2
        table[first, second] += 1
    assert scipy.stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize(
    ("seeds", "reason"), [([1, 2, 1], "distinct"), ([3, 10], "lie in"), ([-1, 3], "lie in"), ([2**40], "lie in")]
)
def test_impossible_seeds_are_refused_and_leave_nothing_behind(seeds: list[int], reason: str) -> None:
    kernel = sampler(RING)
    expected = kernel.sample(np.arange(10)[::-1], (2, 2), key=1)
    with pytest.raises(ValueError, match=reason):
        kernel.sample(np.array(seeds), (2,), key=1)
    assert_equal(kernel.sample(np.arange(10)[::-1], (2, 2), key=1), expected)


def test_no_seeds_give_an_empty_sample() -> None:
    sample = sampler(RING).sample(np.empty(0, np.int64), (3, 3), key=1)
    assert (len(sample.nodes), len(sample.src)) == (0, 0)
    assert (sample.nodes_per_hop, sample.edges_per_hop) == ([0, 0, 0], [0, 0])


def test_the_callers_seeds_are_not_shared() -> None:
    seeds = np.arange(3)
    sample = sampler(RING).sample(seeds, (), key=1)
    seeds[:] = 9
    np.testing.assert_array_equal(sample.nodes, [0, 1, 2])


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    # Node 0 has 2^31 in-edges, all of them a hole in the file; nodes 1 and 2 stand behind them.
    hole, far = 2**31 + 5, np.array([3, 4, 5, 6, 1, 2, 7], np.int32)
    with open(tmp_path / "indices.npy", "wb") as stream:
        header = {"descr": "<i4", "fortran_order": False, "shape": (hole + len(far),)}
        np.lib.format.write_array_header_2_0(stream, header)
        stream.truncate(stream.tell() + 4 * hole)
        stream.seek(0, 2)
        stream.write(far.tobytes())
    np.save(tmp_path / "indptr.npy", np.array([0, hole, hole + 4, hole + 7, *[hole + 7] * 5]))
    csc = Csc(open_array(str(tmp_path / "indptr.npy")), open_array(str(tmp_path / "indices.npy")))
    kernel = NumbaSampler({0: csc}, np.array([0, 8]))
    sample = kernel.sample(np.array([2, 1]), (-1,), key=3)
    np.testing.assert_array_equal(sample.nodes[sample.src], [1, 2, 7, 3, 4, 5, 6])
    np.testing.assert_array_equal(sample.dst, [0, 0, 0, 1, 1, 1, 1])
    drawn = [set(kernel.sample(np.array([1]), (2,), key).nodes[1:].tolist()) for key in range(50)]
    assert all(len(pair) == 2 and pair < {3, 4, 5, 6} for pair in drawn)
    # Of the hole's node every draw finds id 0, which is itself.
    hub = kernel.sample(np.array([0]), (5,), key=3)
    assert (hub.nodes.tolist(), hub.src.tolist()) == ([0], [0] * 5)
    assert (tmp_path / "indices.npy").stat().st_blocks * 512 < 2**20
