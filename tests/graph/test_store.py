"""The store against the arrays it was written from, on local disk, in memory and on S3; damage is named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.graph.sampler import NumbaSampler
from rbm_dist.graph.shards import SPARSE_FEAT
from rbm_dist.graph.store import GraphStore
from rbm_dist.sources.source import SourceGraph
from tests.graph.reference import Graph, check_sample
from tests.small_graph import small_graph, with_sparse_features, write_graph

NUM_PARTS = 3


@pytest.fixture(scope="module")
def graph() -> SourceGraph:
    """A small graph with features, labels and a split."""
    return small_graph(num_nodes=60)


def assignment(graph: SourceGraph) -> np.ndarray:
    return np.random.default_rng(5).choice(NUM_PARTS, graph.csc.num_nodes, p=[0.2, 0.3, 0.5]).astype(np.int32)


def order_of(part_N: np.ndarray) -> np.ndarray:
    """The input's id of each new id."""
    return np.argsort(part_N, kind="stable")


@pytest.fixture
def store(tmp_path: Path, graph: SourceGraph) -> GraphStore:
    """The small graph on local disk."""
    return write_graph(str(tmp_path), graph, assignment(graph))


def renumbered(graph: SourceGraph) -> Graph:
    """The graph under the new ids, by brute force."""
    new_id, indptr = np.argsort(order_of(assignment(graph))).tolist(), graph.csc.indptr
    return Graph(
        graph.csc.num_nodes,
        frozenset(
            (new_id[src], new_id[dst])
            for dst in range(graph.csc.num_nodes)
            for src in graph.csc.indices[indptr[dst] : indptr[dst + 1]]
        ),
    )


def test_a_store_is_the_graph_on_every_kind_of_storage(url: str, graph: SourceGraph) -> None:
    store = write_graph(url, graph, assignment(graph))
    store = GraphStore.open(store.url, verify=True)
    assert (store.num_nodes, store.num_edges, store.num_parts) == (60, graph.csc.num_edges, NUM_PARTS)
    assert (store.num_features, store.num_classes) == (graph.num_features, graph.num_classes)
    feat = next(graph.feat_chunks())
    for part in range(NUM_PARTS):
        nodes = np.flatnonzero(assignment(graph) == part)
        np.testing.assert_array_equal(store.array("orig_id", part), nodes)
        np.testing.assert_array_equal(store.array("feat", part), feat[nodes])
        np.testing.assert_array_equal(order_of(assignment(graph))[store.ids(part)], nodes)
    ids = np.array([59, 0, 17, 0, 30])
    np.testing.assert_array_equal(store.gather("feat", ids), feat[order_of(assignment(graph))[ids]])
    np.testing.assert_array_equal(store.gather("label", ids), graph.label[order_of(assignment(graph))[ids]])
    whole = renumbered(graph)
    sample = store.sample(np.array([59, 0, 17]), (3, -1), key=11)
    check_sample(whole, sample, [59, 0, 17], (3, -1))
    uncut = NumbaSampler({0: whole.csc()}, np.array([0, 60])).sample(np.array([59, 0, 17]), (3, -1), key=11)
    np.testing.assert_array_equal(sample.nodes, uncut.nodes)
    np.testing.assert_array_equal(sample.src, uncut.src)


@pytest.mark.parametrize("num_parts", [1, NUM_PARTS])
def test_gather_from_one_part_and_from_many(tmp_path: Path, graph: SourceGraph, num_parts: int) -> None:
    part_N = assignment(graph) % num_parts
    store, order = write_graph(str(tmp_path), graph, part_N), order_of(part_N)
    feat = next(graph.feat_chunks())
    ids = np.random.default_rng(1).integers(0, 60, 200)
    rows = store.gather("feat", ids)
    np.testing.assert_array_equal(rows, feat[order[ids]])
    rows[:] = 0  # a copy in memory, so the caller may
    assert store.gather("feat", np.empty(0, np.int64)).shape == (0, graph.num_features)
    for outside in ([-1], [3, 60]):
        with pytest.raises(ValueError, match=r"ids must lie in \[0, 60\)"):
            store.gather("feat", np.array(outside))


def test_stored_arrays_cannot_be_written_to(store: GraphStore) -> None:
    with pytest.raises(ValueError, match="read-only"):
        store.array("feat", 0)[0] = 1


