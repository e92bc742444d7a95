"""The mean of neighbours against loops over sets of edges, however the graph is cut and however small the slices."""

import tempfile
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rbm_dist.graph import propagate
from rbm_dist.graph.csc import Csc
from rbm_dist.graph.propagate import batches, in_degree, mean_of_neighbours
from rbm_dist.graph.splits import TEST, TRAIN, UNSEEN
from rbm_dist.graph.store import GraphStore
from rbm_dist.sources.source import SourceGraph
from tests.graph.reference import Graph, graphs
from tests.small_graph import write_graph

WIDTH = 3


def stored(url: str, csc: Csc, split: np.ndarray, part_N: np.ndarray) -> tuple[GraphStore, np.ndarray]:
    """A store with an array `x`, and its rows by the input's ids, `[N, WIDTH]`."""
    num_nodes = csc.num_nodes
    label, feat = np.zeros(num_nodes, np.int64), np.zeros((num_nodes, 1), np.float32)
    graph = SourceGraph(csc, 1, 1, label, split.astype(np.int8), lambda: iter([feat]), 0, 0, 0)
    store = write_graph(url, graph, part_N.astype(np.int32))
    x_ND = np.random.default_rng(0).normal(size=(num_nodes, WIDTH)).astype(np.float32)
    files = [
        store.write_part("x", part, np.dtype(np.float32), (WIDTH,), [x_ND[store.array("orig_id", part)]])
        for part in range(store.num_parts)
    ]
    store.publish("x", files)
    return store, x_ND


@given(graph=graphs(), data=st.data(), rows=st.integers(1, 4))
def test_against_brute_force(graph: Graph, data: st.DataObject, rows: int) -> None:
    num_nodes = graph.num_nodes

    def of_each(values: list[int]) -> np.ndarray:
        return np.array(data.draw(st.lists(st.sampled_from(values), min_size=num_nodes, max_size=num_nodes)))

    split = of_each([TRAIN, TEST, UNSEEN])
    ids = np.array(data.draw(st.lists(st.integers(0, num_nodes - 1), max_size=2 * num_nodes)), np.int64)
    with tempfile.TemporaryDirectory() as url, patch.object(propagate, "_BYTES", rows * 4 * WIDTH):
        store, x_ND = stored(url, graph.csc(), split, of_each([0, 1, 3]))
        for observed_only in (False, True):
            means = mean_of_neighbours(store, "x", ids, observed_only)
            assert means.dtype == np.float32
            assert means.shape == (len(ids), WIDTH)
            degrees = in_degree(store, ids, observed_only)
            for mean, degree, node in zip(means, degrees, store.gather("orig_id", ids), strict=True):
                counted = [src for src in graph.in_neighbours(node) if not observed_only or split[src] != UNSEEN]
                expected = x_ND[counted].mean(0) if counted else np.zeros(WIDTH)
                np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6)
                assert degree == len(counted)


def test_a_hub_is_summed_in_bounded_slices(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    num_nodes, rows = 500, 32
    hub = Csc(np.concatenate([[0], np.full(num_nodes, num_nodes - 1)]), np.arange(1, num_nodes, dtype=np.int32))
    store, x_ND = stored(str(tmp_path), hub, np.zeros(num_nodes), np.zeros(num_nodes))
    monkeypatch.setattr(propagate, "_BYTES", rows * 4 * WIDTH)
    asked, gather = [], store.gather

    def recording(name: str, ids: np.ndarray) -> np.ndarray:
        asked.append(len(ids))
        return gather(name, ids)

    monkeypatch.setattr(store, "gather", recording)
    np.testing.assert_allclose(mean_of_neighbours(store, "x", np.arange(2))[0], x_ND[1:].mean(0), rtol=1e-5, atol=1e-6)
    assert sum(asked) == num_nodes - 1
    assert max(asked) <= rows


def test_batches_are_bounded_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(propagate, "_BYTES", 1000)
    ids = np.arange(7, 107)
    found = list(batches(ids, 25))
    assert max(map(len, found)) == 10
    np.testing.assert_array_equal(np.concatenate(found), ids)
    assert len(next(batches(ids, 10_000))) == 1, "one row at least"
    assert list(batches(ids[:0], 25)) == []
