"""A whole run: what it leaves behind, what the same command does again, and what it refuses."""

import fcntl
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rbm_dist.cli import main
from tests.patience import patient
from tests.stages.conftest import ROOT, SHORT, rbm_dist

QUICKSTART = "configs/quickstart.yaml"


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Call the command in this process (it must not get as far as starting Ray); gives its one message."""
    monkeypatch.setattr("sys.argv", ["rbm-dist", *arguments])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("a refusal must come before any work"))
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    return capsys.readouterr().err


def test_results(finished_run: Path) -> None:
    results = json.loads((finished_run / "results.json").read_text())
    assert set(results) == {
        "class_names", "classes", "baselines", "teacher", "teacher_model", "soft_labels", "students", "latency_us",
        "seconds",
    }  # fmt: skip
    assert results["teacher_model"] == "sage"
    soft = results["soft_labels"]
    assert 0.3 < soft["confidence"] <= 1
    assert 0.3 < soft["unsmoothed_val"] < results["teacher"]["val"], "neighbours mostly are of one digit"
    assert abs(soft["confidence"] - results["teacher"]["val"]) <= soft["calibration_error"] + 1e-9
    assert 0 < soft["disagreement"] < 0.5, "images beside each other mostly are of one digit"
    classes = results["classes"]
    assert [each["name"] for each in classes] == [str(digit) for digit in range(10)]
    nodes = [each["nodes"] for each in classes]
    for model, figures in {**results["baselines"], "teacher": results["teacher"], **results["students"]}.items():
        right = sum(each["nodes"] * each["accuracy"][model] for each in classes)
        assert right / sum(nodes) == pytest.approx(figures["test"])
    assert results["baselines"]["majority"]["test"] < 0.2 < 0.8 < results["baselines"]["regression"]["test"]
    assert set(results["students"]) == {"mlp", "rbm"}
    for figures in (results["teacher"], *results["students"].values()):
        assert 0.3 < figures["val"] <= 1
        assert 0.3 < figures["test"] <= 1
    for load in results["students"]["rbm"]["mixture"]["expert_load"]:
        assert len(load) == 8
        assert sum(load) == pytest.approx(1)
    for name in ("teacher", "mlp", "rbm"):
        assert results["latency_us"][name]["1"] > results["latency_us"][name]["1024"] > 0
    assert set(results["seconds"]) == {
        "source",
        "partition",
        "teacher",
        "soft_labels",
        "encodings",
        "student",
        "evaluate",
    }
    table = (finished_run.parent / "stdout").read_text()
    assert f"{100 * results['students']['rbm']['test']:.1f} %" in table


def test_accuracy_is_what_the_predictions_say(finished_run: Path, tmp_path: Path) -> None:
    """From the Parquet file and scikit-learn's own labels, by original ids."""
    done = rbm_dist("predict", str(finished_run), "--out", str(tmp_path / "predictions.parquet"))
    assert done.returncode == 0, done.stderr
    table = pq.read_table(tmp_path / "predictions.parquet")
    ids = table["node_id"].to_numpy()
    assert sorted(ids) == list(range(1797)), "every node once, by the caller's ids"
    probability = np.stack(table["probability"].to_pylist())
    np.testing.assert_allclose(probability.sum(1), 1, rtol=1e-5)
    classes = table["class"].to_numpy()
    assert np.array_equal(classes, probability.argmax(1))
    truth = load_digits().target[ids]
    split = np.concatenate([np.load(path) for path in sorted((finished_run / "graph").glob("part-*/split.npy"))])
    orig_id = np.concatenate([np.load(path) for path in sorted((finished_run / "graph").glob("part-*/orig_id.npy"))])
    assert np.array_equal(orig_id, ids)
    results = json.loads((finished_run / "results.json").read_text())
    for name, code in (("val", 1), ("test", 2), ("unseen", 3)):
        assert np.mean((classes == truth)[split == code]) == pytest.approx(results["students"]["rbm"][name])


def test_soft_labels_are_distributions_of_the_teacher(finished_run: Path) -> None:
    soft = np.concatenate([np.load(path) for path in sorted((finished_run / "graph").glob("part-*/soft.npy"))])
    assert soft.shape == (1797, 10)
    np.testing.assert_allclose(soft.sum(1), 1, rtol=1e-5)
    label = np.concatenate([np.load(path) for path in sorted((finished_run / "graph").glob("part-*/label.npy"))])
    split = np.concatenate([np.load(path) for path in sorted((finished_run / "graph").glob("part-*/split.npy"))])
    results = json.loads((finished_run / "results.json").read_text())
    assert np.mean((soft.argmax(1) == label)[split == 2]) == pytest.approx(results["teacher"]["test"])


def test_metrics(finished_run: Path) -> None:
    rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    epochs = {loop: [row["epoch"] for row in rows if row["loop"] == loop] for loop in {row["loop"] for row in rows}}
    assert epochs == {
        "teacher": list(range(6)), "mlp": list(range(30)), "rbm/pretrain": list(range(4)), "rbm": list(range(26))
    }  # fmt: skip
    assert {"loss", "distillation", "commitment", "load_balance", "self_similarity", "val_accuracy"} <= set(rows[-1])
    board = EventAccumulator(str(finished_run / "tensorboard" / "rbm")).Reload()
    expected = [row["val_accuracy"] for row in rows if row["loop"] == "rbm"]
    assert [event.value for event in board.Scalars("val_accuracy")] == pytest.approx(expected)


def test_the_artifact_is_the_best_epoch(finished_run: Path) -> None:
    rows = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((finished_run / "results.json").read_text())
    for student in ("mlp", "rbm"):
        best = max(row["val_accuracy"] for row in rows if row["loop"] == student)
        assert results["students"][student]["val"] == pytest.approx(best)


