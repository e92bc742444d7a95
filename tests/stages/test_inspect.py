"""`rbm-dist inspect` on a finished run: what it writes and says, and what it refuses."""

import json
import sys
from pathlib import Path

import pytest

from rbm_dist import cli, storage
from rbm_dist.serve.artifact import load_student, save_merged


def inspect(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the command in this process."""
    monkeypatch.setattr(sys, "argv", ["rbm-dist", "inspect", *arguments])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_the_figures_are_those_of_the_run(
    copied_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(monkeypatch, str(copied_run)) == 0
    folder = copied_run / "inspect"
    assert {path.name for path in folder.iterdir()} == {"inspect.json", "layer-0.png", "layer-1.png"}
    figures = json.loads((folder / "inspect.json").read_text())
    assert figures["num_nodes"] == figures["labelled_nodes"] == 1797
    results = json.loads((copied_run / "results.json").read_text())
    for layer, load in zip(figures["layers"], results["students"]["rbm"]["mixture"]["expert_load"], strict=True):
        assert [expert["pair_share"] for expert in layer["experts"]] == pytest.approx(load, abs=1e-3)
        assert 0.2 < layer["class_nmi"] < 1, "experts and digits have to do with each other"
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines()[:-1])) <= 80
    assert "Layer 1: 8 experts, 3 per row" in shown
    first = figures["layers"][0]["experts"][0]
    assert f"{first['pair_share']:.1%}" in shown


def test_of_a_merged_rbm_the_experts_are_shown_and_that_it_is_served_as_an_mlp(
    copied_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied_run / "student" / "rbm"
    before = inspect(monkeypatch, str(copied_run)), json.loads((copied_run / "inspect" / "inspect.json").read_text())
    facts = json.loads((folder / "model.json").read_text())
    save_merged(str(folder), load_student(str(folder)), {name: facts[name] for name in facts if name != "version"})
    manifest = json.loads((copied_run / "student" / "manifest.json").read_text())
    for file in ("model.json", "model.safetensors", "experts/model.json", "experts/model.safetensors"):
        manifest["files"][f"student/rbm/{file}"] = storage.file_info(str(folder / file))
    (copied_run / "student" / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert (0, inspect(monkeypatch, str(copied_run))) == (before[0], 0)
    shown = capsys.readouterr().out
    assert "Layer 1: 8 experts, 3 per row" in shown
    assert "so that MLP is served" in " ".join(shown.split())
    figures = json.loads((copied_run / "inspect" / "inspect.json").read_text())
    assert figures["layers"] == before[1]["layers"]
    assert figures["mixture"] == before[1]["mixture"] | {"merged": True}
    assert figures["mixture"]["val"] == pytest.approx(
        json.loads((copied_run / "results.json").read_text())["students"]["rbm"]["val"]
    )


def test_a_folder_of_any_storage(
    finished_run: Path, memory_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(monkeypatch, str(finished_run), "--out", f"{memory_url}/deep") == 0
    assert storage.listdir(f"{memory_url}/deep") == ["inspect.json", "layer-0.png", "layer-1.png"]
    assert memory_url in capsys.readouterr().out.replace("\n", "")
    assert not (finished_run / "inspect").exists()


def test_what_cannot_be_inspected_is_refused(
    copied_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(run: Path) -> str:
        assert inspect(monkeypatch, str(run), "--out", str(tmp_path / "out")) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert not (tmp_path / "out").exists()
        assert not (run / "inspect").exists()
        return shown.err

    assert "not a run directory" in refused(tmp_path)
    note = copied_run / "student" / "config.json"
    whole = note.read_text()
    changed = json.loads(whole)
    changed["config"]["student"]["models"] = ["mlp"]
    note.write_text(json.dumps(changed))
    assert "this run has no student rbm (student.models: mlp)" in refused(copied_run)
    note.write_text(whole)
    weights = copied_run / "student" / "rbm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "model.safetensors" in refused(copied_run)
    (copied_run / "student" / "manifest.json").unlink()
    assert "the run has not finished its students" in refused(copied_run)


@pytest.mark.parametrize("name", ["inspect.json", "layer-0.png"])
def test_only_its_own_files_are_written_over(
    finished_run: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("{}")
    assert inspect(monkeypatch, str(finished_run), "--out", str(out)) == 2
    assert f"{out}/{name}: would be written over and is not rbm-dist's" in capsys.readouterr().err.replace("\n", "")
    assert [path.name for path in out.iterdir()] == [name]
    (out / name).unlink()
    (out / "notes.txt").touch()
    assert [inspect(monkeypatch, str(finished_run), "--out", str(out)) for _ in range(2)] == [0, 0]
    assert (out / "notes.txt").exists()


def test_a_folder_that_cannot_be_written_is_refused(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert inspect(monkeypatch, str(finished_run), "--out", str(tmp_path / "file")) == 2
    assert "cannot be written" in capsys.readouterr().err
