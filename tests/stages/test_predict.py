"""Predictions of a finished run: nodes that arrive later with their edges, the graph part by part, and on a cluster."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from rbm_dist.graph.splits import UNSEEN
from rbm_dist.graph.store import GraphStore
from rbm_dist.serve.tables import ReadOptions, open_tables
from rbm_dist.serve.unseen import EdgeOptions, Encoder, new_edges, open_known
from rbm_dist.stages import predict as predict_
from tests.patience import patient
from tests.stages.conftest import kill_once, rbm_dist
from tests.stages.test_pipeline import refused


@pytest.fixture(scope="module")
def unseen(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GraphStore, np.ndarray]:
    """The run's unseen nodes as new ones, in two files, with their edges; the graph, and which nodes these are."""
    folder, store = tmp_path_factory.mktemp("unseen"), GraphStore.open(f"{finished_run}/graph")
    every = np.arange(store.num_nodes)
    orig_id, nodes = store.gather("orig_id", every), np.flatnonzero(store.gather("split", every) == UNSEEN)
    pairs = []
    for part in range(store.num_parts):
        indptr, indices = store.array("indptr", part), store.array("indices", part)
        pairs.append((indices, np.repeat(store.ids(part), np.diff(indptr))))
    src, dst = (np.concatenate(ends) for ends in zip(*pairs, strict=True))
    mine = np.isin(dst, nodes)
    src, dst = orig_id[src[mine]], orig_id[dst[mine]]
    turned = np.random.default_rng(0).random(len(src)) < 0.5  # an edge has no direction
    table = {"src": np.where(turned, dst, src), "dst": np.where(turned, src, dst)}
    table = {name: np.concatenate([ends, ends[:99]]) for name, ends in table.items()}  # some twice
    (folder / "nodes").mkdir()
    for file, some in enumerate(np.array_split(nodes, 2)):
        pixels = load_digits().data[orig_id[some]].astype(np.float32)
        rows = {"name": orig_id[some], "feat": pa.FixedSizeListArray.from_arrays(pixels.reshape(-1), 64)}
        pq.write_table(pa.table(rows), folder / "nodes" / f"{file}.parquet")
    pq.write_table(pa.table(table), folder / "edges.parquet")
    return folder, store, nodes


def by_id(*files: Path) -> tuple[np.ndarray, np.ndarray]:
    table = pa.concat_tables(map(pq.read_table, files))
    ids = table["node_id"].to_numpy()
    order = np.argsort(ids)
    return ids[order], np.stack(table["probability"].to_pylist())[order]


def test_nodes_that_arrive_later_are_encoded_as_the_run_does(
    finished_run: Path, unseen: tuple[Path, GraphStore, np.ndarray]
) -> None:
    folder, store, nodes = unseen
    run, reading = str(finished_run), ReadOptions(id="name")
    student = predict_.load(run)
    tables = open_tables(f"{folder}/nodes", student.model, student.reader.column_types, reading)
    known = open_known(run, student.model)
    edges = new_edges(tables, known, EdgeOptions(f"{folder}/edges.parquet", run), reading)
    for own, some in zip(edges, np.array_split(nodes, 2), strict=True):
        found = Encoder(known, own, ["pos", "prop"])(3, len(some))
        for name in ("pos", "prop"):
            np.testing.assert_allclose(found[name], store.gather(name, some)[3:], atol=1e-6)


def test_their_predictions_are_those_of_the_run(
    finished_run: Path, unseen: tuple[Path, GraphStore, np.ndarray], tmp_path: Path
) -> None:
    folder, store, nodes = unseen
    exported, out = tmp_path / "student", tmp_path / "new.parquet"
    assert rbm_dist("export", str(finished_run), "--out", str(exported)).returncode == 0
    asked = [
        "predict",
        str(exported),
        "--nodes",
        f"{folder}/nodes",
        "--id",
        "name",
        "--edges",
        f"{folder}/edges.parquet",
    ]
    done = rbm_dist(*asked, "--graph", str(finished_run), "--out", str(out))
    assert done.returncode == 0, done.stderr
    whole = rbm_dist("predict", str(finished_run), "--out", str(tmp_path / "parts/"))
    assert whole.returncode == 0, whole.stderr
    every_id, every = by_id(*(tmp_path / "parts").glob("part-*.parquet"))
    assert every_id.tolist() == list(range(store.num_nodes))
    ids, found = by_id(out)
    np.testing.assert_array_equal(ids, np.sort(store.gather("orig_id", nodes)))
    np.testing.assert_allclose(found, every[ids], atol=1e-6)


