"""A run with a teacher from elsewhere, from its file to a student, in this process."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy.special import softmax

from rbm_dist import storage
from rbm_dist.config.load import load
from rbm_dist.config.run import Config
from rbm_dist.errors import InputError
from rbm_dist.graph.splits import TEST, TRAIN
from rbm_dist.graph.store import GraphStore
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.runtime.memory_store import make_memory_store
from rbm_dist.serve.accuracy import hits, student_accuracy, teacher_classes
from rbm_dist.serve.artifact import load_student
from rbm_dist.stages.dry_run import dry_run
from rbm_dist.stages.external_teacher import look_at_external
from rbm_dist.stages.local import MetricsRecorder, over_parts_here
from rbm_dist.stages.pipeline import run_stages
from rbm_dist.stages.run import Run
from rbm_dist.stages.soft_labels import reset_soft_labels, write_soft_labels
from rbm_dist.stages.student import train_students
from rbm_dist.train.student import StudentTraining
from tests.small_graph import small_graph, write_graph

NODES, CLASSES = 240, 5


def prepared(folder: Path, **external: Any) -> tuple[Config, GraphStore]:
    """A graph in three parts that share nodes out at random; a teacher that knows the labels, for the first 180."""
    part_N = np.random.default_rng(4).integers(0, 3, NODES).astype(np.int32)
    store = write_graph(str(folder), small_graph(), part_N)
    logits = 4 * np.eye(CLASSES)[small_graph().label] + np.random.default_rng(0).normal(size=(NODES, CLASSES))
    np.save(folder / "all.npy", logits)
    np.save(folder / "some.npy", logits[:180])
    np.save(folder / "ids.npy", np.arange(180))
    student = {"models": ["rbm"], "hidden": 16, "epochs": 30, "pretrain_epochs": 10, "batch_size": 60, "num_experts": 4}
    external = {"paths": [str(folder / "all.npy")], "kind": "logits"} | external
    tree = {"run_dir": str(folder), "teacher": {"external": external}, "student": student}
    return Config.model_validate(tree | {"partition": {"num_parts": 3}}), store


def softened(config: Config) -> set[str]:
    run = Run(config, config.run_dir, MetricsRecorder())
    look_at_external(config, run.graph_url, run.path("teacher"))
    return set(write_soft_labels(run, over_parts_here))


def test_a_student_learns_from_it(tmp_path: Path) -> None:
    config, store = prepared(tmp_path)
    assert softened(config) == {f"graph/part-0000{part}/soft.npy" for part in range(3)}
    assert storage.read_json(f"{tmp_path}/teacher/external.json")["with_rows"] == NODES
    found = hits(store, teacher_classes(store)).accuracy()
    assert found["test"] is not None
    assert found["test"] > 0.9, "each node has its own row"
    train_students(Mesh.single(), MetricsRecorder(), config, store.url, f"{tmp_path}/student")
    accuracy = student_accuracy(load_student(f"{tmp_path}/student/rbm"), store)
    assert accuracy["test"] is not None
    assert accuracy["test"] > 0.6, "of five classes"


@pytest.mark.parametrize("settings", [["calibrate"], ["best"]])
def test_temperatures_are_noted_and_used(tmp_path: Path, settings: list[str]) -> None:
    given = {"paths": [str(tmp_path / "all.npy")]}
    if settings == ["best"]:
        given = {"paths": [*given["paths"], str(tmp_path / "softer.npy")], "combine": "best"}
    config, store = prepared(tmp_path, **given)
    np.save(tmp_path / "softer.npy", np.load(tmp_path / "all.npy") / 2)
    if settings == ["calibrate"]:
        config = config.model_copy(update={"teacher": config.teacher.model_copy(update={"calibrate": True})})
    softened(config)
    temperature = storage.read_json(f"{tmp_path}/teacher/external.json")["temperature"]
    orig = store.gather("orig_id", np.arange(NODES))
    expected = softmax(np.load(tmp_path / "all.npy")[orig] / temperature[0], axis=1)
    np.testing.assert_allclose(store.gather("soft", np.arange(NODES)), expected, rtol=1e-3, atol=1e-6)
    assert abs(temperature[0] - 1) > 0.05
    if settings == ["best"]:  # two that say the same, once calibrated
        assert temperature[1] == pytest.approx(temperature[0] / 2, rel=1e-3)


def test_who_is_not_taught_is_left_out(tmp_path: Path) -> None:
    some = {"paths": [str(tmp_path / "some.npy")], "rows": "ids", "ids": str(tmp_path / "ids.npy")}
    config, store = prepared(tmp_path, **some, missing="labels")
    names = softened(config)
    assert "graph/part-00002/taught.npy" in names
    mesh, cluster = Mesh.single(), config.cluster
    training = StudentTraining(
        mesh, MetricsRecorder(), config, store, f"{tmp_path}/student", "mlp",
        lambda: make_memory_store("in_process", mesh, cluster.collective_timeout_s, 0.9, 0.0, 0.01, None),
    )  # fmt: skip
    orig, split = (store.gather(name, np.arange(NODES)) for name in ("orig_id", "split"))
    expected = np.flatnonzero((orig < 180) | (split == TRAIN))
    np.testing.assert_array_equal(np.sort(training.batches.ids), expected)
    assert len(expected) < NODES
    right = hits(store, teacher_classes(store))
    share = (orig[split == TEST] < 180).mean()
    test = right.accuracy()["test"]
    assert test is not None
    assert share - 0.1 < test <= share, "who has no row counts as wrong"
    reset_soft_labels(config.run_dir)
    assert not list(tmp_path.rglob("taught*"))


def test_a_file_that_changes_in_between_is_refused(tmp_path: Path) -> None:
    config, store = prepared(tmp_path)
    run = Run(config, config.run_dir, MetricsRecorder())
    look_at_external(config, store.url, run.path("teacher"))
    os.utime(tmp_path / "all.npy", (1, 1))
    with pytest.raises(
        InputError, match=r"all.npy: was changed after the stage teacher looked at it; delete .*/teacher"
    ):
        write_soft_labels(run, over_parts_here)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("soft_labels.hidden=true", "soft_labels.hidden: needs a teacher that is trained here, not teacher.external"),
        ("soft_labels.entropy_change=true", "soft_labels.entropy_change: needs a teacher that is trained here"),
        ("teacher.external.combine=best", "combine: best is of several teacher.external.paths"),
        ("teacher.external.ids=ids.npy", "teacher.external.ids: means nothing with rows: nodes; set rows: ids"),
        ("teacher.external.rows=ids", "teacher.external.rows: ids needs teacher.external.ids, or Parquet files"),
        ("teacher.external.kind=classes", "teacher.external.kind: Input should be 'logits'"),
        ("teacher.external.paths=[]", "teacher.external.paths: "),
    ],
)
def test_what_cannot_be_had_of_it_is_refused(tmp_path: Path, settings: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"run_dir: {tmp_path}/run\nteacher: {{external: {{paths: [soft.npy], kind: logits}}}}\n")
    with pytest.raises(InputError, match=message):
        load(path, [settings])


def test_its_paths_start_at_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        "run_dir: run\nteacher: {external: {paths: [a.npy, s3://b/c.npy], kind: logits}}\n"
    )
    external = load("run.yaml", ["teacher.external.rows=ids", "teacher.external.ids=ids.npy"]).teacher.external
    assert external is not None
    assert external.paths == (f"{tmp_path}/a.npy", "s3://b/c.npy")
    assert external.ids == f"{tmp_path}/ids.npy"


def test_files_that_are_not_there_are_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("a refusal must come before any work"))
    external = {"paths": [str(tmp_path / "none.npy")], "kind": "logits"}
    config = Config.model_validate({"run_dir": str(tmp_path / "run"), "teacher": {"external": external}})
    console = Console(file=io.StringIO())
    with pytest.raises(InputError, match=r"none.npy: no such file \(teacher.external\)"):
        run_stages(config, console)
    with pytest.raises(InputError, match=r"none.npy: no such file \(teacher.external\)"):
        dry_run(config, console, None)
