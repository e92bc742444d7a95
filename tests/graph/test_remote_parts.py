"""A store of which other hosts hold some parts gives exactly what one gives that holds them all."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbm_dist.graph import csc as csc_
from rbm_dist.graph.presampling import fill_hot
from rbm_dist.graph.store import GraphStore
from tests.graph.other_host import OtherHost
from tests.small_graph import small_graph, small_store, with_sparse_features, write_graph

NUM_PARTS = 4


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A graph of 240 nodes in four parts."""
    return small_store(str(tmp_path_factory.mktemp("graph")), NUM_PARTS).url


@pytest.fixture(scope="module")
def sparse_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with sparse features."""
    graph = with_sparse_features(small_graph())
    part_N = np.random.default_rng(3).integers(0, NUM_PARTS, graph.csc.num_nodes)
    return write_graph(str(tmp_path_factory.mktemp("sparse")), graph, part_N).url


held = st.sets(st.integers(0, NUM_PARTS - 1))
some_ids = st.lists(st.integers(0, 239), max_size=40).map(lambda ids: np.array(ids, np.int64))


@given(held=held, ids=some_ids)
def test_rows(url: str, held: set[int], ids: np.ndarray) -> None:
    whole, other = GraphStore.open(url), OtherHost(url)
    partial = GraphStore.open(url, parts=held, remote=other)
    assert partial.held_parts == sorted(held)
    for name in ("feat", "label", "soft"):
        np.testing.assert_array_equal(partial.gather(name, ids), whole.gather(name, ids))
    assert not any(part in held for asked in other.asked for part in whole.owner(asked)), "asked for what is here"
    assert partial.width(("feat", "soft")) == whole.width(("feat", "soft"))


@given(held=held, ids=some_ids)
def test_sparse_rows(sparse_url: str, held: set[int], ids: np.ndarray) -> None:
    whole, partial = GraphStore.open(sparse_url), GraphStore.open(sparse_url, parts=held, remote=OtherHost(sparse_url))
    rows = partial.inputs(ids)
    assert not isinstance(rows, np.ndarray)
    np.testing.assert_array_equal(rows.toarray(), whole.gather("feat", ids))
    np.testing.assert_array_equal(partial.gather("feat", ids), whole.gather("feat", ids))


def test_rows_travel_as_they_are_stored(tmp_path: Path) -> None:
    part_N = np.random.default_rng(3).integers(0, NUM_PARTS, 240)
    url, ids = write_graph(str(tmp_path), small_graph(), part_N, "int8").url, np.arange(0, 240, 3)
    whole, partial = GraphStore.open(url), GraphStore.open(url, parts=[2], remote=OtherHost(url))
    assert partial.stored_rows("feat", ids).dtype == np.int8
    np.testing.assert_array_equal(partial.gather("feat", ids), whole.gather("feat", ids))
    fill_hot(partial, "feat", 10**6, [(whole.ids(2)[:20], 1)], (-1, -1))
    assert partial.hot is not None
    assert partial.hot.find(ids)[1].dtype == np.int8
    np.testing.assert_array_equal(partial.gather("feat", ids), whole.gather("feat", ids))


@given(held=held, seeds=st.sets(st.integers(0, 239), max_size=20), fanout=st.sampled_from([(2,), (3, -1), (4, 3, 2)]))
def test_samples(url: str, held: set[int], seeds: set[int], fanout: tuple[int, ...]) -> None:
    seeds_s = np.array(sorted(seeds), np.int64)
    expected = GraphStore.open(url).sample(seeds_s, fanout, key=2**63 + 5)
    found = GraphStore.open(url, parts=held, remote=OtherHost(url)).sample(seeds_s, fanout, key=2**63 + 5)
    for name in ("nodes", "src", "dst"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert (found.nodes_per_hop, found.edges_per_hop) == (expected.nodes_per_hop, expected.edges_per_hop)


def test_a_part_that_is_held_later_is_read_here(url: str) -> None:
    other, ids = OtherHost(url), np.arange(240)
    store = GraphStore.open(url, parts=[0], remote=other)
    store.sample(ids, (2,), key=1)
    store.hold(range(NUM_PARTS))
    other.asked.clear()
    expected = GraphStore.open(url)
    np.testing.assert_array_equal(store.sample(ids, (2,), key=1).nodes, expected.sample(ids, (2,), key=1).nodes)
    np.testing.assert_array_equal(store.gather("feat", ids), expected.gather("feat", ids))
    assert not other.asked


def test_edges_are_checked_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    problem = csc_.problem

    def counting(indptr: np.ndarray, *arguments: Any) -> str | None:
        checked.append(len(indptr) - 1)
        return problem(indptr, *arguments)

    monkeypatch.setattr(csc_, "problem", counting)
    store = GraphStore.open(url, parts=[0], remote=OtherHost(url))
    for part in (1, 0, 2, 1):
        store.hold([part])
        store.sample(store.ids(part)[:2], (1,), key=0)
    mine = [len(store.ids(part)) for part in (0, 1, 2)]
    assert sorted(each for each in checked if each in mine) == sorted(mine)


def test_a_part_that_nobody_holds_is_named(url: str) -> None:
    store = GraphStore.open(url, parts=[0, 2, 3])
    with pytest.raises(ValueError, match="part 1 is not held here"):
        store.gather("label", store.ids(1))
    with pytest.raises(ValueError, match="part 1 is not held here"):
        store.sample(store.ids(1)[:3], (2,), key=0)


def test_arrays_of_other_parts_are_read_from_storage(url: str) -> None:
    store = GraphStore.open(url, parts=[], remote=OtherHost(url))
    np.testing.assert_array_equal(store.array("split", 3), GraphStore.open(url).array("split", 3))
