"""Edge lists to CSC by merging sorted runs: equal to scipy's matrix of the same edges, whatever the chunks."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from rbm_dist.errors import InputError
from rbm_dist.sources import edges


def merged(url: str, chunks: list, num_nodes: int, undirected: bool, unseen_N: np.ndarray) -> tuple[sp.csc_array, int]:
    runs = edges.write_runs(url, chunks, num_nodes, undirected, unseen_N)
    degrees, indices, given_edges = [], [], 0
    for wanted in edges.plan_merges(runs, num_nodes):
        csc, given_here = edges.merge(url.rsplit("/", 1)[0], wanted, num_nodes)
        degrees.append(np.diff(csc.indptr))
        indices.append(csc.indices)
        given_edges += given_here
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(degrees))])
    row = np.concatenate(indices)
    assert sum(run.given for run in runs) == sum(len(src) for src, _ in chunks)
    hidden = sum(np.sum((src != dst) & unseen_N[src] & ~unseen_N[dst]) for src, dst in chunks)
    assert sum(run.hidden for run in runs) == hidden
    return sp.csc_array((np.ones(len(row)), row, indptr), shape=(num_nodes, num_nodes)), given_edges


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_nodes=st.integers(1, 30), undirected=st.booleans(), run=st.integers(1, 9))
def test_runs_merge_to_the_matrix_of_the_edges(data: st.DataObject, num_nodes: int, undirected: bool, run: int) -> None:
    node = st.integers(0, num_nodes - 1)
    chunks = [
        (np.array([edge[0] for edge in chunk], np.int64), np.array([edge[1] for edge in chunk], np.int32))
        for chunk in data.draw(st.lists(st.lists(st.tuples(node, node), max_size=12), max_size=5))
    ]
    unseen_N = np.array(data.draw(st.lists(st.booleans(), min_size=num_nodes, max_size=num_nodes)))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(edges, "RUN_EDGES", run)
        patch.setattr(edges, "MERGED_EDGES", 2 * run)
        patch.setattr(edges, "_RANGES", 7)
        found, given_edges = merged(f"{folder}/run", chunks, num_nodes, undirected, unseen_N)
    links = {(int(u), int(v)) for src, dst in chunks for u, v in zip(src, dst, strict=True) if u != v}
    assert given_edges == sum(unseen_N[v] or not unseen_N[u] for u, v in links)
    if undirected:
        links |= {(v, u) for u, v in links}
    expected = {(u, v) for u, v in links if unseen_N[v] or not unseen_N[u]}
    assert set(zip(*(ends.tolist() for ends in found.nonzero()), strict=True)) == expected
    assert found.nnz == len(expected), "every edge once"
    for column in range(num_nodes):
        assert np.all(np.diff(found.indices[found.indptr[column] : found.indptr[column + 1]]) > 0)


def test_ids_near_the_limit_do_not_overflow(tmp_path: Path) -> None:
    """2³¹ nodes: a packed edge then uses all 63 bits."""
    num_nodes = edges.MAX_NODES
    last = num_nodes - 1
    chunks = [(np.array([last, 0, last - 1]), np.array([0, last, last]))]
    runs = edges.write_runs(str(tmp_path / "run"), chunks, num_nodes, True, None)
    words = np.load(tmp_path / runs[0].name)
    shift = edges._shift(num_nodes)
    found = sorted({(int(word >> 1) & (1 << (shift - 1)) - 1, int(word) >> shift) for word in words})
    assert found == sorted([(last, 0), (0, last), (last - 1, last), (last, last - 1)])
    assert runs[0].ends[-1] == len(words)


def test_more_nodes_than_a_word_holds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at most 2,147,483,648"):
        edges.write_runs(str(tmp_path / "run"), [], edges.MAX_NODES + 1, True, None)


@pytest.mark.parametrize("bad", [-1, 1000])
def test_an_id_out_of_range_is_refused(tmp_path: Path, bad: int) -> None:
    with pytest.raises(InputError, match=rf"1 node ids are out of range, first {bad} \(valid: 0 to 999\)"):
        edges.write_runs(str(tmp_path / "run"), [(np.array([1, bad]), np.array([2, 3]))], 1000, False, None)


def test_a_merge_holds_few_edges_but_for_one_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edges, "MERGED_EDGES", 50)
    hub = np.full(400, 7)
    rng = np.random.default_rng(0)
    chunks = [(np.arange(400) + 100, hub), (rng.integers(0, 1000, 300), rng.integers(0, 1000, 300))]
    runs = edges.write_runs(str(tmp_path / "run"), chunks, 1000, False, None)
    merges = edges.plan_merges(runs, 1000)
    for wanted in merges:
        assert sum(stop - first for *_, first, stop in wanted.slices) <= 50 or wanted.high == wanted.low + 1
    assert [wanted.low for wanted in merges] == [0, *(wanted.high for wanted in merges[:-1])]
    assert merges[-1].high == 1000
    assert len(merges) > 6
