"""Edges whose numbers do not fit 32 bits: a small graph behind a hole of 2³¹ edges, in sparse files, is that graph."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rbm_dist.graph import csc as csc_
from rbm_dist.graph import partition, sampler, shuffle, streaming
from rbm_dist.graph.csc import Csc
from rbm_dist.graph.partition_report import partition_report
from rbm_dist.graph.propagate import mean_of_neighbours
from rbm_dist.graph.store import GraphStore
from rbm_dist.sources import edges
from rbm_dist.sources.source import SourceGraph
from rbm_dist.sources.staged import StagedSource, write_source
from tests.small_graph import small_graph, write_graph

HOLE = (1 << 31) + 1000
NUM_PARTS = 2


def put_far(path: Path, array: np.ndarray, hole: int = HOLE) -> np.ndarray:
    """Write an array behind a hole of so many zeros, which take no space; gives the whole, mapped."""
    with open(path, "wb") as stream:
        header = {"descr": array.dtype.str, "fortran_order": False, "shape": (hole + len(array), *array.shape[1:])}
        np.lib.format.write_array_header_2_0(stream, header)
        stream.seek(hole * array[:1].nbytes, 1)
        array.tofile(stream)
    if path.stat().st_blocks * 512 > 2 * array.nbytes + (1 << 20):
        path.unlink()
        pytest.skip(f"the file system of {path.parent} has no sparse files")
    return np.load(path, mmap_mode="r")


@pytest.fixture(scope="module")
def graph() -> SourceGraph:
    """240 nodes, 12 features."""
    return small_graph()


@pytest.fixture
def far(tmp_path: Path, graph: SourceGraph) -> Csc:
    """The graph's edges behind the hole, which is nobody's."""
    return Csc(graph.csc.indptr + HOLE, put_far(tmp_path / "indices.npy", graph.csc.indices))


def behind_a_hub(folder: Path) -> None:
    """Give the first node of a folder's CSC so many more in-edges, all from node 0, before its own and all others."""
    indptr, indices = (np.load(folder / f"{name}.npy") for name in ("indptr", "indices"))
    indptr[1:] += HOLE
    np.save(folder / "indptr.npy", indptr)
    put_far(folder / "indices.npy", indices)


def assignment(graph: SourceGraph) -> np.ndarray:
    return (np.arange(graph.csc.num_nodes) % 3 == 0).astype(np.int32)


@pytest.fixture
def stores(tmp_path: Path, graph: SourceGraph, monkeypatch: pytest.MonkeyPatch) -> tuple[GraphStore, GraphStore]:
    """The graph in two parts; and again, the first node of the second part being a hub."""
    near = write_graph(str(tmp_path / "near"), graph, assignment(graph))
    far = write_graph(str(tmp_path / "far"), graph, assignment(graph))
    behind_a_hub(Path(far.url, "part-00001"))
    monkeypatch.setattr(csc_, "problem", lambda *_: None)  # it reads all edges, which takes seconds
    return near, GraphStore.open(far.url)


