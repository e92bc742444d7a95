"""CSC from edge lists against sets of edges and scipy; what is refused as a compressed matrix."""

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st

from rbm_dist.graph.csc import build, destinations, id_dtype, problem
from tests.graph.reference import Graph, graphs

NODES = 9
EDGE_LISTS = st.lists(st.tuples(st.integers(0, NODES - 1), st.integers(0, NODES - 1)), max_size=60)


@given(edges=EDGE_LISTS, undirected=st.booleans())
def test_build_keeps_each_edge_once(edges: list[tuple[int, int]], undirected: bool) -> None:
    src, dst = np.array(edges, np.int64).reshape(-1, 2).T
    expected = {(u, v) for u, v in edges if u != v}
    if undirected:
        expected |= {(v, u) for u, v in expected}
    csc, reference = build(src, dst, NODES, undirected), Graph(NODES, frozenset(expected)).csc()
    np.testing.assert_array_equal(csc.indptr, reference.indptr)
    np.testing.assert_array_equal(csc.indices, reference.indices)
    assert (csc.num_nodes, csc.num_edges) == (NODES, len(expected))
    assert (csc.indptr.dtype, csc.indices.dtype) == (np.int64, np.int32)


@given(graph=graphs())
def test_destinations_and_sources_are_the_edges(graph: Graph) -> None:
    csc = graph.csc()
    links = sp.csc_array((np.ones(csc.num_edges), csc.indices, csc.indptr), shape=(graph.num_nodes,) * 2).tocoo()
    assert set(zip(links.row.tolist(), links.col.tolist(), strict=True)) == graph.edges
    np.testing.assert_array_equal(destinations(csc), links.col)


def test_ids_are_32_bit_while_they_fit() -> None:
    assert id_dtype(1) == np.int32
    assert id_dtype(2**31 - 1) == np.int32
    assert id_dtype(2**31 + 1) == np.int64


@given(graph=graphs())
def test_a_whole_matrix_has_no_problem(graph: Graph) -> None:
    csc = graph.csc()
    assert problem(csc.indptr, csc.indices, graph.num_nodes, graph.num_nodes) is None


@pytest.mark.parametrize(
    ("indptr", "indices", "reason"),
    [
        ([0.0, 1.0, 2.0], [0, 1], "must be integers"),
        ([0, 1, 2], [0.0, 1.0], "must be integers"),
        ([[0, 1, 2]], [0, 1], "one-dimensional"),
        ([0, 1, 2], [[0, 1]], "one-dimensional"),
        ([0, 2], [0, 1], "2 entries, 2 rows need 3"),
        ([1, 1, 2], [0, 1], "runs from 1 to 2"),
        ([0, 1, 3], [0, 1], "runs from 0 to 3, but there are 2"),
        ([0, 3, 2], [0, 1], "decreases after row 1"),
        (np.array([0, 3, 2], np.uint64), [0, 1], "decreases after row 1"),
        ([0, 1, 2], [0, 5], "1 indices are out of range, first 5 (valid: 0 to 4)"),
        ([0, 1, 2], [-1, 9], "2 indices are out of range, first -1"),
    ],
)
def test_problem_says_what_is_wrong(indptr: object, indices: object, reason: str) -> None:
    found = problem(np.asarray(indptr), np.asarray(indices), num_nodes=2, num_sources=5)
    assert found is not None
    assert reason in found