def test_edges_are_needed_and_checked(
    finished_run: Path, unseen: tuple[Path, GraphStore, np.ndarray], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder, _, _ = unseen
    asked = [
        "predict",
        str(finished_run),
        "--nodes",
        f"{folder}/nodes",
        "--id",
        "name",
        "--out",
        f"{tmp_path}/x.parquet",
    ]
    assert "learned from 'pos' besides features" in refused(capsys, monkeypatch, *asked)
    pq.write_table(pa.table({"src": [1, 2], "dst": [3, 99_999]}), tmp_path / "far.parquet")
    asked += ["--edges", f"{tmp_path}/far.parquet"]
    message = refused(capsys, monkeypatch, *asked)
    assert "far.parquet: row 1, column dst: 99999 is neither a new node nor one of the graph's" in message
    assert "--unknown-nodes drop" in message
    assert "no column 'from'" in refused(capsys, monkeypatch, *asked, "--src", "from")
    (tmp_path / "twice").mkdir()
    for name in ("a", "b"):
        shutil.copy(folder / "nodes/0.parquet", tmp_path / "twice" / f"{name}.parquet")
    asked[3] = f"{tmp_path}/twice"
    assert "b.parquet: row 0: the node id" in refused(capsys, monkeypatch, *asked)
    assert not (tmp_path / "x.parquet").exists()


@pytest.mark.timeout(patient(600))
def test_on_a_cluster_files_are_tasks_and_a_killed_driver_is_gone_on_with(
    finished_run: Path, unseen: tuple[Path, GraphStore, np.ndarray], tmp_path: Path
) -> None:
    folder, _, _ = unseen
    big = pa.concat_tables([pq.read_table(folder / "nodes/0.parquet")] * 300)
    big = big.set_column(0, "name", pa.array(np.arange(10_000, 10_000 + len(big))))
    (tmp_path / "in").mkdir()
    for file in range(8):
        rows = big.set_column(0, "name", pa.array(np.arange(len(big)) + 10_000 + file * len(big)))
        pq.write_table(rows, tmp_path / "in" / f"{file}.parquet", row_group_size=2000)
    shutil.copy(folder / "nodes/0.parquet", tmp_path / "in" / "8.parquet")
    arguments = [
        "predict", str(finished_run), "--nodes", f"{tmp_path}/in", "--id", "name",
        "--edges", f"{folder}/edges.parquet", "--unknown-nodes", "drop",
    ]  # fmt: skip
    here, there = tmp_path / "here", tmp_path / "there"
    done = rbm_dist(*arguments, "--out", f"{here}/")
    assert done.returncode == 0, done.stderr
    cluster = [*arguments, "--out", f"{there}/", "--address", "local"]
    kill_once(lambda: any((there / "_work").glob("*.json")), *cluster)
    finished = {path: path.stat().st_mtime_ns for path in there.glob("*.parquet")}
    kept = [there / path.stem for path in (there / "_work").glob("*.json")]
    assert 0 < len(kept) < 9
    assert all(pq.read_metadata(path).num_rows for path in finished), "whole or not there"
    done = rbm_dist(*cluster)
    assert done.returncode == 0, done.stderr
    assert all(path.stat().st_mtime_ns == finished[path] for path in kept), "what was done is kept"
    names = sorted(path.name for path in there.iterdir())
    assert names == sorted(path.name for path in here.iterdir())
    for name in names:
        if name.endswith(".parquet"):
            one, other = by_id(here / name), by_id(there / name)
            np.testing.assert_array_equal(one[0], other[0])
            np.testing.assert_allclose(one[1], other[1], atol=1e-6)
    made = [json.loads((each / "predictions.json").read_text()) for each in (here, there)]
    assert made[0] == made[1]


def test_a_graph_on_a_cluster(finished_run: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here.parquet", tmp_path / "there"
    for out, more in ((here, []), (there, ["--address", "local"])):
        done = rbm_dist("predict", str(finished_run), "--out", str(out), *more)
        assert done.returncode == 0, done.stderr
    parts = sorted(there.glob("part-*.parquet"))
    assert len(parts) == 4
    one, other = by_id(here), by_id(*parts)
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_allclose(one[1], other[1], atol=1e-6)
