"""The stage `source` for a graph that is read in pieces: what is staged is the graph, whatever was done before."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.errors import InputError
from rbm_dist.graph import csc
from rbm_dist.graph.splits import TEST, UNSEEN
from rbm_dist.sources import edges, source
from rbm_dist.sources.staged import StagedSource
from rbm_dist.sources.streamed import StreamedSource
from rbm_dist.stages.source import below, over_here, stage_source
from tests.sources import table_input
from tests.sources.pieces import read_edges, read_features

SOURCE = {
    "kind": "synthetic",
    "num_nodes": 3000,
    "num_features": 12,
    "num_classes": 4,
    "num_communities": 8,
    "degree": 9,
}


@pytest.fixture(autouse=True)
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many runs and merges even for a small graph."""
    monkeypatch.setattr(edges, "RUN_EDGES", 4000)
    monkeypatch.setattr(edges, "MERGED_EDGES", 5000)


def config(**changes: Any) -> Config:
    return Config.model_validate({"run_dir": "x", "seed": 3, "source": SOURCE | changes})


def staged(folder: Path, settings: Config) -> StagedSource:
    return StagedSource.open(str(folder), below(stage_source(settings, str(folder), over_here), "source"))


def opened(settings: Config) -> StreamedSource:
    return source.open_streamed(settings.source, settings.seed, "unused")


@pytest.mark.parametrize("undirected", [True, False])
def test_what_is_staged_is_the_graph(tmp_path: Path, undirected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config()
    graph = opened(settings)
    if not undirected:
        one_way = StreamedSource(**{**graph.__dict__, "undirected": False})
        monkeypatch.setattr(source, "open_streamed", lambda *_: one_way)
    found = staged(tmp_path, settings)
    src, dst = read_edges(graph)
    expected = csc.build(src, dst, 3000, undirected)
    np.testing.assert_array_equal(found.indptr, expected.indptr)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_array_equal(found.per_row["label"], graph.nodes().label)
    np.testing.assert_array_equal(found.feat[0:3000], read_features(graph).astype(np.float32))
    facts = storage.read_json(f"{tmp_path}/source.json")
    distinct = len({(u, v) for u, v in zip(src.tolist(), dst.tolist(), strict=True) if u != v})
    assert facts["dropped_self_loops"] == np.sum(src == dst)
    assert facts["dropped_duplicates"] == np.sum(src != dst) - distinct
    assert (facts["num_nodes"], facts["num_edges"]) == (3000, expected.num_edges)
    assert not (tmp_path / "work").exists()


def test_unseen_nodes_cannot_be_reached(tmp_path: Path) -> None:
    whole, found = staged(tmp_path / "whole", config()), staged(tmp_path / "hidden", config(unseen_share=0.5))
    unseen = found.per_row["split"] == UNSEEN
    assert unseen.sum() == round(0.5 * np.sum(whole.per_row["split"] == TEST))
    assert np.all(whole.per_row["split"][unseen] == TEST)

    def links(graph: StagedSource) -> set[tuple[int, int]]:
        edges = graph.edges(slice(0, graph.num_nodes))
        return set(zip(edges.indices.tolist(), csc.destinations(edges).tolist(), strict=True))

    assert links(found) == {(u, v) for u, v in links(whole) if unseen[v] or not unseen[u]}
    assert len(links(found)) < len(links(whole))


def test_rows_are_scaled(tmp_path: Path) -> None:
    plain, scaled = staged(tmp_path / "a", config(normalize="none")), staged(tmp_path / "b", config(normalize="row"))
    every = slice(0, 3000)
    rows = plain.features(every)
    np.testing.assert_array_equal(rows, plain.feat[every])
    np.testing.assert_allclose(scaled.features(every), rows / np.abs(rows).sum(1, keepdims=True), rtol=1e-5)


def test_a_feature_that_is_no_number_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = opened(config())

    def spoilt(piece: int) -> Any:
        for rows in graph.feat(piece):
            rows = rows.copy()
            rows[17, 5] = np.nan
            yield rows

    monkeypatch.setattr(source, "open_streamed", lambda *_: StreamedSource(**{**graph.__dict__, "feat": spoilt}))
    with pytest.raises(InputError, match=r"1 features are NaN, infinite or beyond float32; .* row 17, column 5"):
        stage_source(config(), str(tmp_path), over_here)


def test_cut_off_while_it_tidies_up_it_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stage_source(config(), str(tmp_path / "whole"), over_here)

    def cut_off(url: str) -> None:
        for path in [*Path(url).glob("*.npy"), *Path(url).glob("merge-*.json")]:  # in an order of its own
            path.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage.files, "remove", cut_off)
        with pytest.raises(KeyboardInterrupt):
            stage_source(config(), str(tmp_path / "cut"), over_here)
    assert stage_source(config(), str(tmp_path / "cut"), over_here) == whole
    assert not (tmp_path / "cut" / "work").exists()


