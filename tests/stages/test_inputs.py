"""A finished or unfinished stage `source` whose input is changed, moved or gone."""

import os
import shutil
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.errors import InputError
from rbm_dist.stages import run as run_
from rbm_dist.stages.inputs import check_input, note_input
from rbm_dist.stages.pipeline import STAGES
from rbm_dist.stages.source import over_here, stage_source
from tests.sources import table_input

SOURCE = STAGES[0]


def put(folder: Path, num_nodes: int = 300) -> None:
    ids = np.arange(num_nodes)
    table_input.save(f"{folder}/nodes.parquet", {"id": ids, "label": ids % 3, "x": ids / 8})
    table_input.save(f"{folder}/edges.csv", {"src": ids, "dst": (ids + 1) % num_nodes})


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    put(folder)
    return folder


def config(folder: Path, **names: str) -> Config:
    source = {"kind": "tables", "nodes": f"{folder}/nodes.parquet", "edges": f"{folder}/edges.csv"} | names
    return Config.model_validate({"run_dir": f"{folder}/run", "source": source})


def read(folder: Path, finish: bool = True) -> None:
    settings = config(folder)
    run_.begin(SOURCE, settings, settings.run_dir, None)
    files = stage_source(settings, f"{settings.run_dir}/source", over_here)
    if finish:
        run_.finish(SOURCE, settings.run_dir, files, 1.0)


def check(settings: Config, overwrite: bool = False) -> str:
    """What is printed."""
    shown = StringIO()
    run_.refuse_other_files(STAGES, settings.run_dir)
    run_.refuse_other_configuration(STAGES, settings, settings.run_dir)
    check_input(SOURCE, settings, settings.run_dir, overwrite, Console(file=shown, width=300))
    return shown.getvalue()


def refusal(settings: Config) -> str:
    with pytest.raises(InputError) as caught:
        check(settings)
    return str(caught.value)


@pytest.mark.parametrize("finished", [True, False])
def test_a_changed_file_is_refused_and_read_again_on_demand(project: Path, finished: bool) -> None:
    settings = config(project)
    assert check(settings) == ""
    read(project, finished)
    assert check(settings) == ""
    before = (project / "nodes.parquet").stat().st_size
    put(project, 200)
    message = refusal(settings)
    after = (project / "nodes.parquet").stat().st_size
    assert f"{project}/nodes.parquet has {after:,} bytes, had {before:,} (source.nodes)" in message or (
        f"{project}/edges.csv has " in message
    )
    assert "--overwrite" in message
    assert check(settings, overwrite=True) == ""
    assert run_.state(SOURCE, settings.run_dir, None) == "new"
    read(project)
    assert check(settings) == ""
    assert storage.read_json(f"{project}/run/source/source.json")["num_nodes"] == 200


