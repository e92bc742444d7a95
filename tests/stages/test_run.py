"""The rule by which a stage is skipped, gone on with, or started; and what of a run directory is the user's."""

import os
from pathlib import Path

import pytest

from rbm_dist import storage
from rbm_dist.config.run import Config
from rbm_dist.errors import InputError
from rbm_dist.stages import run as run_
from rbm_dist.stages.pipeline import STAGES
from rbm_dist.stages.run import Stage

STAGE = Stage("partition", "graph", ("partition",), lambda run: {}, makes=r"part-\d+|graph\.json|spill")
FOLDERS = [stage.folder for stage in STAGES]


@pytest.mark.parametrize("removals", range(4))
def test_what_a_kill_leaves_of_a_stage_that_was_cleared_is_known_and_not_gone_on_with(
    tmp_path: Path, removals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, url = Config(run_dir=str(tmp_path)), str(tmp_path)
    run_.begin(STAGE, config, url, None)
    for name in ("part-00000/feat.npy", "part-00001/feat.npy", "spill/chunk-00000.json"):
        storage.write_json(f"{url}/graph/{name}", {})
    assert run_.state(STAGE, url, None) == "started"
    real, done = storage.remove, []

    def cut_off(each: str) -> None:
        if len(done) == removals:
            raise KeyboardInterrupt
        done.append(each)
        real(each)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "remove", cut_off)
        with pytest.raises(KeyboardInterrupt):
            run_.clear(STAGE, url)
    assert len(storage.listdir(f"{url}/graph")) == 4 - removals
    run_.refuse_other_files([STAGE], url)
    run_.refuse_other_configuration([STAGE], Config(run_dir="x", seed=3), url)
    assert run_.state(STAGE, url, None) == "new"
    run_.clear(STAGE, url)
    assert not (tmp_path / "graph").exists()


def test_the_users_files_in_a_stages_folder_stay(url: str) -> None:
    run_.begin(STAGE, Config(run_dir=url), url, None)
    mine = ["graph/notes.txt", "graph/part-of-mine.npy", "graph/graph.json.bak", "graph/mine/graph.json"]
    for name in [*mine, "graph/part-00000/feat.npy", "graph/graph.json", "graph/manifest.json"]:
        storage.write_json(f"{url}/{name}", name)
    run_.clear(STAGE, url)
    assert set(storage.listdir(f"{url}/graph")) == {name.split("/")[1] for name in mine} | {"config.json"}
    run_.refuse_other_files(STAGES, url)  # else they would bar the way when the stage is computed again
    assert run_.state(STAGE, url, None) == "new"
    run_.begin(STAGE, Config(run_dir=url), url, None)
    assert run_.state(STAGE, url, None) == "started"
    for name in mine:
        assert storage.read_json(f"{url}/{name}") == name


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("content", [None, "[1]", '{"a": 1}', '{"config": {}, "upstream": null, "mine": 1}', "{"])
def test_a_folder_that_is_no_stages_is_refused(tmp_path: Path, folder: str, content: str | None) -> None:
    (tmp_path / folder).mkdir()
    run_.refuse_other_files(STAGES, str(tmp_path))
    (tmp_path / folder / "nodes.csv").write_text("mine")
    if content is not None:
        (tmp_path / folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=rf"^{tmp_path}/{folder}: holds .*nodes\.csv.* Set another run_dir"):
        run_.refuse_other_files(STAGES, str(tmp_path))


def test_on_object_storage_too(url: str) -> None:
    run_.refuse_other_files(STAGES, url)
    storage.write_json(f"{url}/teacher/weights.json", 1)
    with pytest.raises(InputError, match=rf"^{url}/teacher: holds weights\.json"):
        run_.refuse_other_files(STAGES, url)


def test_a_file_of_a_stages_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("mine")
    with pytest.raises(InputError, match=f"^{tmp_path}/source: holds source"):
        run_.refuse_other_files(STAGES, str(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "results.json", "metrics.jsonl", "tensorboard/events"])
def test_a_projects_own_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('{"name": "my project", "source": "src"}')
    with pytest.raises(InputError, match=rf"^{tmp_path}/{name.split('/')[0]}: is not a run's.* Set another run_dir"):
        run_.refuse_other_files(STAGES, str(tmp_path))


