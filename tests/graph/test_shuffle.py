"""Shards on disk: laid end to end, the parts are the graph's CSC under the renumbering, with every row at its node."""

import hashlib
import itertools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from rbm_dist.graph import shards, shuffle
from rbm_dist.graph.shuffle import Numbering
from rbm_dist.sources.source import SourceGraph
from rbm_dist.sources.staged import RowPieces, StagedSource, write_source
from tests.graph.reference import Graph, graphs
from tests.small_graph import with_sparse_features, write_shards


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
        read_edges=0,
        dropped_self_loops=0,
        dropped_duplicates=0,
    )
    return source, feat


def write(folder: Path, source: SourceGraph, part_N: np.ndarray, num_parts: int) -> None:
    staged = StagedSource.open(f"{folder}/source", write_source(f"{folder}/source", source))
    write_shards(f"{folder}/graph", staged, part_N, num_parts, source.num_classes)


@settings(max_examples=40)
@given(data=st.data(), graph=graphs(), num_parts=st.integers(1, 5), rows=st.integers(1, 20), seed=st.integers(0, 2**32))
def test_parts_laid_end_to_end_are_the_graph(
    data: st.DataObject, graph: Graph, num_parts: int, rows: int, seed: int
) -> None:
    assignment = st.lists(st.integers(0, num_parts - 1), min_size=graph.num_nodes, max_size=graph.num_nodes)
    part_N = np.array(data.draw(assignment), np.int32)
    source, feat = with_rows(graph, seed)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "_CHUNK_ROWS", rows)
        patch.setattr(shuffle, "_CHUNK_EDGES", 2 * rows)
        write(Path(folder), source, part_N, num_parts)
        assert not Path(folder, "graph", "spill").exists()
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
    write(tmp_path, source, np.array([1, 0, 2, 1, 0, 2], np.int32), 3)
    index = json.loads((tmp_path / "graph" / "graph.json").read_text())
    files = index["files"]
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
    files = write_source(str(tmp_path), source)
    staged = StagedSource.open(str(tmp_path), files)
    np.testing.assert_array_equal(staged.feat[0:6], feat)
    np.testing.assert_array_equal(staged.per_row["label"], source.label)
    np.testing.assert_array_equal(staged.per_row["split"], source.split)
    np.testing.assert_array_equal(staged.indptr, source.csc.indptr)
    np.testing.assert_array_equal(staged.indices, source.csc.indices)


def test_a_staged_source_of_sparse_features(tmp_path: Path) -> None:
    source, _ = with_rows(Graph(6, frozenset({(0, 1), (4, 2)})), seed=0)
    source = replace(with_sparse_features(source), orig_id=np.array([2, 3, 5, 7, 11, 13]))
    staged = StagedSource.open(str(tmp_path), write_source(str(tmp_path), source))
    some, every = (staged.feat[slice(0, stop)] for stop in (2, staged.num_nodes))
    assert isinstance(every, sp.csr_array)
    assert not every.data.flags.writeable, "mapped, not copied"
    np.testing.assert_array_equal(some.toarray(), every.toarray()[:2])
    np.testing.assert_array_equal(every.toarray(), sp.vstack(list(source.feat_chunks())).toarray())
    write_shards(f"{tmp_path}/graph", staged, np.array([1, 0, 0, 1, 0, 1]), 2, 4)
    for part, ids in enumerate(([3, 5, 11], [2, 7, 13])):
        found = np.load(tmp_path / "graph" / shards.part_name(part) / "orig_id.npy")
        np.testing.assert_array_equal(found, ids, "ids stay the input's")


@given(lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5), first=st.integers(0, 20), count=st.integers(0, 20))
def test_rows_of_several_pieces_are_those_of_one_array(lengths: list[int], first: int, count: int) -> None:
    whole = np.arange(sum(lengths) * 2).reshape(-1, 2)
    rows = RowPieces(np.split(whole, np.cumsum(lengths)[:-1]))
    assert rows.shape == whole.shape
    np.testing.assert_array_equal(rows[first : first + count], whole[first : first + count])


