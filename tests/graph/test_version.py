"""New versions of a graph against sets of edges, and how far a change reaches against paths that networkx finds."""

import tempfile
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.graph import shuffle, version
from rbm_dist.graph.changes import Changes, edge_list, no_rows
from rbm_dist.graph.csc import Csc
from rbm_dist.graph.partition_report import partition_report
from rbm_dist.graph.reach import reach
from rbm_dist.graph.store import GraphStore
from tests.graph.reference import Graph, graphs
from tests.graph.test_shuffle import with_rows
from tests.small_graph import small_graph, with_sparse_features, write_graph


def write_version(url: Path | str, store: GraphStore, changes: Changes) -> GraphStore:
    """All of the new version, in this process; changes as they are kept on disk."""
    changes = Changes.open(f"{url}/changes", changes.write(f"{url}/changes"))
    index = storage.read_json(f"{store.url}/graph.json")
    offsets, added = version.new_offsets(store, changes.num_new, index.get("added_parts", 0))
    parts = [version.write_part(f"{url}/graph", store, part, offsets, changes, 0) for part in range(len(offsets) - 1)]
    version.write_index(f"{url}/graph", store, index, offsets, added, parts, 0)
    return GraphStore.open(f"{url}/graph", verify=True)


def changes_of(
    store: GraphStore, num_new: int, added: set[tuple[int, int]], dropped: set[tuple[int, int]], changed: list[int]
) -> Changes:
    """Edges are (source, destination). Rows are drawn."""
    rng = np.random.default_rng(num_new)

    def rows(count: int) -> np.ndarray | sp.csr_array:
        feat = rng.normal(size=(count, store.num_features)).astype(np.float32)
        return sp.csr_array(np.where(feat > 0.5, feat, 0)) if store.sparse_features else feat

    new = {
        "label": rng.integers(-1, 3, num_new), "split": rng.integers(-1, 3, num_new).astype(np.int8),
        "orig_id": store.num_nodes + 100 + np.arange(num_new),
    }  # fmt: skip
    lists = (edge_list(*np.array(sorted(each), np.int64).reshape(-1, 2).T[::-1]) for each in (added, dropped))
    return Changes(new, rows(num_new), *lists, np.array(sorted(changed), np.int64), rows(len(changed)))


def edges_of(store: GraphStore) -> set[tuple[int, int]]:
    edges: list[tuple[int, int]] = []
    for part in range(store.num_parts):
        indptr, indices = store.array("indptr", part), store.array("indices", part)
        for at, node in enumerate(store.ids(part).tolist()):
            own = indices[indptr[at] : indptr[at + 1]].tolist()
            assert own == sorted(own)
            edges += [(source, node) for source in own]
    assert len(edges) == len(set(edges)) == store.num_edges
    return set(edges)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), graph=graphs(), num_parts=st.integers(1, 4), num_new=st.integers(0, 5), seed=st.integers(0, 99))
