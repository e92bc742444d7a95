"""Runs that go on from another when its graph has changed."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from rbm_dist import storage
from rbm_dist.config.load import updated
from rbm_dist.config.run import Config
from rbm_dist.config.update import UpdateConfig
from rbm_dist.errors import InputError
from rbm_dist.graph.reach import LEARN, TOUCHED
from rbm_dist.graph.splits import UNSEEN
from rbm_dist.graph.store import GraphStore
from rbm_dist.stages.local import MetricsRecorder, over_parts_here
from rbm_dist.stages.pipeline import STAGES
from rbm_dist.stages.run import Run
from rbm_dist.stages.soft_labels import reset_soft_labels, write_soft_labels
from rbm_dist.stages.source import over_here
from rbm_dist.stages.update import (
    run_changes,
    run_version,
    update_stages,
    usable_before,
    write_learn,
    write_touched,
)
from tests.graph.test_version import changes_of, write_version
from tests.stages.conftest import kill_once, rbm_dist
from tests.stages.test_soft_label_arrays import GRAPHS, prepare

ARRAYS = ("soft", "hidden", "entropy_change")


def update_of(before: Run, url: Path) -> Run:
    """A run of a graph with three new nodes, a few edges more and less, and other features of two nodes."""
    store = GraphStore.open(before.graph_url)
    gone = {(int(store.array("indices", part)[0]), int(store.offsets[part])) for part in (0, 2)}
    new = store.num_nodes
    changes = changes_of(store, 3, {(new, 5), (5, new), (new + 1, 100), (17, 9)}, gone, [30, 200])
    write_version(url, store, changes)
    files = changes.write(f"{url}/source")
    files["changes.json"] = storage.write_json(f"{url}/source/changes.json", {"nodes_before": new, "share": 0.05})
    files = {f"source/{name}": info for name, info in files.items()}
    storage.write_json(f"{url}/source/manifest.json", {"files": files})
    storage.link(before.path("teacher", "model.safetensors"), f"{url}/teacher/model.safetensors")
    config = before.config.model_copy(
        update={"run_dir": str(url), "update": UpdateConfig(run=before.url, add_edges="edges.parquet")}
    )
    return Run(config, str(url), MetricsRecorder())


def rows(run: Run, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    store = GraphStore.open(run.graph_url)
    return {name: store.gather(name, np.arange(store.num_nodes)) for name in names}


@pytest.mark.parametrize(
    ("features", "conv", "settings"),
    [
        ("dense", "sage", {"inference": "exact", "keep_layers": True}),
        ("sparse", "sage", {"inference": "exact", "keep_layers": True, "store": "float16"}),
        ("dense", "gat", {"inference": "exact", "keep_layers": True}),
        ("dense", "gcn", {"inference": "exact", "keep_layers": True}),
        # With fewer neighbours, who else is in a batch decides what is drawn: another sample of the same.
        ("dense", "sage", {"inference": "sampled"}),
    ],
)
def test_rows_are_those_of_a_computation_of_all(
    tmp_path: Path, features: str, conv: str, settings: dict[str, Any]
) -> None:
    layers = 2 if conv == "gcn" else 3  # a change of degrees reaches a hop further
    before, _ = prepare(tmp_path / "before", GRAPHS[features], 3, layers, **settings)
    teacher = before.config.teacher.model_copy(update={"conv": conv, "heads": 2})
    before = Run(before.config.model_copy(update={"teacher": teacher}), before.url, before.reporter)
    if conv != "sage":
        _other_teacher(before)
    write_soft_labels(before, over_parts_here)
    run = update_of(before, tmp_path / "after")
    write_touched(run)
    since = usable_before(run)
    assert since is not None
    write_soft_labels(run, over_parts_here, before=since)
    touched = rows(run, (TOUCHED,))[TOUCHED]
    kept = rows(run, ARRAYS)
    old = rows(before, ARRAYS)
    assert 0 < np.sum(touched[:240] < 0) < 240
    for name in ARRAYS:
        same = np.isclose(kept[name][:240], old[name], rtol=0, atol=0).reshape(240, -1).all(axis=1)
        assert same[touched[:240] < 0].all()
        assert not same[touched[:240] == 0].any()
    reset_soft_labels(run.url)
    write_soft_labels(run, over_parts_here)
    for name, found in rows(run, ARRAYS).items():
        np.testing.assert_allclose(kept[name], found, rtol=0, atol=2e-6)


def _other_teacher(run: Run) -> None:
    from rbm_dist.models.teacher import build_teacher
    from rbm_dist.serve.artifact import save_weights

    store = GraphStore.open(run.graph_url)
    save_weights(run.path("teacher", "model.safetensors"), build_teacher(run.config, store.num_features, 5))


def test_without_kept_layers_all_is_computed(tmp_path: Path) -> None:
    before, _ = prepare(tmp_path / "before", GRAPHS["dense"], 3, 2, inference="exact")
    write_soft_labels(before, over_parts_here)
    run = update_of(before, tmp_path / "after")
    assert usable_before(run) is None


def test_students_learn_from_what_moved_and_as_many_others(tmp_path: Path) -> None:
    before, _ = prepare(tmp_path / "before", GRAPHS["dense"], 3, 1, inference="exact", hidden=False)
    write_soft_labels(before, over_parts_here)
    run = update_of(before, tmp_path / "after")
    write_touched(run)
    write_soft_labels(run, over_parts_here, before=usable_before(run))
    made = write_learn(run, kept=True)
    found, old = rows(run, ("soft", TOUCHED, LEARN)), rows(before, ("soft",))["soft"]
    moved = np.concatenate([np.abs(found["soft"][:240] - old).max(axis=1) > 0.05, [True] * 3])
    moved[[30, 200]] = True  # have other features
    assert 5 < moved.sum() < np.sum(found[TOUCHED] >= 0)
    assert found[LEARN][moved].all()
    assert 0.5 < found[LEARN][~moved].sum() / moved.sum() < 1.5
    assert "graph/part-00003/learn.npy" in made
    facts = storage.read_json(f"{run.url}/soft_labels/changed_labels.json")
    assert facts["moved"] == moved.sum()
    assert facts["reached"] == [5, np.sum(found[TOUCHED] >= 0)]
    assert facts["other_class"] == np.sum(found["soft"][:240].argmax(1) != old.argmax(1))


def test_what_decides_a_stage_of_an_update() -> None:
    def config(**changes: Any) -> Config:
        return Config(run_dir="runs/b", update=UpdateConfig(**{"run": "runs/a", "add_edges": "e.csv"} | changes))

    def differing(**changes: Any) -> list[str]:
        return [
            stage.name
            for stage in update_stages(STAGES)
            if stage.identity(config()) != stage.identity(config(**changes))
        ]

    assert differing(epochs=9) == ["student"]
    assert differing(anew_above=0.5) == ["teacher"]
    assert differing(drop_edges="f.csv") == ["source"]


@pytest.fixture(scope="module")
def tables(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nodes that are new to the finished run, with labels; edges for them, and one that goes; other features of two."""
    folder = tmp_path_factory.mktemp("tables")
    digits = load_digits()
    pixels = digits.data.astype(np.float32)

    def node_table(name: str, ids: list[int], images: list[int], **columns: Any) -> None:
        feat = pa.FixedSizeListArray.from_arrays(pixels[images].reshape(-1), 64)
        pq.write_table(pa.table({"id": ids, "feat": feat, **columns}), folder / name)

    new, images = list(range(5000, 5012)), list(range(12))
    node_table("new.parquet", new, images, label=digits.target[images], split=["test"] * 12)
    node_table("others.parquet", [7, 3], [8, 4])
    edges = {"src": [*new, *new], "dst": [*images, *(image + 30 for image in images)]}
    pq.write_table(pa.table(edges), folder / "edges.parquet")
    store = GraphStore.open(f"{finished_run}/graph")
    orig = store.gather("orig_id", np.arange(store.num_nodes))
    seen = store.gather("split", np.arange(store.num_nodes)) != UNSEEN  # then its reverse is an edge, too
    node = int(np.flatnonzero(seen)[0])
    gone = {"src": [int(orig[next(each for each in sources(store, node) if seen[each])])], "dst": [int(orig[node])]}
    pq.write_table(pa.table(gone), folder / "gone.parquet")
    return folder