def test_experts_are_whole_and_went_their_own_ways(finished_run: Path) -> None:
    weights = load_file(finished_run / "student" / "rbm" / "model.safetensors")
    for layer in range(2):
        experts = weights[f"layers.{layer}.experts.weight_LDO"]
        assert len(experts) == 8
        distances = torch.cdist(experts.flatten(1), experts.flatten(1)) + torch.eye(8)
        assert distances.min() > 1e-4, "no expert is a copy of another"
        assert len(weights[f"layers.{layer}.memory_ED"].unique(dim=0)) == 8


def test_nothing_temporary_or_pickled_is_left(finished_run: Path) -> None:
    files = [path for path in finished_run.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    assert {path.suffix or path.name for path in files} == {".json", ".jsonl", ".npy", ".safetensors", ".lock"}
    assert not [path for path in finished_run.rglob("*") if ".tmp-" in path.name or path.name == "ray_train"]


def test_again_recomputes_nothing_and_prints_the_same_table(copied_run: Path, finished_run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copied_run.rglob("*.npy")}
    results = (copied_run / "results.json").read_text()
    again = rbm_dist("run", QUICKSTART, f"run_dir={copied_run}", *SHORT, timeout=patient(60))
    assert again.returncode == 0, again.stderr
    assert (copied_run / "results.json").read_text() == results
    assert before == {path: path.stat().st_mtime_ns for path in copied_run.rglob("*.npy")}
    first = (finished_run.parent / "stdout").read_text()
    assert again.stdout[again.stdout.index("Accuracy") :] == first[first.index("Accuracy") :]


def test_another_configuration_is_refused_by_key(
    copied_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = [*SHORT, "student.pretrain_epochs=3", "student.top_k=2"]
    message = refused(capsys, monkeypatch, "run", QUICKSTART, f"run_dir={copied_run}", *changed)
    assert "student.pretrain_epochs: 4 there, 3 now" in message
    assert "student.top_k: 3 there, 2 now" in message


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


DAMAGES = [
    ("graph/part-00002/feat.npy", flip, "damaged"),
    ("graph/part-00001/pos.npy", flip, "damaged"),
    ("graph/part-00001/indices.npy", truncate, "truncated"),
    ("graph/part-00000/soft.npy", flip, "damaged"),
    ("graph/graph.json", truncate, "truncated"),
    ("source/label.npy", flip, "damaged"),
    ("student/rbm/model.safetensors", flip, "damaged"),
]


@pytest.mark.parametrize(("file", "damage", "reason"), DAMAGES)
def test_damage_is_found(
    copied_run: Path, file: str, damage: Callable[[Path], None], reason: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    damage(copied_run / file)
    out = copied_run.parent / "x.parquet"
    commands = [["run", QUICKSTART, f"run_dir={copied_run}", *SHORT]]
    if Path(file).name not in ("indices.npy", "soft.npy", "label.npy"):  # it reads what it needs
        commands.append(["predict", str(copied_run), "--out", str(out)])
    for arguments in commands:
        message = refused(capsys, monkeypatch, *arguments)
        assert file in message
        assert reason in message
    assert not out.exists()


def test_a_run_directory_in_use_is_refused(
    copied_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(copied_run / ".lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        message = refused(capsys, monkeypatch, "run", QUICKSTART, f"run_dir={copied_run}", *SHORT)
    assert "another rbm-dist is at work" in message


def test_graph_and_students_alone_are_served(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    for name in ("graph", "student"):
        shutil.copytree(finished_run / name, copy / name)
    shutil.rmtree(copy / "student" / "mlp")
    for path in [*copy.glob("graph/part-*/indices.npy"), *copy.glob("graph/part-*/soft.npy")]:
        path.unlink()
    expected, found = tmp_path / "expected.parquet", tmp_path / "found.parquet"
    for run, out in ((finished_run, expected), (copy, found)):
        monkeypatch.setattr("sys.argv", ["rbm-dist", "predict", str(run), "--out", str(out)])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
    assert pq.read_table(found).equals(pq.read_table(expected))
    monkeypatch.setattr("sys.argv", ["rbm-dist", "inspect", str(copy), "--out", str(tmp_path / "inspect")])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    capsys.readouterr()
    asked = ["predict", str(copy), "--out", str(tmp_path / "no.parquet")]
    assert "student/mlp/model.json: missing" in refused(capsys, monkeypatch, *asked, "--model", "mlp")
    assert "has no student moe (student.models: mlp, rbm)" in refused(capsys, monkeypatch, *asked, "--model", "moe")
    shutil.rmtree(copy / "graph")
    assert f"{copy}/graph: not there" in refused(capsys, monkeypatch, *asked)


def test_a_run_of_which_a_stage_was_computed_again_has_not_finished(
    copied_run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["predict", str(copied_run), "--out", str(copied_run / "x.parquet")]
    for stage in ("teacher", "encodings"):
        note = copied_run / stage / "manifest.json"
        whole = note.read_text()
        files = json.loads(whole)
        next(iter(files["files"].values()))["bytes"] += 1
        note.write_text(json.dumps(files))
        assert "has not finished its students" in refused(capsys, monkeypatch, *asked)
        note.unlink()
        assert "has not finished its students" in refused(capsys, monkeypatch, *asked)
        note.write_text(whole)
    note = copied_run / "student" / "config.json"
    note.write_text(note.read_text().replace('"models"', '"model"'))
    assert f"{note}: was changed, or written by another version" in refused(capsys, monkeypatch, *asked)