def test_a_version_has_the_edges_and_rows_that_it_should(
    data: st.DataObject, graph: Graph, num_parts: int, num_new: int, seed: int
) -> None:
    total = graph.num_nodes + num_new
    pairs = st.tuples(st.integers(0, total - 1), st.integers(0, total - 1)).filter(lambda pair: pair[0] != pair[1])
    added = data.draw(st.sets(pairs, max_size=20)) if total > 1 else set()
    dropped = data.draw(st.sets(pairs, max_size=20)) - added if total > 1 else set()
    changed = data.draw(st.lists(st.integers(0, graph.num_nodes - 1), unique=True, max_size=4))
    source, _ = with_rows(graph, seed)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "_CHUNK_ROWS", 3)
        patch.setattr(version, "_ROWS", 3)
        part_n = np.sort(np.arange(graph.num_nodes) % num_parts).astype(np.int32)
        old = write_graph(f"{folder}/old", source, part_n)
        before = edges_of(old)
        changes = changes_of(old, num_new, added, dropped, changed)
        new = write_version(Path(folder) / "new", old, changes)
        assert edges_of(new) == (before | added) - dropped
        counted = storage.read_json(f"{new.url}/graph.json")["update"]
        assert counted == {"added": len(added - before), "dropped": len(dropped & before)}
        ids = np.arange(new.num_nodes)
        rows = np.concatenate([old.gather("feat", ids[: old.num_nodes]), changes.new_feat])
        rows[changes.changed_c] = changes.changed_feat
        np.testing.assert_array_equal(new.gather("feat", ids), rows)
        for name, values in changes.new.items():
            expected = np.concatenate([old.gather(name, ids[: old.num_nodes]), values])
            np.testing.assert_array_equal(new.gather(name, ids), expected)
        part_N = np.repeat(np.arange(new.num_parts), np.diff(new.offsets)).astype(np.int32)
        whole = sorted(edges_of(new), key=lambda edge: edge[::-1])
        indptr = np.concatenate([[0], np.cumsum(np.bincount([dst for _, dst in whole], minlength=total))]).astype(
            np.int64
        )
        csc = Csc(indptr, np.array([src for src, _ in whole], np.int32))
        assert storage.read_json(f"{new.url}/graph.json")["partition"] == partition_report(csc, part_N, new.num_parts)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), graph=graphs(), hops=st.integers(1, 4))
def test_a_change_reaches_along_paths(data: st.DataObject, graph: Graph, hops: int) -> None:
    node = st.integers(0, graph.num_nodes - 1)
    rows, edited = data.draw(st.sets(node, max_size=3)), data.draw(st.sets(node, max_size=3))
    whole = nx.DiGraph()
    whole.add_nodes_from(range(graph.num_nodes))
    whole.add_edges_from(graph.edges)
    expected = np.full(graph.num_nodes, -1)
    for at in range(graph.num_nodes):
        far = nx.single_source_shortest_path_length(whole.reverse(), at, cutoff=hops)
        ways = [length for start, length in far.items() if start in rows]
        ways += [length + 1 for start, length in far.items() if start in edited]
        if ways and min(ways) <= hops:
            expected[at] = min(ways)

    class Store:
        num_nodes, num_parts, offsets = graph.num_nodes, 1, np.array([0, graph.num_nodes])

        def array(self, name: str, part: int) -> np.ndarray:
            return getattr(graph.csc(), name)

    found = reach(Store(), np.array(sorted(rows), np.int64), np.array(sorted(edited), np.int64), hops)  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, expected)


def test_files_that_do_not_change_are_the_old_ones(tmp_path: Path) -> None:
    graph = small_graph()
    old = write_graph(f"{tmp_path}/old", graph, np.sort(np.arange(240) % 3).astype(np.int32))
    node = int(old.offsets[1])  # of the second part
    gone = int(old.array("indices", 1)[0])
    new = write_version(tmp_path / "new", old, changes_of(old, 2, {(node + 1, 240)}, {(gone, node)}, []))
    same = {
        str(path.relative_to(f"{tmp_path}/old/graph"))
        for path in Path(old.url).rglob("*.npy")
        if path.stat().st_ino == (Path(new.url) / path.relative_to(old.url)).stat().st_ino
    }
    every = {str(path.relative_to(old.url)) for path in Path(old.url).rglob("*.npy")}
    assert every - same == {"part-00001/indptr.npy", "part-00001/indices.npy"}
    assert sorted(path.name for path in (Path(new.url) / "part-00003").iterdir()) == sorted(
        path.name for path in (Path(old.url) / "part-00000").iterdir()
    )


def test_versions_on_object_storage_are_whole_without_the_one_before(s3_url: str) -> None:
    old = write_graph(f"{s3_url}/old", small_graph(), np.sort(np.arange(240) % 3).astype(np.int32))
    before = edges_of(old)
    changes = changes_of(old, 2, {(5, 240), (240, 5)}, set(), [7])
    write_version(f"{s3_url}/new", old, changes)
    storage.remove(f"{s3_url}/old")
    new = GraphStore.open(f"{s3_url}/new/graph", verify=True)
    assert edges_of(new) == before | {(5, 240), (240, 5)}
    np.testing.assert_array_equal(
        new.gather("feat", np.array([7, 240, 241])), np.concatenate([changes.changed_feat, changes.new_feat])
    )


