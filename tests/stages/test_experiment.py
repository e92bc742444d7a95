"""Experiments on a real Ray cluster: what is done, what is done again after a kill, and what a person is told."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rbm_dist import cli
from rbm_dist.config.experiment import load_experiment
from rbm_dist.config.run import Config
from rbm_dist.errors import InputError
from rbm_dist.graph.splits import UNSEEN
from rbm_dist.graph.store import GraphStore
from rbm_dist.serve.accuracy import student_accuracy
from rbm_dist.serve.artifact import empty_student, load_mixture
from rbm_dist.stages import experiment as experiment_
from rbm_dist.stages import local
from tests.small_graph import small_store
from tests.stages.conftest import kill_once, rbm_dist

DIGITS = "digits/transductive"
SMALL = """
run_dir: {run_dir}
data_dir: {run_dir}
seeds: 2
base:
  partition: {{num_parts: 2}}
  teacher: {{epochs: 3}}
  student: {{epochs: 4, pretrain_epochs: 2, hidden: 32}}
datasets:
  digits: {{source: {{kind: digits, normalize: none}}}}
  absent: {{source: {{kind: npz, path: absent.npz}}}}
students:
  GLNN: {{student: {{models: [mlp]}}}}
  RbM: {{student: {{models: [rbm]}}}}