def test_an_added_array_is_there_once_it_is_published(url: str, graph: SourceGraph) -> None:
    store = write_graph(url, graph, assignment(graph))
    rows = np.random.default_rng(2).normal(size=(60, 4)).astype(np.float32)
    files = []
    for part in range(NUM_PARTS):
        chunks = np.array_split(rows[store.ids(part)], 3)
        files.append(store.write_part("soft", part, np.dtype(np.float32), (4,), chunks))
    with pytest.raises(InputError, match="nodes have no array 'soft'"):
        store.gather("soft", np.arange(60))
    store.publish("soft", files)
    for opened in (store, GraphStore.open(store.url)):
        np.testing.assert_array_equal(opened.gather("soft", np.arange(60)), rows)
    # Written again: whoever forgets the old rows sees the new ones.
    files = [
        store.write_part("soft", part, np.dtype(np.float32), (4,), [rows[store.ids(part)] + 1])
        for part in range(NUM_PARTS)
    ]
    store.publish("soft", files)
    np.testing.assert_array_equal(store.gather("soft", np.arange(60)), rows + 1)


def test_a_part_takes_as_many_rows_as_it_has_nodes(store: GraphStore) -> None:
    with pytest.raises(ValueError, match="rows were written"):
        store.write_part("soft", 0, np.dtype(np.float32), (4,), [np.zeros((2, 4), np.float32)])
    assert not list(Path(store.url).rglob("soft*"))


def test_no_store_where_none_was_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"graph\.json: no such file"):
        GraphStore.open(str(tmp_path))


@pytest.mark.parametrize("content", ['{"version": 99}', "[]", '"graph"'])
def test_another_layout_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "graph.json").write_text(content)
    with pytest.raises(
        InputError, match=r"graph\.json: not a graph of layout version 2 or 3; partition the source again"
    ):
        GraphStore.open(str(tmp_path))


def test_a_damaged_index_is_refused(store: GraphStore) -> None:
    path = Path(store.url) / "graph.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"graph\.json: not valid JSON"):
        GraphStore.open(store.url)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(lambda content: content[:-8], "truncated or changed", id="truncated"),
        pytest.param(lambda content: content[:-1] + bytes([content[-1] ^ 1]), "damaged", id="flipped"),
        pytest.param(None, "missing", id="missing"),
    ],
)
def test_verify_finds_damage(url: str, graph: SourceGraph, damage: object, reason: str) -> None:
    store = write_graph(url, graph, assignment(graph))
    fs, path = storage.filesystem(f"{store.url}/part-00001/feat.npy")
    if callable(damage):
        fs.pipe_file(path, damage(fs.cat_file(path)))
    else:
        fs.rm_file(path)
    with pytest.raises(InputError, match=rf"part-00001/feat\.npy: {reason}"):
        GraphStore.open(store.url, verify=True)


def test_damage_on_s3_is_found_without_being_looked_for(s3_url: str, graph: SourceGraph) -> None:
    store = write_graph(s3_url, graph, assignment(graph))
    fs, path = storage.filesystem(f"{store.url}/part-00001/feat.npy")
    content = fs.cat_file(path)
    fs.pipe_file(path, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"part-00001/feat\.npy: damaged"):
        GraphStore.open(store.url).array("feat", 1)


def test_a_truncated_part_is_named(store: GraphStore) -> None:
    path = Path(store.url) / "part-00002" / "feat.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InputError, match=r"part-00002/feat\.npy: not a whole \.npy array"):
        store.gather("feat", np.arange(60))


def test_an_array_of_another_length_is_named(store: GraphStore) -> None:
    storage.write_array(f"{store.url}/part-00000/label.npy", np.zeros(3, np.int64))
    rows = len(store.ids(0))
    with pytest.raises(InputError, match=rf"part-00000/label\.npy: 3 rows, part 0 has {rows}"):
        store.array("label", 0)


def test_a_structure_that_points_outside_is_refused_before_it_is_sampled(store: GraphStore) -> None:
    indices = np.array(store.array("indices", 1))
    indices[4] = 60
    storage.write_array(f"{store.url}/part-00001/indices.npy", indices)
    with pytest.raises(InputError, match=r"part-00001: 1 indices are out of range, first 60"):
        GraphStore.open(store.url).sample(np.array([0]), (2,), key=0)


@pytest.fixture
def sparse_store(tmp_path: Path, graph: SourceGraph) -> GraphStore:
    """The small graph with features of mostly zeros."""
    return write_graph(str(tmp_path), with_sparse_features(graph), assignment(graph))


