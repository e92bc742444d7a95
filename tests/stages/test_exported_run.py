"""A finished run's student at work: by `rbm_dist.load`, and as `rbm-dist export` writes it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

import rbm_dist
from rbm_dist import cli
from rbm_dist.graph.store import GraphStore
from rbm_dist.serve.artifact import load_student
from rbm_dist.serve.export import export
from rbm_dist.serve.format import FILES
from rbm_dist.serve.from_run import read_run
from rbm_dist.serve.frozen import freeze
from rbm_dist.serve.predictor import predict


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rbm-dist", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_the_command_exports_a_finished_run(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    assert run_cli(monkeypatch, "export", str(finished_run), "--model", "mlp", "--out", str(out)) == 0
    assert {path.name for path in out.iterdir()} == set(FILES)
    said = json.loads((out / "model.json").read_text())
    results = json.loads((finished_run / "results.json").read_text())
    assert said["made_from"]["accuracy"]["test"] == results["students"]["mlp"]["test"]
    capsys.readouterr()
    assert run_cli(monkeypatch, "export", str(finished_run), "--model", "moe", "--out", str(out)) == 2
    assert "this run has no student moe; it has mlp, rbm" in " ".join(capsys.readouterr().err.split())
    assert run_cli(monkeypatch, "export", str(tmp_path), "--out", str(out)) == 2
    assert "neither an exported student" in capsys.readouterr().err


def test_a_run_and_its_export_answer_alike(finished_run: Path, tmp_path: Path) -> None:
    rows = load_digits().data
    of_run = rbm_dist.load(str(finished_run))
    export(str(tmp_path / "student"), *read_run(str(finished_run), "rbm"))
    store = GraphStore.open(str(finished_run / "graph"))
    trained, first = load_student(str(finished_run / "student" / "rbm")), 0
    for chunk in predict(freeze(trained), trained.inputs, store):
        ids = np.arange(first, first := first + len(chunk.node_id))
        encodings = {name: store.gather(name, ids) for name in of_run.inputs if name != "feat"}
        # The graph's rows were scaled by the source stage; these are as scikit-learn gives them.
        for student in (of_run, rbm_dist.load(str(tmp_path / "student"), engine="onnx")):
            classes, probabilities = student.predict(rows[chunk.node_id.to_numpy()], **encodings)
            np.testing.assert_allclose(probabilities, chunk.probability_nC, rtol=1e-3, atol=1e-5)
            assert classes.dtype == np.int64
    assert first == len(rows)


def test_the_command_compresses_by_the_runs_validation_nodes(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, small = tmp_path / "full", tmp_path / "small"
    assert run_cli(monkeypatch, "export", str(finished_run), "--out", str(full)) == 0
    compress = ["compress", str(full), "--run", str(finished_run), "--out", str(small)]
    assert run_cli(monkeypatch, *compress, "--int8", "--max-loss", "5") == 0
    said = json.loads((small / "model.json").read_text())["compressed"]
    results = json.loads((finished_run / "results.json").read_text())
    assert said["before"]["val"] == results["students"]["rbm"]["val"]
    assert said["after"]["bytes"] < 0.4 * said["before"]["bytes"]
    assert run_cli(monkeypatch, *compress, "--int8", "--merge") == 2
