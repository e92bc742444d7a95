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


def epochs(url: str, loop: str) -> list[int]:
    return [row["epoch"] for row in rows(url) if row["loop"] == loop]


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard itself reads."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def train(url: str, loop: str, first: int, end: int) -> None:
    """A run that trains one loop from one epoch up to another."""
    writer = MetricsWriter(url)
    writer.begin(loop, first)
    for epoch in range(first, end):
        writer.write(loop, epoch, {"loss": epoch / 4})
    writer.close()


def test_rows_and_scalars(url: str, tmp_path: Path) -> None:
    train(url, "teacher", 0, 3)
    assert [{key: row[key] for key in ("loop", "epoch", "loss")} for row in rows(url)] == [
        {"loop": "teacher", "epoch": epoch, "loss": epoch / 4} for epoch in range(3)
    ]
    fs, path = storage.filesystem(f"{url}/tensorboard/teacher")
    fs.get(path, str(tmp_path / "fetched"), recursive=True)
    assert scalars(tmp_path / "fetched", "loss") == [(0, 0.0), (1, 0.25), (2, 0.5)]


def test_a_loop_that_goes_on_drops_the_epochs_it_runs_again(url: str) -> None:
    train(url, "teacher", 0, 5)
    train(url, "mlp", 0, 2)
    train(url, "mlp", 1, 4)
    assert epochs(url, "teacher") == [0, 1, 2, 3, 4]
    assert epochs(url, "mlp") == [0, 1, 2, 3]


def test_a_loop_that_starts_anew_leaves_nothing_of_the_old_one(url: str) -> None:
    train(url, "teacher", 0, 3)
    train(url, "mlp", 0, 3)
    before = set(storage.listdir(f"{url}/tensorboard/teacher"))
    other = storage.listdir(f"{url}/tensorboard/mlp")
    train(url, "teacher", 0, 1)
    assert epochs(url, "teacher") == [0]
    assert not before & set(storage.listdir(f"{url}/tensorboard/teacher"))
    assert storage.listdir(f"{url}/tensorboard/mlp") == other


def test_tensorboard_shows_each_epoch_once(tmp_path: Path) -> None:
    train(str(tmp_path), "teacher", 0, 4)
    train(str(tmp_path), "teacher", 2, 5)
    assert [step for step, _ in scalars(tmp_path / "tensorboard" / "teacher", "loss")] == [0, 1, 2, 3, 4]


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    train(str(tmp_path), "teacher", 0, 3)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    train(str(tmp_path), "teacher", 2, 3)
    assert epochs(str(tmp_path), "teacher") == [0, 1, 2]


@pytest.mark.parametrize("kind", ["s3", "memory"])
def test_remote_metrics_are_there_when_they_are_flushed(
    kind: str, request: pytest.FixtureRequest, local_cache: Path
) -> None:
    url = request.getfixturevalue(f"{kind}_url")
    writer = MetricsWriter(url)
    writer.begin("teacher", 0)
    writer.write("teacher", 0, {"loss": 1.0})
    writer.flush()
    assert epochs(url, "teacher") == [0]
    writer.write("teacher", 1, {"loss": 1.0})
    writer.close()
    assert epochs(url, "teacher") == [0, 1]
    assert list(local_cache.iterdir()) == []
