"""Runs submitted as jobs to a real Ray cluster: exit codes, the log, and what survives a bad connection."""

import http.server
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

import rbm_dist
from launch import submit
from rbm_dist.config.load import flatten, load
from rbm_dist.serve.export import export
from tests.patience import patient
from tests.serve.exported import exported
from tests.serve.test_tables import columns, write_model
from tests.sources.table_input import save

ROOT = Path(__file__).parents[2]
NOWHERE = "http://127.0.0.1:1"
SHORT = [
    "partition.num_parts=2", "teacher.epochs=1", "student.epochs=1", "student.models=[mlp]",
    "cluster.train_workers=1", "cluster.inference_workers=1", f"cluster.silence_timeout_s={patient(300)}",
]  # fmt: skip


@dataclass(frozen=True)
class Cluster:
    address: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Ray cluster of one node with a token of its own; all its processes are gone at the end."""
    ports = [free_port() for _ in range(3)]
    address = f"http://127.0.0.1:{ports[0]}"
    programs = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
    }
    environment.pop("RAY_ADDRESS", None)
    # Not pytest's folder: Ray's sockets lie below it, and the path of a socket is 107 characters long at most.
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
    command = [
        f"{programs}/ray", "start", "--head", "--block", "--port=0", f"--dashboard-port={ports[0]}",
        f"--dashboard-agent-listen-port={ports[1]}", f"--ray-client-server-port={ports[2]}", "--num-cpus=4",
        "--include-dashboard=true", f"--temp-dir={folder}", "--object-store-memory=100000000", "--disable-usage-stats",
    ]  # fmt: skip
    with open(folder / "out", "w") as out:
        head = subprocess.Popen(command, env=environment, cwd=folder, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + patient(90)
        while not answers(address):
            assert head.poll() is None, (folder / "out").read_text()
            assert time.monotonic() < deadline, (folder / "out").read_text()
            time.sleep(0.5)
        yield Cluster(address, environment)
    finally:
        processes = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        for process in processes:
            process.kill()
        head.wait()
        psutil.wait_procs(processes, timeout=patient(10))
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    # Above the range that Ray keeps for its workers.
    for port in range(20_000 + secrets.randbelow(10_000), 32_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no free port")


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=5)
    except urllib.error.HTTPError as error:
        return error.code == 401  # it asks for the token
    except OSError:
        return False
    return True


class Submitted:
    """`launch/submit.sh`, or another script, in a process of its own; what it prints is kept."""

    def __init__(
        self, *arguments: str, address: str, folder: Path, environment: dict[str, str] | None = None,
        script: str = "submit.sh",
    ):  # fmt: skip
        environment = (environment or dict(os.environ)) | {"PYTHON": sys.executable, "RAY_API_SERVER_ADDRESS": address}
        self.process = subprocess.Popen(
            [ROOT / "launch" / script, *arguments],
            cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def wait(self, timeout: float = patient(60)) -> tuple[int, str, str]:
        """Exit code, output, errors."""
        try:
            out, errors = self.process.communicate(timeout=timeout)
        finally:
            self.process.kill()
        return self.process.returncode, out, errors

    def wait_for_line(self, text: str) -> None:
        """Read the output up to a line that has this text; the test's own timeout is the deadline."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if text in line:
                return
        raise AssertionError(self.wait())


@pytest.fixture
def bad_input(tmp_path: Path) -> Path:
    """A configuration outside the repository that is good; the file it names is not there."""
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: out\nsource: {kind: npz, path: 'no such: #file.npz'}\n")
    return path


def test_a_bad_key_is_refused_without_a_cluster(tmp_path: Path) -> None:
    arguments = [str(ROOT / "configs" / "quickstart.yaml"), "student.experts=8"]
    code, out, errors = Submitted(*arguments, address=NOWHERE, folder=tmp_path).wait()
    assert (code, out) == (2, "")
    assert "student.experts: unknown key" in errors


