"""One driver at a time in a run directory: on disk, and on S3, where one may have been killed without a word."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from rich.console import Console

from rbm_dist import conditional_put, storage
from rbm_dist.errors import InputError, RunError
from rbm_dist.stages import lease
from tests.patience import patient

_DURATION_S = 6.0  # renewed every two seconds; ages on S3 are whole seconds

# A driver that works until it is stopped, and writes what it met on its last line.
DRIVER = """
import sys, time
from rich.console import Console
from rbm_dist import cli
from rbm_dist.errors import InputError
from rbm_dist.stages import lease
lease.DURATION_S, url = float(sys.argv[2]), sys.argv[1]
def work():
    with lease.held(url, Console(width=500)) as owner:
        print("token", owner.token, flush=True)
        while True:
            time.sleep(0.01)
cli.app, sys.argv = work, sys.argv[:1]
cli.main()
"""


@contextmanager
def driver(url: str, duration_s: float = _DURATION_S) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, url, str(duration_s)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def token(process: subprocess.Popen[str]) -> int:
    """Waits until the driver has the lease."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("token "):
            return int(line.split()[1])
    raise AssertionError(process.communicate())


@pytest.fixture(params=["local", "s3"])
def run_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("s3_url")


@pytest.fixture
def console() -> Console:
    return Console(width=500)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == lease.__name__]


def test_a_second_driver_is_told_who_has_it(run_url: str) -> None:
    with driver(run_url) as first:
        assert token(first) == 1
        with driver(run_url) as second:
            _, said = second.communicate(timeout=patient(60))
            assert second.returncode == 2
        owner, alive = lease.look(run_url)
        assert owner is not None
        assert alive
        assert f"another rbm-dist is at work in this run directory: {owner.who} (pid {first.pid})" in said
        first.terminate()
        assert first.wait(timeout=patient(60)) == 128 + signal.SIGTERM
    owner, alive = lease.look(run_url)
    assert owner is not None
    assert (owner.released, alive) == (True, False)
    with driver(run_url, duration_s=1000.0) as third:
        assert token(third) == 2, "what was given back is taken at once"


def test_what_a_killed_driver_had_is_taken_over(run_url: str) -> None:
    with driver(run_url) as first:
        token(first)
        first.kill()
    with driver(run_url) as second:
        assert token(second) == 2
        owner, _ = lease.look(run_url)
        assert owner is not None
        assert (owner.token, owner.pid) == (2, second.pid)


def test_of_two_that_wait_for_a_killed_one_one_takes_over(s3_url: str) -> None:
    with driver(s3_url) as first:
        token(first)
        first.kill()
    with driver(s3_url) as second, driver(s3_url) as third:
        deadline = time.monotonic() + patient(60)
        while (second.poll() is None) == (third.poll() is None):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        owner, alive = lease.look(s3_url)
        assert owner is not None
        winner, loser = (second, third) if third.poll() is not None else (third, second)
        assert (owner.pid, owner.token, alive, loser.returncode) == (winner.pid, 2, True, 2)


def test_a_driver_that_lost_its_lease_stops_and_says_to_whom(s3_url: str) -> None:
    with driver(s3_url) as first:
        token(first)
        os.kill(first.pid, signal.SIGSTOP)  # a host that is not there for a while
        with driver(s3_url) as second:
            assert token(second) == 2
            os.kill(first.pid, signal.SIGCONT)
            _, said = first.communicate(timeout=patient(60))
            owner, _ = lease.look(s3_url)
            assert first.returncode == 1
            assert f"another rbm-dist took this run over, and this one stops: {owner}" in said
            assert owner is not None
            assert owner.pid == second.pid, "the one that stops does not give away what is another's"


def test_storage_that_is_away_for_a_while_ends_nothing(
    s3_url: str, console: Console, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease, "DURATION_S", 0.6)
    monkeypatch.setattr(lease, "_RETRY_S", 0.05)
    real, endpoint = conditional_put.put, {"away": 0}

    def put(url: str, data: bytes, version: str | None) -> str:
        if 0 < endpoint["away"] < 4:
            endpoint["away"] += 1
            raise ConnectionRefusedError(errno.ECONNREFUSED, "no answer")
        if endpoint["away"] == 4:  # the answer is lost, not the write
            endpoint["away"] += 1
            real(url, data, version)
            raise TimeoutError("no answer")
        return real(url, data, version)

    monkeypatch.setattr(conditional_put, "put", put)
    with lease.held(s3_url, console) as owner:
        endpoint["away"] = 1
        deadline = time.monotonic() + patient(20)
        while endpoint["away"] < 5:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)
        now, _ = lease.look(s3_url)
        assert owner.is_same(now)
    assert warnings(caplog) == [
        f"{s3_url}/owner.json: cannot be renewed, will be tried again: [Errno {errno.ECONNREFUSED}] no answer"
    ]
    last, _ = lease.look(s3_url)
    assert last is not None
    assert last.released


def test_storage_that_ignores_conditions_holds_nothing(
    s3_url: str, console: Console, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def put_always(fs: object, bucket: str, key: str, data: bytes, version: str | None) -> str:
        answer = await fs._call_s3("put_object", Bucket=bucket, Key=key, Body=data)  # type: ignore[attr-defined]
        return answer["ETag"]

    monkeypatch.setattr(conditional_put, "_put_s3", put_always)
    with lease.held(s3_url, console):
        (warning,) = warnings(caplog)
    assert "this storage takes no notice of conditions" in warning


def test_storage_without_conditions_holds_nothing(
    memory_url: str, console: Console, caplog: pytest.LogCaptureFixture
) -> None:
    for number in (1, 2):
        with lease.held(memory_url, console) as owner:
            assert owner.token == number
            assert lease.look(memory_url) == (owner, None)
    assert "cannot be locked" in caplog.records[0].getMessage()


def test_a_lease_that_another_took_stops_the_block(s3_url: str, console: Console) -> None:
    with pytest.raises(RunError, match=r"took this run over.*eve@elsewhere"), lease.held(s3_url, console) as owner:
        storage.write_json(f"{s3_url}/owner.json", asdict(replace(owner, token=2, who="eve@elsewhere")))
    assert storage.read_json(f"{s3_url}/owner.json")["released"] is False


def test_what_is_no_lease_is_refused(run_url: str, console: Console) -> None:
    storage.write_json(f"{run_url}/owner.json", {"name": "Ada", "email": "ada@example.org"})
    with pytest.raises(InputError, match=r"owner\.json: is not a run's"), lease.held(run_url, console):
        pytest.fail("it would be written over")


def test_the_job_is_named(tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_x"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    with lease.held(str(tmp_path), console) as owner:
        assert f"(pid {os.getpid()}, Ray job raysubmit_x), since " in str(owner)


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_no_reason_not_to_start(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def flock(handle: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with lease.held(str(tmp_path / "run"), console):
        (warning,) = caplog.records
        assert lease.look(str(tmp_path / "run"))[1] is None
    assert f"{tmp_path}/run: the run directory cannot be locked ({os.strerror(code)})" in warning.getMessage()
