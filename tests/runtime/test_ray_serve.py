"""The server under Ray Serve on a local cluster: it answers, and goes on when a replica is killed."""

import json
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from typing import Any

import numpy as np
import psutil
import pytest

import rbm_dist
from rbm_dist.serve.export import export
from tests.patience import patient
from tests.serve.exported import exported
from tests.serve.served import tensor

pytest.importorskip("ray.serve", reason="rbm-dist[ray-serve] is not installed")
import ray
from ray import serve

from rbm_dist.runtime.ray_serve import Settings, Students

pytestmark = pytest.mark.slow  # a cluster with Ray Serve takes half a minute to start; the server's own tests are quick
ROWS = [[0.5, -1.0, 2.0, 0.25]]
BODY = json.dumps({"inputs": [tensor("feat", ROWS)]}).encode()
TOKEN = {"Authorization": "Bearer secret"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("rbm"))
    export(url, *exported())
    return url


def run(folder: str, max_rows: int) -> None:
    """Two replicas, or these exchanged for two others."""
    two = Students.options(num_replicas=2, autoscaling_config=None)
    serve.run(two.bind(Settings(models={"rbm": folder}, max_rows=max_rows)), route_prefix="/")


@pytest.fixture(scope="module")
def port(folder: str) -> Iterator[int]:
    """Where Ray Serve listens."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        free = found.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RBM_DIST_SERVE_TOKEN", "secret")
        ray.init(num_cpus=5, include_dashboard=False, log_to_driver=False, object_store_memory=128 << 20)
        try:
            serve.start(http_options={"port": free})
            run(folder, 10)
            yield free
        finally:
            serve.shutdown()
            ray.shutdown()


def ask(port: int, headers: dict[str, str]) -> tuple[int, Any]:
    connection = HTTPConnection("127.0.0.1", port, timeout=patient(20))
    connection.request("POST", "/v2/models/rbm/infer", BODY, headers)
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, json.loads(content) if answer.status == 200 else content


class Load:
    """Clients that ask without pause, and again what was answered with an error."""

    def __init__(self, port: int, folder: str):
        self.port = port
        self.expected = rbm_dist.load(folder).predict(np.array(ROWS)).probabilities
        self.seen: Counter[int] = Counter()
        self.wrong: list[object] = []
        self.ended = threading.Event()

    def client(self) -> None:
        while not self.ended.is_set():
            for attempt in range(20):
                status, said = ask(self.port, TOKEN)
                self.seen[status] += 1
                if status == 200:
                    break
                time.sleep(0.1 * attempt)
            if status != 200 or not np.allclose(said["outputs"][0]["data"], self.expected[0], atol=1e-6):
                self.wrong.append(said)


@contextmanager
def load(port: int, folder: str) -> Iterator[Load]:
    running = Load(port, folder)
    failed: list[BaseException] = []

    def client() -> None:
        try:
            running.client()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=client) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        wait_for(lambda: running.seen[200] > 200)
        yield running
        answered = running.seen[200]
        wait_for(lambda: running.seen[200] > answered + 200)
    finally:
        running.ended.set()
        for thread in threads:
            thread.join(patient(30))
    assert failed == []  # never a connection that breaks
    assert running.wrong == []


def test_only_who_has_the_token_is_answered(port: int) -> None:
    assert ask(port, {})[0] == 401
    assert ask(port, TOKEN)[0] == 200


def test_a_rolling_update_costs_nothing(port: int, folder: str) -> None:
    before = replicas()
    with load(port, folder) as clients:
        run(folder, 20)
        wait_for(lambda: len(replicas()) == 2 and not replicas() & before)
    assert set(clients.seen) == {200}


def test_a_killed_replica_costs_a_second_try_of_what_it_had_under_way(port: int, folder: str) -> None:
    before = replicas()
    with load(port, folder) as clients:
        os.kill(min(before), signal.SIGKILL)
        wait_for(lambda: len(replicas() - before) == 1)  # another one takes its place
    assert set(clients.seen) <= {200, 500}


def replicas() -> set[int]:
    """The processes of this cluster's replicas."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::ServeReplica"):
                found.add(process.pid)
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + patient(30)
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)