def sources(store: GraphStore, node: int) -> list[int]:
    """A node's in-neighbours."""
    part = int(store.owner(np.array([node]))[0])
    at = node - store.offsets[part]
    return store.array("indices", part)[slice(*store.array("indptr", part)[at : at + 2])].tolist()


def arguments(run: Path, out: Path, tables: Path, *more: str) -> list[str]:
    given = {"add-nodes": "new", "add-edges": "edges", "drop-edges": "gone", "features": "others"}
    options = [each for name, file in given.items() for each in (f"--{name}", f"{tables}/{file}.parquet")]
    return ["update", str(run), "--out", str(out), "--id", "id", "--epochs", "2", *options, *more]


def contents(run: Path) -> dict[str, tuple[int, bytes]]:
    files = sorted(path for path in run.rglob("*") if path.is_file())
    return {str(path.relative_to(run)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.mark.slow
def test_an_update_that_was_killed_goes_on_and_leaves_the_run_before_as_it_was(
    finished_run: Path, tables: Path, tmp_path: Path
) -> None:
    before, out = contents(finished_run), tmp_path / "updated"
    kill_once(lambda: (out / "soft_labels" / "config.json").exists(), *arguments(finished_run, out, tables))
    assert contents(finished_run) == before
    done = rbm_dist(*arguments(finished_run, out, tables))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "partition: done before" in done.stdout
    assert contents(finished_run) == before
    results = json.loads((out / "results.json").read_text())
    said = " ".join(done.stdout.split())
    assert "nodes 1,797 → 1,809" in said
    assert f"{_expected_edges(finished_run)} in-edges new, 2 gone" in said
    assert f"teacher {json.loads((finished_run / 'results.json').read_text())['teacher']['val']:.1%} →" in said
    store = GraphStore.open(f"{out}/graph", verify=True)
    assert store.num_nodes == 1809
    assert store.gather("split", np.arange(1797, 1809)).tolist() == [2] * 12
    scaled = store.gather("feat", np.arange(1797, 1809))  # as those of the images that they are copies of
    orig = store.gather("orig_id", np.arange(store.num_nodes))
    place = {node: at for at, node in enumerate(orig.tolist())}
    np.testing.assert_allclose(scaled[9], store.gather("feat", np.array([place[9]]))[0], atol=1e-6)
    assert set(results["students"]) == {"mlp", "rbm"}
    learned = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {row["loop"] for row in learned} == {"mlp", "rbm"}
    assert max(row["epoch"] for row in learned) == 1
    teacher = [path / "teacher" / "model.safetensors" for path in (finished_run, out)]
    assert os.path.samefile(*teacher)
    again = rbm_dist(*arguments(finished_run, out, tables))
    assert "evaluate: done before" in again.stdout
    # The new run is whole on its own, and can be gone on from.
    predicted = rbm_dist("predict", str(out), "--out", f"{tmp_path}/all.parquet")
    assert predicted.returncode == 0, predicted.stderr
    assert pq.read_table(tmp_path / "all.parquet").num_rows == 1809
    report = rbm_dist("report", str(out))
    assert report.returncode == 0, report.stderr


def _expected_edges(run: Path) -> int:
    """Both directions of 24 edges, but for those from unseen nodes to others."""
    store = GraphStore.open(f"{run}/graph")
    every = np.arange(store.num_nodes)
    unseen = store.gather("orig_id", every)[store.gather("split", every) == UNSEEN]
    return 48 - int(np.isin([*range(12), *range(30, 42)], unseen).sum())


def config_of(run: Path, out: Path, **changes: Any) -> Config:
    return updated(str(run), str(out), UpdateConfig(run=str(run), id="id", **changes))


def new_version(config: Config) -> GraphStore:
    """The stages `source` and `partition`, in this process."""
    run = Run(config, config.run_dir, MetricsRecorder())
    storage.write_json(run.path("source", "manifest.json"), {"files": run_changes(run, over_here)})
    run_version(run, over_here)
    return GraphStore.open(run.graph_url, verify=True)


def test_tables_become_a_new_version(finished_run: Path, tables: Path, tmp_path: Path) -> None:
    files = {"add_nodes": "new", "add_edges": "edges", "drop_edges": "gone", "features": "others"}
    config = config_of(finished_run, tmp_path, **{key: f"{tables}/{name}.parquet" for key, name in files.items()})
    store, before = new_version(config), GraphStore.open(f"{finished_run}/graph")
    assert store.num_edges == before.num_edges + _expected_edges(finished_run) - 2
    every = np.arange(store.num_nodes)
    orig = store.gather("orig_id", every)
    place = {node: at for at, node in enumerate(orig.tolist())}
    assert orig[1797:].tolist() == list(range(5000, 5012))
    assert store.gather("split", every)[1797:].tolist() == [2] * 12
    assert store.gather("label", every)[1797:].tolist() == load_digits().target[:12].tolist()
    feat = store.gather("feat", every)
    np.testing.assert_allclose(feat[1797 + 9], feat[place[9]], atol=1e-6)  # a copy of its image
    np.testing.assert_allclose(feat[place[7]], feat[place[8]], atol=1e-6)  # has the features of that now
    facts = storage.read_json(f"{tmp_path}/source/changes.json")
    directly = {place[node] for node in (7, 3)} | {*range(1797, 1809)}
    directly |= {node for node in range(1797) if sources(store, node) != sources(before, node)}
    assert facts["share"] == pytest.approx(len(directly) / 1809)


@pytest.mark.parametrize(
    ("change", "columns", "message"),
    [
        ("add_nodes", {"id": [3]}, "row 0.*node id 3 is also that of a node of the graph"),
        ("add_nodes", {"id": [6000, 6000]}, "node id 6000 is also that of"),
        ("add_nodes", {"id": [6000], "label": [10]}, "the graph has no class 10; its classes are 0 to 9"),
        ("add_nodes", {"id": [6000], "label": [-2]}, "the graph has no class -2"),
        ("add_nodes", {"id": [6000], "label": ["cat"]}, "the graph has no class 'cat'"),
        ("add_nodes", {"id": [6000], "split": ["test"]}, "is in a split but has no label"),
        ("features", {"id": [6000]}, "the graph has no node 6000"),
        ("features", {"id": [3, 3]}, "row 1: the node is given twice"),
        ("add_edges", {"src": [1], "dst": [7000]}, "column dst: 7000 is neither a new node nor"),
        ("add_edges", {"from": [1], "dst": [2]}, "no column 'src'"),
        ("add_edges", {"src": ["a"], "dst": [2]}, "column src: 'a' is neither a new node nor"),
    ],
)
def test_tables_that_cannot_be_are_refused(
    finished_run: Path, tmp_path: Path, change: str, columns: dict[str, list], message: str
) -> None:
    table = dict(columns)
    if "id" in columns:
        table["feat"] = [[1.0] * 64] * len(columns["id"])
    pq.write_table(pa.table(table), tmp_path / "table.parquet")
    config = config_of(finished_run, tmp_path / "out", **{change: f"{tmp_path}/table.parquet"})
    with pytest.raises(InputError, match=message):
        run_changes(Run(config, config.run_dir, MetricsRecorder()), over_here)


def test_an_edge_that_is_new_and_gone_is_refused(finished_run: Path, tables: Path, tmp_path: Path) -> None:
    same = f"{tables}/gone.parquet"
    config = config_of(finished_run, tmp_path / "out", add_edges=same, drop_edges=same)
    with pytest.raises(InputError, match="is also among --add-edges"):
        run_changes(Run(config, config.run_dir, MetricsRecorder()), over_here)


def test_what_cannot_be_is_refused(finished_run: Path, tables: Path, tmp_path: Path) -> None:
    change = UpdateConfig(run=str(finished_run), add_edges=f"{tables}/edges.parquet")
    with pytest.raises(InputError, match="is the run itself"):
        updated(str(finished_run), str(finished_run), change)
    with pytest.raises(InputError, match=r"no config\.json"):
        updated(str(tmp_path), f"{tmp_path}/out", change)
    with pytest.raises(InputError, match="but for cluster"):
        updated(str(finished_run), f"{tmp_path}/out", change, ["student.lr=1"])
    assert updated(str(finished_run), f"{tmp_path}/out", change, ["cluster.cache_mb=7"]).cluster.cache_mb == 7
    done = rbm_dist("update", str(finished_run), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "nothing has changed" in done.stderr