@given(degree=st.lists(st.integers(0, 9), min_size=1, max_size=40), rows=st.integers(1, 8), edges=st.integers(1, 12))
def test_chunks_are_small_and_cover_all_rows(degree: list[int], rows: int, edges: int) -> None:
    indptr = np.concatenate([[0], np.cumsum(degree)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shuffle, "_CHUNK_ROWS", rows)
        patch.setattr(shuffle, "_CHUNK_EDGES", edges)
        bounds = shuffle.chunk_bounds(indptr)
    assert (bounds[0], bounds[-1]) == (0, len(degree))
    for first, stop in itertools.pairwise(bounds):
        assert 1 <= stop - first <= rows
        assert indptr[stop] - indptr[first] <= edges or stop == first + 1


def test_a_shuffle_that_was_cut_off_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is finished is not done again, and the result is that of an undisturbed one."""
    source, _ = with_rows(Graph(40, frozenset((i, (i * 7 + 1) % 40) for i in range(39))), seed=1)
    part_N = np.arange(40) % 3
    write(tmp_path / "whole", source, part_N, 3)
    monkeypatch.setattr(shuffle, "_CHUNK_ROWS", 9)
    staged = StagedSource.open(f"{tmp_path}/source", write_source(f"{tmp_path}/source", source))
    real, made = shuffle._merge, []

    def fails_at_the_second(url: str, part: int, *rest: Any) -> Any:
        if part == 1 and not made.count(1):
            made.append(1)
            raise OSError("gone")
        made.append(part)
        return real(url, part, *rest)

    monkeypatch.setattr(shuffle, "_merge", fails_at_the_second)
    arguments = (f"{tmp_path}/graph", staged, part_N, 3, source.num_classes)
    with pytest.raises(OSError, match="gone"):
        write_shards(*arguments)
    monkeypatch.setattr(shuffle, "_spill", lambda *_: pytest.fail("a chunk was spilled again"))
    write_shards(*arguments)
    assert made == [0, 1, 1, 2], "part 0 was not merged again"
    whole, found = (json.loads((tmp_path / path / "graph.json").read_text()) for path in ("whole/graph", "graph"))
    assert found == whole


def test_a_part_is_told_of_its_own_slices_only(tmp_path: Path) -> None:
    source, feat = with_rows(Graph(12, frozenset((i, (i * 5 + 1) % 12) for i in range(12))), seed=1)
    staged = StagedSource.open(f"{tmp_path}/source", write_source(f"{tmp_path}/source", source))
    part_N = np.array([0, 0, 0, 1, 0, 1, 2, 1, 2, 2, 2, 1])
    numbering = Numbering.of(part_N, 4)
    spills = [shuffle.spill_chunk(f"{tmp_path}/spill", at, 3 * at, 3 * at + 3, staged, numbering) for at in range(4)]
    chunks = ({0, 1}, {1, 2, 3}, {2, 3}, set())  # of three rows each
    for part, expected in enumerate(chunks):
        slices = shuffle.plan_part(spills, part)
        assert set(slices) == {"degree", "indices", "feat", "label", "split", "orig_id"}
        for name, found in slices.items():
            assert {Path(url).parent.name for url, *_ in found} == {f"chunk-{chunk:05d}" for chunk in expected}, name
        rows = [np.load(url)[first:stop] for url, _, first, stop in slices["feat"]]
        np.testing.assert_array_equal(np.concatenate([feat[:0], *rows]), feat[part_N == part])


def test_numbering_maps_both_ways() -> None:
    part_N = np.random.default_rng(0).integers(0, 4, 50)
    numbering = Numbering.of(part_N, 6)
    np.testing.assert_array_equal(np.argsort(numbering.new_id), np.argsort(part_N, kind="stable"))
    np.testing.assert_array_equal(np.diff(numbering.offsets), [*np.bincount(part_N), 0, 0])
    assert numbering.new_id.dtype == np.int32