@pytest.mark.parametrize("num_parts", [1, NUM_PARTS])
def test_sparse_features_of_any_nodes(tmp_path: Path, graph: SourceGraph, num_parts: int) -> None:
    graph, part_N = with_sparse_features(graph), assignment(graph) % num_parts
    store, order = write_graph(str(tmp_path), graph, part_N), order_of(part_N)
    assert store.sparse_features
    feat = sp.vstack(list(graph.feat_chunks()), format="csr").toarray()
    rng = np.random.default_rng(1)
    pos = rng.normal(size=(60, 3)).astype(np.float32)
    files = [store.write_part("pos", part, pos.dtype, (3,), [pos[store.ids(part)]]) for part in range(num_parts)]
    store.publish("pos", files)
    assert (store.width(("feat",)), store.width(("pos", "feat"))) == (40, 43)
    for ids in (
        np.arange(60),
        rng.integers(0, 60, 200),
        rng.permutation(60)[:7],
        np.array([59]),
        np.empty(0, np.int64),
    ):
        rows = store.inputs(ids)
        assert sp.issparse(rows)
        assert (rows.dtype, rows.shape) == (np.float32, (len(ids), 40))
        np.testing.assert_array_equal(rows.toarray(), feat[order[ids]])
        np.testing.assert_array_equal(store.gather("feat", ids), feat[order[ids]])
        joined = store.inputs(ids, ("pos", "feat"))
        assert sp.issparse(joined)
        np.testing.assert_array_equal(joined.toarray(), np.concatenate([pos[ids], feat[order[ids]]], axis=1))
        np.testing.assert_array_equal(store.inputs(ids, ("pos",)), pos[ids])
    for outside in ([-1], [3, 60]):
        with pytest.raises(ValueError, match=r"ids must lie in \[0, 60\)"):
            store.inputs(np.array(outside))


def test_sparse_features_on_every_kind_of_storage(url: str, graph: SourceGraph) -> None:
    store = write_graph(url, with_sparse_features(graph), assignment(graph))
    files = storage.listdir(f"{store.url}/part-00000")
    assert files == [
        "feat_indices.npy", "feat_indptr.npy", "feat_shape.npy", "feat_values.npy",
        "indices.npy", "indptr.npy", "label.npy", "orig_id.npy", "split.npy",
    ]  # fmt: skip
    dtypes = storage.read_json(f"{store.url}/graph.json")["dtypes"]
    for file in files:
        assert str(store.array(file.removesuffix(".npy"), 0).dtype) == dtypes[file.removesuffix(".npy")]
    assert "feat" not in dtypes
    order = order_of(assignment(graph))
    feat = sp.vstack(list(with_sparse_features(graph).feat_chunks()), format="csr").toarray()
    reopened = GraphStore.open(store.url, verify=True)
    np.testing.assert_array_equal(reopened.gather("feat", np.arange(60)), feat[order])


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("feat_indices", lambda x: np.append(x[:-1], np.array(40, x.dtype)), "1 indices are out of range, first 40"),
        ("feat_indices", lambda x: x[:-2], "indptr runs from 0 to"),
        ("feat_indptr", lambda x: x[:-1], "rows need"),
        ("feat_values", lambda x: x[:-2], r"values of a matrix \[\d+, 40\], expected"),
        ("feat_shape", lambda x: x[::-1].copy(), r"values of a matrix \[40, \d+\], expected"),
        ("feat_shape", lambda x: x[:1], r"values of a matrix \[\d+\], expected"),
    ],
)
def test_damaged_sparse_features_are_refused(sparse_store: GraphStore, name: str, change: Any, reason: str) -> None:
    array = np.array(sparse_store.array(name, 1))
    storage.write_array(f"{sparse_store.url}/part-00001/{name}.npy", change(array))
    with pytest.raises(InputError, match=rf"part-00001: feat: .*{reason}"):
        GraphStore.open(sparse_store.url).inputs(np.arange(60))


@pytest.mark.parametrize("name", SPARSE_FEAT)
def test_a_truncated_or_missing_sparse_array_is_named(sparse_store: GraphStore, name: str) -> None:
    path = Path(sparse_store.url) / "part-00002" / f"{name}.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    with pytest.raises(InputError, match=rf"part-00002/{name}\.npy: not a whole \.npy array"):
        GraphStore.open(sparse_store.url).inputs(np.arange(60))
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=rf"part-00002/{name}\.npy: damaged"):
        GraphStore.open(sparse_store.url, verify=True)
    path.unlink()
    with pytest.raises(InputError, match=rf"part-00002/{name}\.npy: no such file"):
        GraphStore.open(sparse_store.url).inputs(np.arange(60))