"""


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL.format(run_dir=tmp_path / "run"))
    return path


def done_runs(experiment: Path) -> dict[str, Path]:
    runs = experiment.parent / "run" / "runs"
    return {str(path.relative_to(runs).with_suffix("")): path for path in runs.rglob("*.json")}


def written_at(experiment: Path) -> dict[str, int]:
    return {name: path.stat().st_mtime_ns for name, path in done_runs(experiment).items()}


def kill_after_one_run(experiment: Path) -> None:
    kill_once(lambda: bool(done_runs(experiment)), "experiment", str(experiment), "--jobs", "1")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Exit code, output and errors of `rbm-dist experiment` in this process."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rbm-dist", "experiment", *arguments])
        monkeypatch.setenv("COLUMNS", "300")
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return run


@pytest.mark.slow
def test_an_experiment_goes_on_after_a_kill_an_error_and_a_change(
    experiment: Path, tmp_path: Path, one_thread: None
) -> None:
    run = tmp_path / "run"
    kill_after_one_run(experiment)
    first = written_at(experiment)
    assert 1 <= len(first) < 4

    # A run whose input cannot be used is named; what is finished stays.
    (run / "absent.npz").write_bytes(b"not an archive")
    done = rbm_dist("experiment", str(experiment), "--jobs", "1")
    assert done.returncode == 2, done.stdout + done.stderr
    (message,) = done.stderr.splitlines()
    assert message.startswith("error: absent/transductive/GLNN/KD/seed-0: ")
    assert "absent.npz: not a whole .npz archive" in message
    second = written_at(experiment)
    assert {f"{DIGITS}/GLNN/KD/seed-0", f"{DIGITS}/RbM/KD/seed-0"} <= second.keys()
    assert first.items() <= second.items()
    assert pq.read_table(run / "results.parquet").num_rows == len(second)
    assert f"{len(second)} of 8 runs are done" in (run / "results.md").read_text()

    # One student is configured anew, one result is lost, the unusable file is gone.
    (run / "absent.npz").unlink()
    done_runs(experiment).get(f"{DIGITS}/RbM/KD/seed-1", tmp_path / "none").unlink(missing_ok=True)
    changed = "students.GLNN.student.hidden=16"
    done = rbm_dist("experiment", str(experiment), changed)
    assert done.returncode == 0, done.stderr
    assert "skipped absent: no such file" in " ".join(done.stdout.split())
    third = written_at(experiment)
    assert {name for name in third if third[name] == second.get(name)} == {f"{DIGITS}/RbM/KD/seed-0"}
    assert list((run / "prepared").iterdir()) == []
    rows = pq.read_table(run / "results.parquet").to_pylist()
    cells = [
        f"{row['dataset']}/{row['setting']}/{row['student']}/{row['objective']}/seed-{row['seed']}" for row in rows
    ]
    assert cells == [f"{DIGITS}/{student}/KD/seed-{seed}" for seed in (0, 1) for student in ("GLNN", "RbM")]
    assert [row["parameters"] for row in rows if row["student"] == "GLNN"] == [64 * 16 + 16 + 2 * 16 + 16 * 10 + 10] * 2
    assert (run / "results.csv").read_text().count("\n") == 5
    assert "**absent** is skipped: no such file" in (run / "results.md").read_text()

    # Each row is what one run after the other in this process gives.
    trials = {trial.id: trial for trial in load_experiment(experiment, [changed])[1]}
    for cell, row in zip(cells[2:], rows[2:], strict=True):
        trial = trials[cell]
        teacher = local.prepare(trial.config, str(tmp_path / "alone"))
        figures = local.train(trial.config, str(tmp_path / "alone"), str(tmp_path / trial.student))
        compared = figures.keys() & row.keys() - {"seconds"}
        assert compared >= {"val", "test", "test_peak_over_epochs", "epochs", "parameters", "multiply_adds"}
        assert row["test_peak_over_epochs"] >= row["test"]
        assert row["epochs"] == 4
        assert {key: row[key] for key in compared} == {key: figures[key] for key in compared}
        assert row["accuracy"] == row["test"]
        assert (row["teacher_val"], row["teacher_accuracy"]) == (teacher["val"], teacher["test"])
        assert row["config_hash"] == trial.config_hash


def test_tables_of_an_unfinished_experiment_need_no_cluster(
    experiment: Path, here: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, _ = here(str(experiment), "--tables")
    assert code == 0
    assert "0 of 8 runs are done" in (experiment.parent / "run" / "results.md").read_text()
    assert pq.read_table(experiment.parent / "run" / "results.parquet").num_rows == 0


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("kind: npz, path: absent.npz", "absent.npz"),
        ("kind: tables, nodes: small.yaml, edges: absent.csv", "small.yaml"),
        ("kind: tables, nodes: '../small.yaml', edges: absent.csv", "absent.csv"),
    ],
)
def test_without_any_dataset_nothing_is_done(
    experiment: Path, here: Callable[..., tuple[int, str, str]], source: str, missing: str
) -> None:
    lines = [line for line in experiment.read_text().splitlines() if "digits" not in line]
    experiment.write_text("\n".join(lines).replace("kind: npz, path: absent.npz", source))
    code, _, errors = here(str(experiment))
    assert code == 2
    assert errors == f"error: absent: no such file: {experiment.parent}/run/{missing}\n"


def test_a_bad_experiment_is_one_message(experiment: Path, here: Callable[..., tuple[int, str, str]]) -> None:
    code, output, errors = here(str(experiment), "students.RbM.student.top_q=3")
    assert (code, output) == (2, "")
    assert errors.startswith(f"error: {experiment}: student.top_q: unknown key (in digits × transductive × RbM × KD")
    assert not (experiment.parent / "run").exists()


@pytest.mark.parametrize(
    ("kind", "routing", "expected"),
    [
        ("mlp", "input", 16 * 32 + 32 * 10),
        # Three experts of a row, and its cosines with all memories.
        ("rbm", "layers", 3 * (16 * 32 + 32 * 10) + 8 * (16 + 32)),
        ("rbm", "input", 3 * (16 * 32 + 32 * 10) + 8 * 16),
        ("ensemble", "input", 2 * (16 * 32 + 32 * 10)),
    ],
)
def test_multiply_adds(kind: str, routing: str, expected: int) -> None:
    student = empty_student(
        kind=kind, inputs=["feat"], num_features=16, hidden=32, num_classes=10, num_layers=2, norm="layer",
        num_experts=8, top_k=3, routing=routing, routing_temperature=1.0, input_attention=True, ensemble_size=2,
    )  # fmt: skip
    assert local.multiply_adds(student, 16) == expected
    assert next(student.parameters()).dtype == torch.float32, "left as it was"


@pytest.mark.parametrize("tolerance", [None, 1.0])
def test_experts_that_may_cost_anything_are_averaged_into_an_mlp(tmp_path: Path, tolerance: float | None) -> None:
    url = str(tmp_path)
    small_store(f"{url}/prepared")
    student = {"models": ["rbm"], "epochs": 4, "pretrain_epochs": 2, "hidden": 8, "num_experts": 3, "batch_size": 40}
    config = Config.model_validate(
        {"run_dir": "none", "partition": {"num_parts": 4}, "student": student | {"merge_tolerance": tolerance}}
    )
    figures = local.train(config, f"{url}/prepared", f"{url}/student")
    folder = tmp_path / "student" / "rbm"
    assert figures["merged"] is (tolerance is not None)
    assert (folder / "experts").exists() is figures["merged"]
    kind = json.loads((folder / "model.json").read_text())["kind"]
    assert kind == ("mlp" if figures["merged"] else "rbm")
    store = GraphStore.open(f"{url}/prepared/graph")
    width, classes = store.num_features, store.num_classes
    routing = 0 if figures["merged"] else 3 * width
    assert figures["multiply_adds"] == width * 8 + 8 * classes + routing, "that of what is served"
    assert 1 <= figures["effective_experts"] <= 3
    assert figures["distance"] > 0
    whole, _ = load_mixture(str(folder))
    reported = student_accuracy(whole, store)["test"]
    if figures["merged"]:
        assert figures["test"] == pytest.approx(reported - figures["averaged"]), "the average is served"
    else:
        assert figures["test"] == reported


def test_in_the_inductive_setting_the_unseen_nodes_are_reported(tmp_path: Path) -> None:
    config = Config.model_validate(
        {
            "run_dir": "none",
            "source": {"kind": "digits", "normalize": "none", "unseen_share": 0.2},
            "partition": {"num_parts": 1},
            "cluster": {"train_workers": 1},
            "teacher": {"epochs": 2},
            "student": {"models": ["mlp"], "epochs": 3, "hidden": 16},
        }
    )
    teacher = local.prepare(config, str(tmp_path / "prepared"))
    figures = local.train(config, str(tmp_path / "prepared"), str(tmp_path / "student"))
    store = GraphStore.open(str(tmp_path / "prepared" / "graph"))
    unseen = int(np.sum(store.array("split", 0) == UNSEEN))
    assert unseen > 200
    assert figures["unseen"] * unseen == pytest.approx(round(figures["unseen"] * unseen))
    assert figures["test_peak_over_epochs"] >= figures["unseen"]
    assert 0 < teacher["unseen"] < 1
    assert 0.1 < teacher["confidence"] <= 1


@pytest.mark.parametrize("name", ["results.csv", "results.md", "results.parquet"])
def test_tables_that_are_the_users_are_not_written_over(
    experiment: Path, here: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("a refusal must come before any work"))
    mine = experiment.parent / "run" / name
    mine.parent.mkdir()
    mine.write_text("# Results\nseed,accuracy\n")
    for options in ([], ["--tables"]):
        code, _, errors = here(str(experiment), *options)
        assert (code, mine.read_text()) == (2, "# Results\nseed,accuracy\n")
        assert f"{mine}: is not an experiment's" in errors
    assert [path.name for path in mine.parent.iterdir()] == [name]


def test_its_own_tables_are_written_again(experiment: Path, here: Callable[..., tuple[int, str, str]]) -> None:
    for _ in range(2):
        assert here(str(experiment), "--tables")[0] == 0


def test_a_file_in_the_place_of_a_run_is_refused(experiment: Path, here: Callable[..., tuple[int, str, str]]) -> None:
    mine = experiment.parent / "run" / "runs" / DIGITS / "GLNN" / "KD" / "seed-0.json"
    mine.parent.mkdir(parents=True)
    mine.write_text('{"seed": 0}')
    code, _, errors = here(str(experiment))
    assert (code, mine.read_text()) == (2, '{"seed": 0}')
    assert f"{mine}: is not an experiment's" in errors


def test_only_prepared_graphs_are_removed(experiment: Path, tmp_path: Path) -> None:
    prepared = tmp_path / "run" / "prepared"
    mine = [prepared / "notes.txt", prepared / "0123456789abcdef" / "a.csv", prepared / "old" / "graph" / "graph.json"]
    left = prepared / "fedcba9876543210" / "graph" / "graph.json"
    for path in [*mine, left]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    _, trials = load_experiment(experiment)
    (group, *_) = experiment_._groups(str(tmp_path / "run"), trials)
    assert [path.exists() for path in [*mine, left]] == [True] * 3 + [False]
    theirs = Path(group.url, "data.csv")
    theirs.parent.mkdir()
    theirs.touch()
    with pytest.raises(InputError, match=f"{group.url}: holds files that are no experiment's"):
        local.prepare(trials[0].config, group.url)
    assert theirs.exists()