def test_a_run_is_known_by_its_configuration(tmp_path: Path) -> None:
    dump = Config(run_dir="x").model_dump(mode="json")
    del dump["encodings"]  # as versions before that stage wrote it
    storage.write_json(f"{tmp_path}/config.json", dump)
    for name in ("results.json", "metrics.jsonl", "config.json.tmp-0123abcd", "source/config.json.tmp-0123abcd"):
        storage.write_json(f"{tmp_path}/{name}", {})
    run_.refuse_other_files(STAGES, str(tmp_path))


def test_temporary_files_are_removed_where_a_run_writes(tmp_path: Path) -> None:
    left = [
        "config.json.tmp-0123abcd", "metrics.jsonl.tmp-0123abcd", "source/label.npy.tmp-0123abcd",
        "source/work/tables-1/id.npy.tmp-0123abcd", "graph/part-00001/soft.npy.tmp-0123abcd",
        "graph/pos_hop1.json.tmp-0123abcd", "student/rbm/checkpoints/step-00000001.0/a.safetensors.tmp-0123abcd",
        "student/manifest.json.tmp-0123abcd", "evaluate/figures.json.tmp-0123abcd",
    ]  # fmt: skip
    keep = [
        "notes/report.tmp-2024.txt", "notes/x.tmp-deadbeef", "x.tmp-deadbeef", "source/nodes.csv.tmp-deadbeef",
        "source/mine/label.npy.tmp-deadbeef", "inspect/inspect.json.tmp-deadbeef",
    ]  # fmt: skip
    for name in [*left, *keep]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    run_.remove_temporary(STAGES, str(tmp_path))
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(keep)


def finished_stage(url: str, stage: Stage, upstream: str | None = None) -> None:
    run_.begin(stage, Config(run_dir=url), url, upstream)
    names = [f"{stage.folder}/graph.json", f"{stage.folder}/part-00000/feat.json"]
    run_.finish(stage, url, {name: storage.write_json(f"{url}/{name}", name) for name in names}, 1.0)


def test_a_changed_file_is_found_by_its_time_and_with_progress_by_its_content(url: str) -> None:
    finished_stage(url, STAGE)
    name = f"{url}/graph/graph.json"
    read: list[int] = []
    assert run_.state(STAGE, url, None) == run_.state(STAGE, url, None, read.append) == "done"
    assert sum(read) == sum(info["bytes"] for info in run_.manifest(STAGE, url)["files"].values())
    storage.write_json(name, "graph/Graph.json")
    with pytest.raises(InputError, match=rf"{name}: damaged: its checksum"):
        run_.state(STAGE, url, None)
    storage.write_json(name, "shorter")
    with pytest.raises(InputError, match=rf"{name}: truncated or changed"):
        run_.state(STAGE, url, None)


def test_files_of_the_noted_time_are_not_read(tmp_path: Path) -> None:
    url, path = str(tmp_path), tmp_path / "graph" / "graph.json"
    finished_stage(url, STAGE)
    before = path.stat()
    path.write_text('"graph/Graph.json"\n')
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a failing disk would do it
    assert run_.state(STAGE, url, None) == "done"
    with pytest.raises(InputError, match=rf"{path}: damaged"):
        run_.state(STAGE, url, None, lambda size: None)


def test_after_a_move_that_set_new_times_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path)
    finished_stage(url, STAGE)
    for path in (tmp_path / "graph").rglob("*.json"):
        os.utime(path, (1, 1))
    read: list[str] = []
    real = storage.checksums.file_info
    monkeypatch.setattr(storage.checksums, "file_info", lambda url, *rest: [read.append(url), real(url, *rest)][1])
    assert run_.state(STAGE, url, None) == "done"
    assert len(read) == 2
    assert run_.state(STAGE, url, None) == "done"
    assert len(read) == 2, "the new times were noted"


def test_files_may_be_deleted_once_their_only_reader_is_done(url: str) -> None:
    """And are not computed again; a reader that was made of others does not count."""
    source = Stage("source", "source", ("source",), lambda run: {}, makes=r".*json", reader=STAGE)
    finished_stage(url, source)
    storage.remove(f"{url}/source/graph.json")
    assert run_.state(source, url, None) == "new"
    finished_stage(url, STAGE, "of another")
    assert run_.state(source, url, None) == "new"
    finished_stage(url, STAGE, run_.digest(source, url))
    assert run_.state(source, url, None) == "done"
    storage.write_json(f"{url}/source/part-00000/feat.json", "changed")
    with pytest.raises(InputError, match="truncated or changed"):  # what is left is looked at
        run_.state(source, url, None)