@pytest.mark.parametrize("fanout", [(-1,), (2,)])
def test_samples(stores: tuple[GraphStore, GraphStore], fanout: tuple[int, ...]) -> None:
    near, far = stores
    hub = int(far.offsets[1])
    seeds = np.delete(np.arange(near.num_nodes), hub)[::-1]
    expected, found = (store.sample(seeds, fanout, key=7) for store in (near, far))
    for name in ("nodes", "src", "dst"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert int(far.array("indptr", 1)[1]) > 1 << 31


def test_a_sample_of_a_hub(stores: tuple[GraphStore, GraphStore]) -> None:
    far = stores[1]
    sample = far.sample(np.array([far.offsets[1]]), (8,), key=7)
    assert (sample.nodes.tolist(), sample.src.tolist()) == ([far.offsets[1], 0], [1] * 8)


def test_every_edge_of_a_hub_is_drawn_alike() -> None:
    degree, width = 3 << 30, 900
    counts, at = np.array([width]), np.array([0])
    picked = sampler._pick(np.array([0, degree]), np.array([5]), at, np.int64(5), counts, np.uint64(3))
    assert len(np.unique(picked)) == width
    assert 0 <= picked.min() < picked.max() < degree
    assert abs(np.mean(picked >= 1 << 31) - 1 / 3) < 0.06


def test_propagation(stores: tuple[GraphStore, GraphStore]) -> None:
    near, far = stores
    ids = np.delete(np.arange(near.num_nodes), far.offsets[1])
    np.testing.assert_array_equal(*(mean_of_neighbours(store, "feat", ids) for store in stores))


def test_rows_of_arrays_of_more_than_2_31_values(stores: tuple[GraphStore, GraphStore]) -> None:
    store, width = stores[0], 1 << 25
    for part in range(NUM_PARTS):
        last = np.zeros((1, width), np.int8)
        last[0, -1] = part + 1
        array = put_far(Path(store.url, f"part-{part:05d}", "wide.npy"), last, len(store.ids(part)) - 1)
        assert array.size > 1 << 31
    store.publish("wide", [{}] * NUM_PARTS)
    rows = store.gather("wide", store.offsets[[2, 1]] - 1)
    assert (rows[:, -1].tolist(), rows[:, 0].tolist()) == ([2, 1], [0, 0])


def test_the_shuffle(tmp_path: Path, graph: SourceGraph) -> None:
    numbering = shuffle.Numbering.of(assignment(graph), NUM_PARTS)
    spills = []
    for name in ("near", "far"):
        url = tmp_path / name
        files = write_source(str(url), graph)
        if name == "far":
            behind_a_hub(url)
        source = StagedSource.open(str(url), files)
        spill = shuffle.spill_chunk(f"{url}/spill", 1, 1, graph.csc.num_nodes, source, numbering)
        spills.append((
            {array: info for array, (_, info) in spill.files.items()},
            {array: starts.tolist() for array, starts in spill.starts.items()},
        ))  # fmt: skip
    assert spills[1] == spills[0]
    assert shuffle.chunk_bounds(source.indptr[:]).tolist() == [0, 1, graph.csc.num_nodes]


def test_merges_of_sorted_runs(tmp_path: Path, graph: SourceGraph) -> None:
    chunk = graph.csc.indices, csc_.destinations(graph.csc)
    (run,) = edges.write_runs(f"{tmp_path}/run", [chunk], graph.csc.num_nodes, False, None)
    put_far(tmp_path / "far.npy", np.load(tmp_path / run.name))
    (wanted,) = edges.plan_merges([run], graph.csc.num_nodes)
    ((_, info, first, stop),) = wanted.slices
    far = replace(wanted, slices=[("far.npy", info, first + HOLE, stop + HOLE)])
    csc, given = edges.merge(str(tmp_path), far, graph.csc.num_nodes)
    np.testing.assert_array_equal(csc.indptr, graph.csc.indptr)
    np.testing.assert_array_equal(csc.indices, graph.csc.indices)
    assert given == graph.csc.num_edges


def test_merges_are_planned_in_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edges, "MERGED_EDGES", 3 * HOLE)
    runs = [edges.Run(name, {}, 4 * HOLE, 0, 0, [HOLE, 2 * HOLE, 3 * HOLE, 4 * HOLE]) for name in ("a", "b")]
    slices = [[(first, stop) for *_, first, stop in wanted.slices] for wanted in edges.plan_merges(runs, 4)]
    assert slices == [[(at * HOLE, (at + 1) * HOLE)] * 2 for at in range(4)]


def test_partitioners_and_their_report(far: Csc, graph: SourceGraph) -> None:
    part_N = streaming.stream(far, 4, 0.0, 3, seed=1)
    np.testing.assert_array_equal(part_N, streaming.stream(graph.csc, 4, 0.0, 3, seed=1))
    heavy = streaming.stream(graph.csc, 4, 0.0, 3, seed=1, per_node=1 << 32)
    np.testing.assert_array_equal(part_N, heavy, err_msg="weights do not fit 32 bits")
    found, expected = (partition_report(csc, part_N, 4) for csc in (far, graph.csc))
    assert {**found, "cut_share": 0} == {**expected, "cut_share": 0}


def test_the_file_for_kaminpar(tmp_path: Path, graph: SourceGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its offsets and weights; the hub's edges themselves would be 8 GiB on disk."""
    write_source(str(tmp_path), graph)
    behind_a_hub(tmp_path)
    csc = Csc(*(np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("indptr", "indices")))
    monkeypatch.setattr(partition, "_chunks", lambda array: [array] if array is csc.indptr else [])
    with open(tmp_path / "graph.parhip", "wb") as stream:
        partition._write_parhip(stream, csc, "edges", symmetric=True)
    words = np.fromfile(tmp_path / "graph.parhip", np.int64)
    num_nodes = csc.num_nodes
    assert words[:3].tolist() == [1 | 8, num_nodes, HOLE + graph.csc.num_edges]
    first = 8 * (3 + num_nodes + 1)
    np.testing.assert_array_equal((words[3 : 4 + num_nodes] - first) // 4, csc.indptr)
    np.testing.assert_array_equal(words[4 + num_nodes :] - 1, np.diff(csc.indptr))
