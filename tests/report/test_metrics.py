"""Metrics files: each epoch stands there once, also after a run went on, and on object storage."""

import json
from pathlib import Path
from typing import Any

import pytest

from rbm_dist import storage
from rbm_dist.report.metrics import MetricsWriter


def rows(url: str) -> list[dict[str, Any]]:
    fs, path = storage.filesystem(f"{url}/metrics.jsonl")
    return [json.loads(line) for line in fs.cat_file(path).decode().splitlines()]


def scalars(folder: Path, name: str) -> list[tuple[int, float, float]]:
    """Step, value and time, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value, event.wall_time) for event in events.Scalars(name)]


def history(end: int, first: int = 0) -> list[dict[str, Any]]:
    """The rows of some epochs."""
    return [{"epoch": epoch, "time": 1000.0 + epoch, "loss": epoch / 4} for epoch in range(first, end)]


def train(url: str, loop: str, first: int, end: int) -> None:
    """A driver under which one loop goes on from one epoch up to another."""
    writer = MetricsWriter(url)
    writer.begin(loop, history(first))
    for row in history(end, first):
        writer.write(loop, row)
    writer.close()


def test_rows_and_scalars(url: str, tmp_path: Path) -> None:
    train(url, "teacher", 0, 3)
    assert rows(url) == [{"loop": "teacher", **row} for row in history(3)]
    fs, path = storage.filesystem(f"{url}/tensorboard/teacher")
    fs.get(path, str(tmp_path / "fetched"), recursive=True)
    assert scalars(tmp_path / "fetched", "loss") == [(0, 0.0, 1000.0), (1, 0.25, 1001.0), (2, 0.5, 1002.0)]


def test_of_what_lies_beside_them_nothing_is_removed(url: str) -> None:
    mine = [f"{url}/tensorboard/rbm/{name}" for name in ("notes.json", "mine/a.json")]
    for name in mine:
        storage.write_json(name, 1)
    train(url, "rbm/pretrain", 0, 2)
    for _ in range(2):
        train(url, "rbm", 0, 2)
    assert all(storage.exists(name) for name in mine)
    kept = [name for name in storage.listdir(f"{url}/tensorboard/rbm") if "tfevents" in name]
    assert len(kept) == len(storage.listdir(f"{url}/tensorboard/rbm/pretrain")) == 1


@pytest.mark.parametrize("first", [0, 1, 3, 5])
def test_a_loop_that_goes_on_stands_there_once(url: str, first: int) -> None:
    train(url, "teacher", 0, 3)
    train(url, "mlp", 0, 3)  # killed after its third epoch, with a checkpoint of an earlier (or an unseen later) one
    train(url, "mlp", first, 6)
    assert [row for row in rows(url) if row["loop"] == "mlp"] == [{"loop": "mlp", **row} for row in history(6)]
    assert [row for row in rows(url) if row["loop"] == "teacher"] == [{"loop": "teacher", **row} for row in history(3)]


@pytest.mark.parametrize("first", [0, 2])
def test_a_loop_that_goes_on_leaves_no_old_event_files(url: str, tmp_path: Path, first: int) -> None:
    train(url, "teacher", 0, 3)
    train(url, "mlp", 0, 3)
    before = set(storage.listdir(f"{url}/tensorboard/teacher"))
    other = storage.listdir(f"{url}/tensorboard/mlp")
    train(url, "teacher", first, 4)
    assert not before & set(storage.listdir(f"{url}/tensorboard/teacher"))
    assert storage.listdir(f"{url}/tensorboard/mlp") == other
    fs, path = storage.filesystem(f"{url}/tensorboard/teacher")
    fs.get(path, str(tmp_path / "fetched"), recursive=True)
    assert [step for step, _, _ in scalars(tmp_path / "fetched", "loss")] == [0, 1, 2, 3]


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    train(str(tmp_path), "teacher", 0, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    train(str(tmp_path), "teacher", 2, 4)
    assert rows(str(tmp_path)) == [{"loop": "teacher", **row} for row in history(4)]


@pytest.mark.parametrize("kind", ["s3", "memory"])
def test_remote_metrics_are_there_when_they_are_flushed(
    kind: str, request: pytest.FixtureRequest, local_cache: Path
) -> None:
    url = request.getfixturevalue(f"{kind}_url")
    writer = MetricsWriter(url)
    writer.begin("teacher", [])
    writer.write("teacher", history(1)[0])
    writer.flush()
    assert len(rows(url)) == 1
    writer.write("teacher", history(2)[1])
    writer.close()
    assert len(rows(url)) == 2
    assert list(local_cache.iterdir()) == []


@pytest.mark.parametrize(
    "arrived",
    [[], [0, 1, 2, 3, 4], [2, 3, 4], [0, 1, 4], [0, 1, 3, 2, 4], [0, 1, 2, 3, 4, 3, 4]],
    ids=["nothing", "all", "the last", "some", "in another order", "some twice"],
)
def test_the_end_of_a_loop_brings_what_did_not_arrive(url: str, tmp_path: Path, arrived: list[int]) -> None:
    """Not even that the loop began: with a mailbox, everything in it can be lost, or come again."""
    train(url, "mlp", 0, 2)
    writer = MetricsWriter(url)
    for epoch in arrived:
        writer.write("teacher", history(5)[epoch])
    writer.end("teacher", history(5))
    writer.write("teacher", history(5)[3])  # late
    writer.close()
    assert [row for row in rows(url) if row["loop"] == "teacher"] == [{"loop": "teacher", **row} for row in history(5)]
    assert [row for row in rows(url) if row["loop"] == "mlp"] == [{"loop": "mlp", **row} for row in history(2)]
    fs, path = storage.filesystem(f"{url}/tensorboard/teacher")
    fs.get(path, str(tmp_path / "fetched"), recursive=True)
    assert scalars(tmp_path / "fetched", "loss") == [(epoch, epoch / 4, 1000.0 + epoch) for epoch in range(5)]


def test_storage_that_is_away_fails_nothing(s3_url: str, caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricsWriter(s3_url)
    writer.begin("teacher", [])
    writer.write("teacher", history(1)[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "copy_in", lambda path, url: (_ for _ in ()).throw(TimeoutError("no answer")))
        writer.flush()
        writer.flush()
    assert [record.getMessage() for record in caplog.records if record.name == "rbm_dist.report.metrics"] == [
        f"{s3_url}: metrics cannot be written, and may lack epochs: no answer"
    ]
    writer.close()
    assert len(rows(s3_url)) == 1
