"""The status file: what it says while a run is at work and after, on any storage, and that it can fail nothing."""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from rbm_dist import storage
from rbm_dist.errors import InputError
from rbm_dist.report import status as status_
from rbm_dist.report.progress import LoopProgress
from rbm_dist.report.status import RunStatus
from tests.patience import patient

OWNER = {"who": "ada@host", "token": 3}


def read(url: str) -> Any:
    return storage.read_json(f"{url}/status.json")


def wait_for(url: str, seen: Callable[[Any], Any]) -> Any:
    """The status, once it is there and shows this."""
    deadline = time.monotonic() + patient(20)
    while True:
        with suppress(InputError):
            found = read(url)
            if seen(found):
                return found
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_from_its_beginning_to_its_end(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_, "_EVERY_S", 0.05)
    monkeypatch.setattr(status_, "_EVERY_REMOTE_S", 0.05)
    with RunStatus(url, {"source": 1.5, "teacher": None, "student": None}, OWNER) as status:
        assert wait_for(url, lambda found: found["state"] == "at work")["owner"] == OWNER
        status.begin("teacher")
        status.progress("teacher", LoopProgress(300, 1000, "steps", "epoch 2", 0.0, 100, 50.0), 2, {"rows_per_s": 7.0})
        status.checkpoint("teacher", 250)
        found = wait_for(url, lambda found: found["checkpoint"])
        assert [(stage["name"], stage["state"]) for stage in found["stages"]] == [
            ("source", "done"), ("teacher", "at work"), ("student", "waiting")
        ]  # fmt: skip
        assert found["stages"][0]["seconds"] == 1.5
        loop = found["loops"]["teacher"]
        assert (loop["done"], loop["rate"], loop["left_s"], loop["epoch"]) == (300, 4.0, 175.0, 2)
        assert loop["figures"] == {"rows_per_s": 7.0}
        assert (found["checkpoint"]["loop"], found["checkpoint"]["step"]) == ("teacher", 250)
        status.finish("teacher", 2.5)
    found = read(url)
    assert (found["state"], found["loops"], found["stages"][1]["seconds"]) == ("done", {}, 2.5)


def test_how_a_run_ended(tmp_path: Path) -> None:
    def fail() -> None:
        with RunStatus(str(tmp_path), {"source": None}, OWNER) as status:
            status.begin("source")
            raise InputError("nodes.csv: row 3")

    with pytest.raises(InputError):
        fail()
    found = read(str(tmp_path))
    assert (found["state"], found["error"]) == ("stopped", "nodes.csv: row 3")
    assert found["stages"][0]["state"] == "stopped"


def test_a_status_that_cannot_be_written_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(status_, "_EVERY_S", 0.01)
    (tmp_path / "status.json").mkdir()
    with RunStatus(str(tmp_path), {"source": None}, OWNER):
        deadline = time.monotonic() + patient(20)
        while not caplog.records:
            assert time.monotonic() < deadline
        time.sleep(0.2)
    (record,) = caplog.records
    assert f"{tmp_path}/status.json: cannot be written" in record.getMessage()