def test_new_nodes_of_several_versions_share_a_part_until_it_is_as_large_as_others(tmp_path: Path) -> None:
    store = write_graph(f"{tmp_path}/0", small_graph(), np.sort(np.arange(240) % 3).astype(np.int32))  # 80 nodes each
    for number, parts in enumerate((4, 4, 5), 1):
        store = write_version(tmp_path / str(number), store, changes_of(store, 40, set(), set(), []))
        assert store.num_parts == parts
    assert np.diff(store.offsets).tolist() == [80, 80, 80, 80, 40]
    assert storage.read_json(f"{store.url}/graph.json")["added_parts"] == 2


@pytest.mark.parametrize("features", ["float32", "float16", "int8", "sparse"])
def test_features_are_stored_as_the_others_are(tmp_path: Path, features: str) -> None:
    graph = with_sparse_features(small_graph()) if features == "sparse" else small_graph()
    dtype = "float32" if features == "sparse" else features
    old = write_graph(f"{tmp_path}/old", graph, np.sort(np.arange(240) % 3).astype(np.int32), dtype)
    changes = changes_of(old, 4, set(), set(), [5, 100])
    new = write_version(tmp_path / "new", old, changes)
    expected = np.concatenate([each.toarray() if sp.issparse(each) else each for each in graph.feat_chunks()])
    some = [
        np.asarray(each.todense() if sp.issparse(each) else each) for each in (changes.changed_feat, changes.new_feat)
    ]
    expected[[5, 100]] = some[0]
    expected = np.concatenate([expected, some[1]])
    error: float | np.ndarray = 0.0
    if features == "int8":  # beyond the largest magnitude of its column there are no steps
        scale = new.feat_scale
        assert scale is not None
        expected, error = np.clip(expected, -127 * scale, 127 * scale), scale / 2 + 1e-6
    elif features == "float16":
        error = np.abs(expected) * 2**-11 + 1e-7
    assert np.all(np.abs(new.gather("feat", np.arange(244)) - expected) <= error)


def test_features_beyond_float16_are_refused(tmp_path: Path) -> None:
    old = write_graph(f"{tmp_path}/old", small_graph(), np.zeros(240, np.int32), "float16")
    feat = np.full((1, old.num_features), 1e6, np.float32)
    changes = changes_of(old, 1, set(), set(), [])
    huge = Changes(changes.new, feat, changes.added_m2, changes.dropped_m2, changes.changed_c, changes.changed_feat)
    with pytest.raises(InputError, match="float16 reaches to"):
        write_version(tmp_path / "new", old, huge)


def test_more_nodes_than_ids_reach_are_refused(tmp_path: Path) -> None:
    old = write_graph(f"{tmp_path}/old", small_graph(), np.zeros(240, np.int32))
    with pytest.raises(InputError, match="32-bit ids"):
        version.new_offsets(old, 1 << 31, 0)
    assert no_rows(3, True).shape == (0, 3)


@settings(max_examples=40, deadline=None)
@given(old=st.integers(0, 30), new=st.integers(0, 10), piece=st.integers(1, 5), seed=st.integers(0, 99))
def test_rows_are_replaced_and_added(old: int, new: int, piece: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    before = rng.normal(size=(old, 2)).astype(np.float32)
    at = np.concatenate([np.flatnonzero(rng.random(old) < 0.3), old + np.arange(new)])
    rows = rng.normal(size=(len(at), 2)).astype(np.float32)
    expected = np.concatenate([before, np.zeros((new, 2), np.float32)])
    expected[at] = rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(version, "_BYTES", 8 * 4)
        pieces = iter([rows[start : start + piece] for start in range(0, len(rows), piece)])
        found = list(version.replaced(before, at, pieces, old + new))
    np.testing.assert_array_equal(np.concatenate([np.empty((0, 2), np.float32), *found]), expected)
