"""The server as a process: how it begins, who may ask, how it ends, and folders that change while it runs."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import numpy as np
import pytest

import rbm_dist
from rbm_dist.serve.export import export
from tests.patience import patient
from tests.serve.exported import exported
from tests.serve.served import Served, served, tensor

pytest.importorskip("fastapi", reason="rbm-dist[serve] is not installed")

ROWS = [[0.5, -1.0, 2.0, 0.25], [3.0, 0.0, -2.0, 1.0]]
BODY = json.dumps({"inputs": [tensor("feat", ROWS)]}).encode()
INFER = "/v2/models/rbm/infer"


@pytest.fixture
def folder(tmp_path: Path) -> str:
    export(str(tmp_path / "rbm"), *exported())
    return str(tmp_path / "rbm")


def export_another(url: str, factor: float) -> None:
    """Other weights in the same folder."""
    model, tensors = exported()
    scaled = {name: np.asarray(each * (1 if "scaling" in name else factor)) for name, each in tensors.items()}
    export(url, model, scaled)


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + patient(20)
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def begun(server: Served) -> HTTPConnection:
    """A request whose body is still to come."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=patient(20))
    connection.putrequest("POST", INFER)
    connection.putheader("Content-Length", str(len(BODY)))
    connection.endheaders()
    return connection


def listens(server: Served) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", server.port), patient(5)):
        return True
    return False


class Load:
    """Clients that ask without pause on connections that they keep, and go elsewhere when they are told to."""

    def __init__(self, server: Served, clients: int = 8):
        self.server = server
        self.answers: list[tuple[int, dict]] = []
        self.lost: list[str] = []
        self.ended = threading.Event()
        self.threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        connection = HTTPConnection("127.0.0.1", self.server.port, timeout=patient(20))
        while not self.ended.is_set():
            try:
                connection.request("POST", INFER, BODY)
                answer = connection.getresponse()
                self.answers.append((answer.status, json.loads(answer.read())))
            except (OSError, HTTPException) as error:
                self.lost.append(repr(error))
                return
            if answer.will_close:
                return


@contextmanager
def load(server: Served) -> Iterator[Load]:
    running = Load(server)
    for thread in running.threads:
        thread.start()
    try:
        yield running
    finally:
        running.ended.set()
        for thread in running.threads:
            thread.join(patient(20))


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_the_end_loses_no_request(folder: str, sent: int) -> None:
    with served(folder, "--drain", "0.5") as server, load(server) as clients:
        wait_for(lambda: len(clients.answers) > 200)
        slow = begun(server)
        server.process.send_signal(sent)
        wait_for(lambda: not listens(server))
        slow.send(BODY)  # what was begun before the end is answered, however late
        assert slow.getresponse().status == 200
        assert server.process.wait(patient(30)) == 0
        assert not any(thread.is_alive() for thread in clients.threads)
    assert clients.lost == []
    assert {status for status, _ in clients.answers} == {200}
    wait_for(lambda: [line["event"] for line in server.lines if "event" in line] == ["ending", "ended"])


def test_a_second_signal_says_what_it_cut_off(folder: str) -> None:
    with served(folder, "--drain", "30") as server:
        connection = begun(server)
        wait_for(lambda: b"rbm_dist_requests_under_way 2.0" in server.raw("GET", "/metrics")[2])
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.ask("GET", "/v2/health/ready")[0] == 503)
        assert server.end() == 1
        assert server.lines[-1]["unanswered"] == 1
        connection.close()


def test_a_client_that_leaves_is_no_failure_of_the_server(folder: str) -> None:
    with served(folder) as server:
        connection = begun(server)
        wait_for(lambda: b"rbm_dist_requests_under_way 2.0" in server.raw("GET", "/metrics")[2])
        connection.close()
        wait_for(lambda: [line for line in server.lines if line.get("path") == INFER])
        assert [line["status"] for line in server.lines if line.get("path") == INFER] == [499]
        assert server.end() == 0


def test_it_is_not_ready_while_it_ends(folder: str) -> None:
    with served(folder, "--drain", "30") as server:
        assert server.ask("GET", "/v2/health/ready")[0] == 200
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.ask("GET", "/v2/health/ready")[0] == 503)
        assert server.ask("GET", "/v2/health/live")[0] == 200
        status, headers, _ = server.raw("POST", INFER, BODY)
        assert (status, headers["connection"]) == (200, "close")
        assert server.end() == 0  # a second signal does not wait