def test_every_local_path_is_that_of_the_folder_of_the_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file and the overrides that the job gets, in a folder of its own."""
    config = tmp_path / "run.yaml"
    config.write_text("run_dir: out\nsource: {kind: tables, nodes: 'n: #1/*.csv', edges: s3://bucket/e}\n")
    monkeypatch.chdir(tmp_path)
    here = load(config)
    overrides = submit._paths(here)
    (tmp_path / "job").mkdir()
    monkeypatch.chdir(tmp_path / "job")
    assert load(config) != here
    assert load(config, overrides) == here
    assert flatten(here.model_dump())["source.nodes"] == f"{tmp_path}/n: #1/*.csv"


def test_no_cluster_is_one_message(bad_input: Path, tmp_path: Path) -> None:
    code, out, errors = Submitted(str(bad_input), address=NOWHERE, folder=tmp_path).wait(timeout=patient(30))
    assert (code, out) == (1, "")
    assert errors.startswith(f"error: no Ray job server answers at {NOWHERE}")
    assert len(errors.splitlines()) == 1


def test_a_server_that_says_nothing_has_a_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        script = (
            "from launch import jobs; jobs._REQUEST_TIMEOUT_S = (1, 1)\n"
            f"try: jobs.connect('http://127.0.0.1:{mute.getsockname()[1]}')\n"
            "except jobs.RunError as error: print(error)"
        )
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patient(30), check=True)
    assert "timed out" in done.stdout


@pytest.mark.timeout(patient(120))
@pytest.mark.slow
def test_a_dry_run_asks_the_cluster_and_starts_nothing(cluster: Cluster, tmp_path: Path) -> None:
    arguments = [str(ROOT / "configs" / "quickstart.yaml"), "run_dir=out", "partition.num_parts=9", "--dry-run"]

    def submitted(*more: str) -> tuple[int, str, str]:
        options = {"address": cluster.address, "folder": tmp_path, "environment": cluster.environment}
        return Submitted(*arguments, *more, **options).wait()

    code, out, errors = submitted("cluster.train_workers=4")
    assert code == 0, out + errors
    assert out.count(": to do\n") == 6
    code, out, _ = submitted("cluster.train_workers=9")
    assert code == 1
    assert "cluster.train_workers: 9 need a CPU each, and there is room for 4" in out
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(patient(240))
def test_a_run_shows_its_progress_and_writes_its_results(cluster: Cluster, tmp_path: Path) -> None:
    arguments = [str(ROOT / "configs" / "quickstart.yaml"), "run_dir=out", *SHORT]
    submitted = Submitted(*arguments, address=cluster.address, folder=tmp_path, environment=cluster.environment)
    code, out, errors = submitted.wait(timeout=patient(200))
    assert code == 0, out + errors
    assert f"results in {tmp_path}/out\n" in out
    for stage in ["source", "partition", "teacher", "soft_labels", "student", "evaluate"]:
        assert out.count(f"✓ {stage}: ") == 1
    assert (tmp_path / "out" / "results.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(patient(120))
def test_predictions_as_a_job(cluster: Cluster, tmp_path: Path) -> None:
    write_model(f"{tmp_path}/student")
    save(f"{tmp_path}/in/nodes.parquet", columns())

    def submitted(*more: str) -> tuple[int, str, str]:
        arguments = ("student", "--nodes", "in/*.parquet", "--out", "out/", *more)
        options = {"address": cluster.address, "folder": tmp_path, "environment": cluster.environment}
        return Submitted(*arguments, **options, script="predict.sh").wait(timeout=patient(60))

    code, out, errors = submitted("--top-k", "2")
    assert code == 0, out + errors
    assert f"results in {tmp_path}/out" in out
    assert "top_classes" in pq.read_schema(tmp_path / "out/nodes.parquet").names
    code, out, _ = submitted()
    assert code == 2
    assert "holds other predictions" in " ".join(out.split())


class Unreliable(http.server.BaseHTTPRequestHandler):
    """Hands requests on to the job server, but hangs up on two of five questions about a job."""

    server: "UnreliableServer"

    def _hand_on(self) -> None:
        self.server.asked += "/api/jobs/raysubmit" in self.path
        # Status and log are asked for in turn: each of them is refused now and then.
        if "/api/jobs/raysubmit" in self.path and self.server.asked % 5 in (1, 3):
            return  # no answer at all: the connection is closed
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        request = urllib.request.Request(
            self.server.behind + self.path, data=body or None, headers=headers, method=self.command
        )
        try:
            with urllib.request.urlopen(request, timeout=patient(30)) as answer:
                status, content = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, content = error.code, error.read()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = _hand_on

    def log_message(self, *_: object) -> None:
        pass


class UnreliableServer(http.server.ThreadingHTTPServer):
    behind = ""
    asked = 0


@pytest.mark.timeout(patient(120))
def test_bad_input_exits_2_and_lost_connections_lose_nothing(cluster: Cluster, bad_input: Path, tmp_path: Path) -> None:
    with UnreliableServer(("127.0.0.1", 0), Unreliable) as server:
        server.behind = cluster.address
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        submitted = Submitted(str(bad_input), address=address, folder=tmp_path, environment=cluster.environment)
        code, out, errors = submitted.wait(timeout=patient(90))
        server.shutdown()
    assert code == 2, out + errors
    assert out.count(f"error: {tmp_path}/no such: #file.npz: no such file") == 1
    assert out.count("Running entrypoint") == 1
    assert server.asked > 5


@pytest.mark.timeout(patient(120))
def test_a_killed_run_exits_as_a_killed_process_does(cluster: Cluster, tmp_path: Path) -> None:
    arguments = [str(ROOT / "configs" / "quickstart.yaml"), "run_dir=out"]
    submitted = Submitted(*arguments, address=cluster.address, folder=tmp_path, environment=cluster.environment)
    submitted.wait_for_line("rbm-dist quickstart.yaml")
    (driver,) = [
        process
        for process in psutil.process_iter(["cmdline"])
        if (process.info["cmdline"] or [])[1:3] == ["-m", "rbm_dist"] and str(tmp_path) in process.info["cmdline"][-1]
    ]
    driver.kill()
    code, out, errors = submitted.wait()
    assert code == 128 + signal.SIGKILL, out + errors


@pytest.mark.timeout(patient(120))
def test_after_an_interrupt_the_job_goes_on_until_it_is_stopped(cluster: Cluster, tmp_path: Path) -> None:
    """With the commands that are printed, from a folder of no importance."""
    options = {"address": cluster.address, "folder": tmp_path, "environment": cluster.environment}

    def job(*arguments: str) -> tuple[int, str, str]:
        return Submitted(*arguments, **options, script="job.sh").wait()

    submitted = Submitted(str(ROOT / "configs" / "quickstart.yaml"), "run_dir=out", **options)
    submitted.wait_for_line("rbm-dist quickstart.yaml")
    submitted.process.send_signal(signal.SIGINT)
    code, _, errors = submitted.wait()
    assert code == 130
    assert "the job goes on" in errors
    followed, stopped = (shlex.split(line) for line in errors.splitlines() if "job.sh" in line)
    assert {followed[0], stopped[0]} == {str(ROOT / "launch" / "job.sh")}
    name = stopped[2]

    code, out, _ = job("status", name)
    assert (code, out.split()[:2]) == (0, [name, "RUNNING"])
    assert f'run_dir="{tmp_path}/out"' in out
    follower = Submitted(*followed[1:], **options, script="job.sh")
    follower.wait_for_line("rbm-dist quickstart.yaml")
    code, out, errors = job(*stopped[1:])
    assert (code, out.split()[:2]) == (0, [name, "STOPPED"]), errors
    assert follower.wait()[0] == 128 + signal.SIGTERM, "a job that was stopped did not do its work"
    assert job("status", name)[0] == 128 + signal.SIGTERM
    code, out, _ = job("logs")
    assert code == 0
    assert "Running entrypoint" in out, "the latest job, where none is named"
    assert name in job("ls")[1].split()
    code, _, errors = job("stop", "nobody")
    assert code == 2
    assert f"nobody: no such job of rbm-dist at {cluster.address}; the latest are {name}" in errors


def test_no_cluster_lists_no_jobs(tmp_path: Path) -> None:
    code, out, errors = Submitted("ls", address=NOWHERE, folder=tmp_path, script="job.sh").wait(timeout=patient(30))
    assert (code, out) == (1, "")
    assert errors.startswith(f"error: no Ray job server answers at {NOWHERE}")


def test_a_wrong_token_is_one_message(cluster: Cluster, bad_input: Path, tmp_path: Path) -> None:
    environment = cluster.environment | {"RAY_AUTH_TOKEN": secrets.token_hex(16)}
    submitted = Submitted(str(bad_input), address=cluster.address, folder=tmp_path, environment=environment)
    code, out, errors = submitted.wait()
    assert (code, out) == (1, "")
    assert "RAY_AUTH_TOKEN" in errors
    assert len(errors.splitlines()) == 1


def test_students_are_served_by_the_cluster(cluster: Cluster, tmp_path: Path) -> None:
    pytest.importorskip("ray.serve", reason="rbm-dist[ray-serve] is not installed")
    folder, port = tmp_path / "student", free_port()
    export(str(folder), *exported())

    def serve(*arguments: str) -> tuple[int, str, str]:
        arguments = ("--port", str(port), "--replicas", "1", "--max-replicas", "1", *arguments)
        environment = cluster.environment
        started = Submitted(
            *arguments, address=cluster.address, folder=tmp_path, environment=environment, script="serve.sh"
        )
        return started.wait(patient(120))

    code, _, errors = serve("a=student")
    assert code == 1
    assert "RBM_DIST_SERVE_TOKEN" in errors, "a replica without a token is not served by accident"
    assert serve("a=nowhere")[0] == 2
    code, out, errors = serve("a=student", "--without-token")
    assert (code, errors) == (0, "")
    assert f"a: served on port {port}" in out
    question = urllib.request.Request(f"http://127.0.0.1:{port}/predict", b'[{"x0": 1, "x1": 2, "x2": 3, "x3": 4}]')
    with urllib.request.urlopen(question, timeout=patient(20)) as answer:
        [said] = json.load(answer)["predictions"]
    expected = rbm_dist.load(str(folder)).predict([1, 2, 3, 4])
    assert said["class_name"] == expected.classes[0]
    assert said["probability"] == pytest.approx(float(expected.probabilities.max()), rel=1e-5)
