"""A really running `rbm-dist serve`, for tests."""

import http.client
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.patience import patient


class Served:
    """The process, and what it wrote."""

    def __init__(self, process: subprocess.Popen[bytes]):
        self.process = process
        self.lines: list[dict[str, Any]] = []
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first, (process.wait(), process.stderr.read() if process.stderr else b"")
        self.port = json.loads(first)["port"]
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines += map(json.loads, self.process.stdout)

    def ask(
        self, method: str, path: str, body: bytes | Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Status and JSON of an answer."""
        status, _, content = self.raw(method, path, body, headers)
        return status, json.loads(content)

    def raw(
        self, method: str, path: str, body: bytes | Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and content of an answer. A body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=patient(20))
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, headers or {})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, answer.headers, content

    def end(self, sent: int = signal.SIGTERM) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(sent)
        code = self.process.wait(patient(30))
        self._reader.join(patient(10))
        return code


@contextmanager
def served(*arguments: str, **environment: str) -> Iterator[Served]:
    """A server on a free port, killed at the end if it still runs."""
    command = [sys.executable, "-m", "rbm_dist", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | environment)
    try:
        yield Served(process)
    finally:
        process.kill()
        process.wait(patient(10))


def tensor(name: str, rows: list[list[float]]) -> dict[str, Any]:
    """An input of the Open Inference Protocol, as JSON."""
    return {"name": name, "datatype": "FP32", "shape": [len(rows), len(rows[0])], "data": list(itertools.chain(*rows))}
