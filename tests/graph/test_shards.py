"""Shards on disk: laid end to end, the parts are the graph's CSC under the renumbering, with every row at its node."""

import hashlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import networkx as nx
import numpy as np
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from rbm_dist.graph import shards
from rbm_dist.graph.shards import Numbering, StagedSource
from rbm_dist.graph.source import SourceGraph
from tests.graph.reference import Graph, graphs
from tests.small_graph import with_sparse_features


def with_rows(graph: Graph, seed: int) -> tuple[SourceGraph, np.ndarray]:
    """A graph with random rows, and its features."""
    rng = np.random.default_rng(seed)
    feat = rng.normal(size=(graph.num_nodes, 3)).astype(np.float32)
    source = SourceGraph(
        csc=graph.csc(),
        num_features=3,
        num_classes=4,
        label=rng.integers(-1, 4, graph.num_nodes),
        split=rng.integers(-1, 3, graph.num_nodes).astype(np.int8),
        feat_chunks=lambda: iter(np.array_split(feat, 2)),
        dropped_self_loops=0,
        dropped_duplicates=0,
    )
    return source, feat


def write(folder: Path, source: SourceGraph, part_N: np.ndarray, num_parts: int) -> dict[str, dict]:
    staged = StagedSource.open(f"{folder}/source", shards.write_source(f"{folder}/source", source))
    numbering = Numbering.of(part_N, num_parts)
    files: dict[str, dict] = {}
    for part in range(num_parts):
        files |= shards.write_part(f"{folder}/graph", part, staged, numbering)
    shards.write_index(f"{folder}/graph", numbering, staged, source.num_classes, files, edge_cut=0)
    return files


@settings(max_examples=40)
@given(data=st.data(), graph=graphs(), num_parts=st.integers(1, 5), seed=st.integers(0, 2**32))
def test_parts_laid_end_to_end_are_the_graph(data: st.DataObject, graph: Graph, num_parts: int, seed: int) -> None:
    assignment = st.lists(st.integers(0, num_parts - 1), min_size=graph.num_nodes, max_size=graph.num_nodes)
    part_N = np.array(data.draw(assignment), np.int32)
    source, feat = with_rows(graph, seed)
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), source, part_N, num_parts)
        parts = [
            {file.stem: np.load(file) for file in Path(folder, "graph", f"part-{part:05d}").glob("*.npy")}
            for part in range(num_parts)
        ]
        index = json.loads(Path(folder, "graph", "graph.json").read_text())
    orig_id = np.concatenate([part["orig_id"] for part in parts])
    assert sorted(orig_id) == list(range(graph.num_nodes))
    # A part owns one contiguous range of ids, in the order of the source's ids.
    sizes = np.bincount(part_N, minlength=num_parts)
    assert index["offsets"] == [0, *np.cumsum(sizes).tolist()]
    for part, arrays in enumerate(parts):
        np.testing.assert_array_equal(arrays["orig_id"], np.flatnonzero(part_N == part))
    # The structure, against scipy's permutation of the source's adjacency.
    src, dst = np.array(sorted(graph.edges), int).reshape(-1, 2).T
    adjacency = sp.csc_array((np.ones(len(src)), (src, dst)), shape=(graph.num_nodes,) * 2)
    expected = sp.csc_array(adjacency[orig_id][:, orig_id])
    expected.sort_indices()
    lengths = np.concatenate([np.diff(part["indptr"]) for part in parts])
    indices = np.concatenate([part["indices"] for part in parts])
    np.testing.assert_array_equal(lengths, np.diff(expected.indptr))
    np.testing.assert_array_equal(indices, expected.indices)
    # The same again with networkx: every edge exactly once, under the ids that orig_id gives back.
    own = np.repeat(np.arange(graph.num_nodes), lengths)
    relabelled = nx.relabel_nodes(nx.DiGraph(graph.edges), {int(old): new for new, old in enumerate(orig_id)})
    assert sorted(zip(indices.tolist(), own.tolist(), strict=True)) == sorted(relabelled.edges)
    # Every row at its node.
    for name, rows in (("feat", feat), ("label", source.label), ("split", source.split)):
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), rows[orig_id])
    assert (index["num_nodes"], index["num_edges"]) == (graph.num_nodes, len(graph.edges))


def test_the_index_describes_every_file(tmp_path: Path) -> None:
    graph = Graph(6, frozenset({(0, 1), (1, 0), (4, 2), (5, 2)}))
    source, _ = with_rows(graph, seed=0)
    files = write(tmp_path, source, np.array([1, 0, 2, 1, 0, 2], np.int32), 3)
    index = json.loads((tmp_path / "graph" / "graph.json").read_text())
    assert index["files"] == files
    found = {path.relative_to(tmp_path / "graph").as_posix(): path for path in (tmp_path / "graph").rglob("*.npy")}
    assert set(found) == set(files)
    for name, path in found.items():
        content = path.read_bytes()
        assert files[name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert str(np.load(path).dtype) == index["dtypes"][path.stem]
    facts = {name: index[name] for name in ("version", "num_nodes", "num_edges", "num_features", "num_classes")}
    assert facts == {"version": 2, "num_nodes": 6, "num_edges": 4, "num_features": 3, "num_classes": 4}


def test_a_staged_source_keeps_the_sources_order(tmp_path: Path) -> None:
    source, feat = with_rows(Graph(6, frozenset({(0, 1), (4, 2)})), seed=0)
    files = shards.write_source(str(tmp_path), source)
    staged = StagedSource.open(str(tmp_path), files)
    np.testing.assert_array_equal(staged.feat, feat)
    np.testing.assert_array_equal(staged.label, source.label)
    np.testing.assert_array_equal(staged.split, source.split)
    np.testing.assert_array_equal(staged.csc.indptr, source.csc.indptr)
    np.testing.assert_array_equal(staged.csc.indices, source.csc.indices)


def test_a_staged_source_of_sparse_features(tmp_path: Path) -> None:
    source, _ = with_rows(Graph(6, frozenset({(0, 1), (4, 2)})), seed=0)
    source = replace(with_sparse_features(source), orig_id=np.array([2, 3, 5, 7, 11, 13]))
    staged = StagedSource.open(str(tmp_path), shards.write_source(str(tmp_path), source))
    assert isinstance(staged.feat, sp.csr_array)
    assert not staged.feat.data.flags.writeable, "mapped, not copied"
    np.testing.assert_array_equal(staged.feat.toarray(), sp.vstack(list(source.feat_chunks())).toarray())
    numbering = Numbering.of(np.array([1, 0, 0, 1, 0, 1]), 2)
    for part, ids in enumerate(([3, 5, 11], [2, 7, 13])):
        shards.write_part(f"{tmp_path}/graph", part, staged, numbering)
        found = np.load(tmp_path / "graph" / shards.part_name(part) / "orig_id.npy")
        np.testing.assert_array_equal(found, ids, "ids stay the input's")


def test_numbering_maps_both_ways() -> None:
    part_N = np.random.default_rng(0).integers(0, 4, 50)
    numbering = Numbering.of(part_N, 6)
    np.testing.assert_array_equal(numbering.order[numbering.new_id], np.arange(50))
    np.testing.assert_array_equal(np.diff(numbering.offsets), [*np.bincount(part_N), 0, 0])
    assert numbering.new_id.dtype == np.int32