def test_a_folder_that_is_exported_anew_is_taken_over_under_load(folder: str) -> None:
    before = rbm_dist.load(folder)
    expected = {before.digest: before.predict(np.array(ROWS)).probabilities}
    with served(folder) as server, load(server) as clients:
        for factor in (0.5, 2.0):
            export_another(folder, factor)
            student = rbm_dist.load(folder)
            expected[student.digest] = student.predict(np.array(ROWS)).probabilities
            wait_for(lambda: server.ask("GET", "/v2/models/rbm")[1]["versions"] == [student.digest])  # noqa: B023
        assert server.ask("POST", f"/v2/models/rbm/versions/{before.digest}/infer", BODY)[0] == 404
    assert clients.lost == []
    assert len(expected) == 3
    assert {said["model_version"] for _, said in clients.answers} == set(expected)
    for status, said in clients.answers:
        assert status == 200
        found = np.array(said["outputs"][0]["data"], np.float32).reshape(2, 3)
        np.testing.assert_allclose(found, expected[said["model_version"]], atol=1e-6)


@pytest.mark.parametrize("what", ["weights", "facts", "gone"])
def test_a_folder_that_is_damaged_leaves_the_old_model_at_work(folder: str, what: str) -> None:
    with served(folder) as server:
        version = server.ask("GET", "/v2/models/rbm")[1]["versions"]
        if what == "gone":
            shutil.rmtree(folder)
        else:
            name = {"weights": "model.safetensors", "facts": "model.json"}[what]
            (Path(folder) / name).write_bytes(b"{}")
        wait_for(lambda: [line for line in server.lines if line.get("event") == "reload refused"])
        assert server.ask("POST", INFER, BODY)[0] == 200
        assert server.ask("GET", "/v2/models/rbm")[1]["versions"] == version
        assert b'rbm_dist_reloads_total{model="rbm",outcome="refused"} 1.0' in server.raw("GET", "/metrics")[2]
        shutil.rmtree(folder, ignore_errors=True)
        export_another(folder, 0.5)  # and is forgotten once a sound one is there
        wait_for(lambda: server.ask("GET", "/v2/models/rbm")[1]["versions"] != version)


def test_a_token_is_asked_for_by_all_but_the_probes(folder: str) -> None:
    with served(folder, "--host", "0.0.0.0", RBM_DIST_SERVE_TOKEN="secret") as server:
        assert server.ask("GET", "/v2/health/ready")[0] == 200
        for path in (INFER, "/predict", "/metrics", "/v2/models/rbm", "/v2"):
            for given in ({}, {"Authorization": "Bearer secrets"}, {"Authorization": "secret"}):
                assert server.ask("POST", path, BODY, given)[0] == 401, path
        assert server.ask("POST", INFER, BODY, {"Authorization": "Bearer secret"})[0] == 200


def test_too_many_at_once_are_told_to_come_back(folder: str) -> None:
    with served(folder, "--max-waiting", "2") as server:
        slow = [begun(server), begun(server)]
        wait_for(lambda: b"rbm_dist_requests_under_way 3.0" in server.raw("GET", "/metrics")[2])
        status, headers, content = server.raw("POST", INFER, BODY)
        assert (status, headers["retry-after"], list(json.loads(content))) == (429, "1", ["error"])
        for connection in slow:
            connection.send(BODY)
            assert connection.getresponse().status == 200


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{folder}", "--host", "0.0.0.0"], "RBM_DIST_SERVE_TOKEN"),
        (["{folder}/none"], "no exported student there"),
        (["{folder}", "{folder}"], "a second model named rbm"),
        (["a b={folder}"], "no exported student there"),
        (["{folder}", "--host", "203.0.113.1", "--without-token"], "cannot listen there"),
    ],
)
def test_what_cannot_be_served_is_refused(folder: str, arguments: list[str], reason: str) -> None:
    command = [sys.executable, "-m", "rbm_dist", "serve", *(each.format(folder=folder) for each in arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=patient(30), check=False)
    assert ended.returncode == 2
    assert reason in ended.stderr
    assert "Traceback" not in ended.stderr


BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "ray", "torch_geometric"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
from rbm_dist.cli import main
main()
"""


@pytest.mark.parametrize("engine", ["native", "onnx"])
def test_it_serves_without_torch_and_ray(folder: str, engine: str) -> None:
    expected = rbm_dist.load(folder).predict(np.array(ROWS)).probabilities
    command = [sys.executable, "-c", BLOCKED, "serve", folder, "--engine", engine, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        server = Served(process)
        status, said = server.ask("POST", INFER, BODY)
        assert status == 200
        found = np.array(said["outputs"][0]["data"], np.float32).reshape(2, 3)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        row = dict(zip(("x0", "x1", "x2", "x3"), ROWS[0], strict=True))
        assert server.ask("POST", "/predict", {"rows": [row], "explain": True})[0] == 200
    finally:
        process.kill()
        process.wait(patient(10))
