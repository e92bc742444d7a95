"""`rbm-dist status`: of runs at work, done, stopped and gone, on disk and on S3, without Ray."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from rbm_dist import cli, storage
from rbm_dist.errors import InputError, RunError
from rbm_dist.report.progress import LoopProgress
from rbm_dist.report.status import RunStatus
from rbm_dist.stages import lease
from rbm_dist.stages.status import run_status
from tests.patience import patient

STAGES = {"source": 2.0, "teacher": None, "evaluate": None}


@pytest.fixture(params=["local", "s3"])
def run_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("s3_url")


@contextmanager
def at_work(url: str) -> Iterator[None]:
    """A driver in its stage teacher, which has written how far it is."""
    with lease.held(url, Console()) as owner:
        status = RunStatus(url, dict(STAGES), asdict(owner))
        status.begin("teacher")
        status.progress("teacher", LoopProgress(300, 1000, "steps", "epoch 2", 0.0, 100, 50.0))
        status.checkpoint("teacher", 250)
        with status:
            deadline = time.monotonic() + patient(20)
            while not storage.exists(f"{url}/status.json"):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            yield


def asked(url: str, *options: str) -> tuple[int, str]:
    """Exit code and output of the command."""
    result = CliRunner(env={"COLUMNS": "300"}).invoke(cli.app, ["status", url, *options])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


def test_it_needs_neither_ray_nor_torch(tmp_path: Path) -> None:
    with at_work(str(tmp_path)):
        """Done."""
    script = "import sys; sys.modules['torch'] = sys.modules['ray'] = None; from rbm_dist.cli import main; main()"
    subprocess.run([sys.executable, "-c", script, "status", str(tmp_path)], check=True)


def test_a_run_at_work_and_done(run_url: str) -> None:
    with at_work(run_url):
        code, said = asked(run_url)
        assert code == 0
        assert f"{run_url}: at work" in said
        for part in ("300/1,000 steps", "4.0 steps/s", "2.9 min", "epoch 2", "step 250", f"pid {os.getpid()}", "alive"):
            assert part in said
        code, said = asked(run_url, "--json")
        found = json.loads(said)
        assert (code, found["state"], found["alive"], found["owner"]["token"]) == (0, "at work", True, 1)
        assert [stage["state"] for stage in found["stages"]] == ["done", "at work", "waiting"]
    code, said = asked(run_url)
    assert (code, f"{run_url}: done" in said) == (0, True)


def test_a_run_that_stopped_says_why(run_url: str) -> None:
    with pytest.raises(RunError), at_work(run_url):
        raise RunError("teacher: rank 1 was lost")
    code, said = asked(run_url)
    assert code == 1
    assert "it stopped: teacher: rank 1 was lost; the same command again goes on from there" in said


def gone(url: str) -> Any:
    """A driver that said nothing more: both files are as they were while it was at work."""
    with at_work(url):
        files = {name: storage.read_json(f"{url}/{name}.json") for name in ("owner", "status")}
    for name, content in files.items():
        storage.write_json(f"{url}/{name}.json", content)


def test_a_driver_without_a_sign_of_life_is_gone(tmp_path: Path) -> None:
    url = str(tmp_path)
    gone(url)
    code, said = asked(url)
    assert code == 1
    assert f"{url}: gone" in said
    assert "no sign of life for" in said
    assert "that driver is gone; the same command again goes on from there" in said


def test_on_object_storage_an_expired_lease_is_a_driver_that_is_gone(s3_url: str) -> None:
    gone(s3_url)
    assert asked(s3_url)[0] == 0, "it may still be alive"
    owner = lease.Owner(**storage.read_json(f"{s3_url}/owner.json"))
    storage.write_json(f"{s3_url}/owner.json", asdict(replace(owner, duration_s=1.0)))
    time.sleep(2.1)
    code, said = asked(s3_url)
    assert (code, "that driver is gone" in said) == (1, True)


@pytest.mark.parametrize("age_s", [10, 400])
def test_where_no_lock_tells_the_last_word_does(tmp_path: Path, age_s: float) -> None:
    url = str(tmp_path)
    gone(url)
    owner = storage.read_json(f"{url}/owner.json")
    storage.write_json(f"{url}/owner.json", {**owner, "who": "ada@elsewhere"})  # its locks may not be seen here
    written = storage.read_json(f"{url}/status.json")
    storage.write_json(f"{url}/status.json", {**written, "written": time.time() - age_s})
    code, said = asked(url)
    assert code == (1 if age_s > 300 else 0)
    assert ("no sign of life for 6.7 min: that driver is gone" in said) == (age_s > 300)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no run was started there"):
        run_status(str(tmp_path))
    for wrong in (["mine"], {"state": "California"}):
        storage.write_json(f"{tmp_path}/status.json", wrong)
        with pytest.raises(InputError, match="is not a run's"):
            run_status(str(tmp_path))