def test_what_is_noted_is_of_before_it_was_read(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is changed while the stage is at work was perhaps read as it was before."""
    real = storage.write_chunks

    def write(*arguments):  # type: ignore[no-untyped-def]
        os.utime(project / "edges.csv", (1, 1))
        return real(*arguments)

    monkeypatch.setattr(storage, "write_chunks", write)
    read(project)
    assert f"{project}/edges.csv is of 1970-01-01" in refusal(config(project))


def test_a_project_that_was_moved_is_the_same(project: Path, tmp_path: Path) -> None:
    read(project)
    moved = project.rename(tmp_path / "moved")
    assert check(config(moved)) == ""
    assert run_.state(SOURCE, f"{moved}/run", None) == "done"


def test_another_file_of_the_same_relative_path_is_refused(project: Path, tmp_path: Path) -> None:
    read(project)
    put(tmp_path / "other", 299)
    shutil.copytree(project / "run", tmp_path / "other" / "run")
    message = refusal(config(tmp_path / "other"))
    assert f"{tmp_path}/other/" in message
    assert f"  source.nodes: '{project}/nodes.parquet' there, '{tmp_path}/other/nodes.parquet' now" in message


@pytest.mark.parametrize("elsewhere", [True, False])
def test_an_input_that_is_gone_is_one_line(project: Path, tmp_path: Path, elsewhere: bool) -> None:
    read(project)
    for name in ("nodes.parquet", "edges.csv"):
        (project / name).unlink()
    folder = project.rename(tmp_path / "moved") if elsewhere else project
    for overwrite in (False, True):
        assert check(config(folder), overwrite) == (
            "  source: the input is no longer there; what was read of it is used\n"
        )
    assert run_.state(SOURCE, f"{folder}/run", None) == "done"


def test_another_name_of_nothing_is_another_input(project: Path) -> None:
    read(project)
    message = refusal(config(project, nodes="/no/such/nodes.csv", edges="/no/such/edges.csv"))
    assert message.startswith(f"{project}/run: this run directory was made from another input\n")
    assert "'/no/such/nodes.csv' now" in message


def test_a_file_that_is_gone_is_named(project: Path) -> None:
    read(project)
    (project / "edges.csv").unlink()
    assert refusal(config(project)) == f"{project}/edges.csv: no such file (source.edges)"


def test_runs_of_versions_that_noted_nothing_go_on(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They kept paths as they were given."""
    read(project)
    (project / "run" / "source" / "inputs.json").unlink()
    put(project, 200)
    assert check(config(project)) == ""
    assert "made from another input" in refusal(config(project, edges="/elsewhere/edges.csv"))
    note = project / "run" / "source" / "config.json"
    note.write_text(note.read_text().replace(f'"{project}/', '"d/'))
    assert check(config(project)) == ""


def test_where_a_class_of_pyg_keeps_its_files_decides_nothing(tmp_path: Path) -> None:
    def settings(root: str, name: str) -> Config:
        source = {"kind": "pyg", "dataset": "a.B", "arguments": {"root": root, "name": name}}
        return Config.model_validate({"run_dir": str(tmp_path), "source": source})

    run_.begin(SOURCE, settings("/a", "x"), str(tmp_path), None)
    storage.write_json(f"{tmp_path}/source/inputs.json", {})
    assert check(settings("/b", "x")) == ""
    assert "source.arguments.name: 'x' there, 'y' now" in refusal(settings("/a", "y"))


ARXIV = ["edge", "node-feat", "node-label", "num-node-list", "num-edge-list"]
FILES = {
    "npz": ({"path": "graph.npz"}, ["graph.npz"]),
    "pyg": ({"path": "data.pt"}, ["data.pt"]),
    "ogb": (
        {"root": "", "name": "ogbn-arxiv"},
        [f"ogbn_arxiv/raw/{name}.csv.gz" for name in ARXIV]
        + [f"ogbn_arxiv/split/time/{name}.csv.gz" for name in ("train", "valid", "test")],
    ),
    "tables": ({"nodes": "nodes/*.csv", "edges": "edges"}, ["nodes/0.csv", "nodes/1.csv", "edges/a.csv"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_a_change_of_any_file_of_any_source_on_any_storage_is_noticed(url: str, kind: str) -> None:
    """Of a finished stage, and of as many bytes."""
    keys, names = FILES[kind]
    paths = {key: value if key == "name" else f"{url}/input/{value}".rstrip("/") for key, value in keys.items()}
    settings = Config.model_validate({"run_dir": f"{url}/run", "source": {"kind": kind, **paths}})
    for name in names:
        storage.write_json(f"{url}/input/{name}", 1)
    run_.begin(SOURCE, settings, settings.run_dir, None)
    note_input(settings.source, f"{settings.run_dir}/source")
    run_.finish(SOURCE, settings.run_dir, {}, 1.0)
    assert check(settings) == ""
    for name in names:
        before = storage.read_json(f"{settings.run_dir}/source/inputs.json")
        storage.write_json(f"{url}/input/{name}", 2)
        assert f"{name} is of " in refusal(settings)
        storage.remove(f"{settings.run_dir}/source/inputs.json")
        note_input(settings.source, f"{settings.run_dir}/source")
        assert storage.read_json(f"{settings.run_dir}/source/inputs.json") != before
        assert check(settings) == ""