def test_a_stage_that_was_cut_off_and_moved_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staged(tmp_path / "whole", config())
    real, calls = edges.merge, []

    def fails_once(url: str, wanted: edges.Merge, num_nodes: int) -> Any:
        calls.append(wanted.low)
        if len(calls) == 3:
            raise OSError("gone")
        return real(url, wanted, num_nodes)

    monkeypatch.setattr(edges, "merge", fails_once)
    with pytest.raises(OSError, match="gone"):
        stage_source(config(), str(tmp_path / "cut"), over_here)
    monkeypatch.setattr(edges, "write_runs", lambda *_: pytest.fail("edges were sorted again"))
    moved = tmp_path / "moved"
    (tmp_path / "cut").rename(moved)
    files = stage_source(config(), str(moved), over_here)
    assert len(calls) == len(set(calls)) + 1, "only the merge that failed was done twice"
    for name, info in files.items():
        assert storage.file_info(str(tmp_path / "whole" / name.removeprefix("source/"))) == info


def save_tables(folder: Path, num_nodes: int) -> dict[str, Any]:
    ids = np.arange(num_nodes)
    table_input.save(f"{folder}/nodes.parquet", {"id": ids + 7, "label": ids % 3, "x": ids / 8})
    table_input.save(f"{folder}/edges.csv", {"src": ids + 7, "dst": (ids + 1) % num_nodes + 7})
    return {"kind": "tables", "nodes": f"{folder}/nodes.parquet", "edges": f"{folder}/edges.csv"}


def save_pyg(folder: Path, num_nodes: int) -> dict[str, Any]:
    ids = torch.arange(num_nodes)
    links = torch.stack([ids, (ids + 1) % num_nodes])
    torch.save(Data(x=ids[:, None] / 8, y=ids % 3, edge_index=links), folder / "data.pt")
    return {"kind": "pyg", "path": f"{folder}/data.pt"}


@pytest.mark.parametrize("save", [save_tables, save_pyg])
def test_input_that_was_changed_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, save: Any
) -> None:
    run, calls, write_runs = tmp_path / "run", [], edges.write_runs

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return write_runs(*arguments)

    def fails(*_: Any) -> Any:
        raise OSError("gone")

    monkeypatch.setattr(edges, "write_runs", counted)
    settings = Config.model_validate({"run_dir": "x", "source": save(tmp_path, 300)})
    with monkeypatch.context() as patch:
        patch.setattr(edges, "merge", fails)
        for _ in range(2):
            with pytest.raises(OSError, match="gone"):
                stage_source(settings, str(run), over_here)
    assert len(calls) == 1, "the same files need not be read again"
    assert not caplog.records
    save(tmp_path, 240)
    files = stage_source(settings, str(run), over_here)
    assert "the input's files were changed" in caplog.text
    assert storage.read_json(f"{run}/source.json")["num_nodes"] == 240
    assert files == stage_source(settings, str(tmp_path / "anew"), over_here)
    assert files == {name: storage.file_info(f"{run}/{name.removeprefix('source/')}") for name in files}
