"""Answers over HTTP: the time of a request for predictions, against one that the same server answers without any.

    python -m benchmarks.http [--quick] [--json FILE]

The floor is an endpoint in the same application (same process, routing, token check, log line and figures) that reads a
body of the same size and answers with bytes of the same size. So it holds all that HTTP costs here, and nothing of what
is done for an answer: reading the tensors, the student, writing the answer. The ratio is that of its figure to ours.
The CPU time of the server per request hardly depends on what else the machine does.

Clients are coroutines of one other process, on kept connections, each asking again as soon as it is answered. They
write prepared bytes and look at the status and length of an answer only: some 25 µs of CPU time per request, a sixth of
what the server takes at least. Server and clients share this machine's cores.
The student is an RbM of 64 → 128 → 10 with 16 experts, k = 1.

Then twice as many requests per second as those clients get done are sent, whether answered or not, on 512 connections.
Errors are answers other than 200 and 429, and requests that are never answered.
"""

import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import cycle
from typing import Any, NamedTuple

import numpy as np
import psutil

from benchmarks.report import Row, main

FEATURES, HIDDEN, CLASSES, EXPERTS = 64, 128, 10, 16
TARGET = 1 / 1.5
CONNECTIONS = 512


class Question(NamedTuple):
    """A request as it goes over the wire."""

    content: bytes

    @classmethod
    def of(cls, path: str, body: bytes, headers: str = "") -> "Question":
        head = f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        return cls(head.encode() + body)


def tensors(rows: int, binary: bool) -> tuple[bytes, str]:
    """A body of the Open Inference Protocol, and its headers."""
    x = np.random.default_rng(0).standard_normal((rows, FEATURES)).astype(np.float32)
    tensor: dict[str, Any] = {"name": "feat", "shape": x.shape, "datatype": "FP32"}
    if not binary:
        return json.dumps({"inputs": [tensor | {"data": x.ravel().tolist()}]}).encode(), ""
    tensor["parameters"] = {"binary_data_size": x.nbytes}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + x.tobytes(), f"Inference-Header-Content-Length: {len(head)}\r\n"


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, question: bytes) -> tuple[int, int]:
    """Status and length of an answer."""
    writer.write(question)
    head = await reader.readuntil(b"\r\n\r\n")
    at = head.index(b"\r\ncontent-length: ") + 18
    length = int(head[at : head.index(b"\r\n", at)])
    await reader.readexactly(length)
    return int(head[9:12]), length


async def _closed(port: int, question: bytes, clients: int, budget_s: float) -> list[float]:
    """Seconds of each request of some clients that wait for their answers."""
    times: list[float] = []
    end = time.perf_counter() + budget_s

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await _ask(reader, writer, question)
        while (start := time.perf_counter()) < end:
            status, _ = await _ask(reader, writer, question)
            assert status == 200, status
            times.append(time.perf_counter() - start)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return times


async def _open(port: int, question: bytes, per_s: float, budget_s: float) -> Counter:
    """How many requests, sent at a rate, got which answer; `error`: none."""
    counts: Counter = Counter()
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(CONNECTIONS)]

    async def answers(reader: asyncio.StreamReader) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
                at = head.index(b"\r\ncontent-length: ") + 18
                await reader.readexactly(int(head[at : head.index(b"\r\n", at)]))
            except (asyncio.IncompleteReadError, OSError):
                return
            counts[head[9:12].decode()] += 1

    readers = [asyncio.create_task(answers(reader)) for reader, _ in connections]
    start, sent = time.perf_counter(), 0
    for _, writer in cycle(connections):
        now = time.perf_counter() - start
        if now > budget_s:
            break
        if sent >= per_s * now:
            await asyncio.sleep(0.0005)
            continue
        writer.write(question)
        sent += 1
        if sent % 64 == 0:
            await asyncio.sleep(0)
    patience = time.perf_counter() + 4 * budget_s
    while sum(counts.values()) < sent and time.perf_counter() < patience:
        await asyncio.sleep(0.05)
    counts["error"] = sent - sum(counts.values())
    counts["per_s"] = round(sent / budget_s)
    for task in readers:
        task.cancel()
    return counts


def _in_this_process(name: str, arguments: tuple) -> Any:
    import uvloop

    return uvloop.run({"closed": _closed, "open": _open, "length": _length}[name](*arguments))


async def _length(port: int, question: bytes) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    found = (await _ask(reader, writer, question))[1]
    writer.close()
    return found


def measure(quick: bool) -> list[Row]:
    budget_s = 1.0 if quick else 6.0
    with tempfile.TemporaryDirectory() as folder:
        make(folder)
        command = [sys.executable, "-m", "benchmarks.http", "--serve", folder]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ)
        try:
            assert server.stdout is not None
            port = json.loads(server.stdout.readline())["port"]
            log = multiprocessing.Process(target=_drain, args=(server.stdout.fileno(),), daemon=True)
            log.start()
            with multiprocessing.get_context("spawn").Pool(1) as clients:
                return figures(psutil.Process(server.pid), port, clients, budget_s)
        finally:
            server.terminate()
            server.wait(60)


def figures(server: psutil.Process, port: int, clients: Any, budget_s: float) -> list[Row]:
    """All figures of a server, by clients in another process."""

    def by_clients(name: str, *arguments: Any) -> Any:
        return clients.apply(_in_this_process, (name, (port, *arguments)))

    rows, fastest = [], 0.0
    for binary in (True, False):
        for size in (1, 64):
            body, headers = tensors(size, binary)
            ours = Question.of("/v2/models/rbm/infer", body, headers).content
            floor = Question.of(f"/floor?bytes={by_clients('length', ours)}", body).content
            for count in (1, 32):
                times: dict[bytes, list[float]] = {ours: [], floor: []}
                cpu_s = dict.fromkeys(times, 0.0)
                for _ in range(3):  # in turns, as others compute on this machine, too
                    for question, found in times.items():
                        before = sum(server.cpu_times()[:2])
                        found += by_clients("closed", question, count, budget_s / 3)
                        cpu_s[question] += sum(server.cpu_times()[:2]) - before
                mine, least = np.array(times[ours]), np.array(times[floor])
                name = f"{'binary' if binary else 'JSON'}, {size} rows, {count} clients"
                # A single row in binary is what the aim is for: many rows are read and computed, which the floor does
                # not do, and many clients wait for each other's batch.
                target = TARGET if (binary, size, count) == (True, 1, 1) else None
                for what, quantile in (("median", 0.5), ("p99", 0.99)):
                    # The slowest hundredth of a second's answers is a handful.
                    aim = None if what == "p99" and budget_s < 2 else target
                    value, floor_value = np.quantile(mine, quantile), np.quantile(least, quantile)
                    rows.append(Row(f"{name}: {what}", value * 1e6, "µs", float(floor_value / value), aim))
                mine_s, least_s = (cpu_s[question] / len(times[question]) for question in (ours, floor))
                rows.append(Row(f"{name}: CPU of the server", mine_s * 1e6, "µs", least_s / mine_s, 0.0))
                if size == 1 and binary:
                    fastest = max(fastest, len(mine) / budget_s)
    body, headers = tensors(1, True)
    counts = by_clients("open", Question.of("/v2/models/rbm/infer", body, headers).content, 2 * fastest, budget_s)
    name = f"{counts['per_s']:,} requests/s sent, {fastest:,.0f} are sustained"
    rows.append(Row(f"{name}: errors", counts["error"] + sum(counts[each] for each in counts if each[0] == "5"), "",
                    1.0 if counts["error"] == 0 else 0.0, 1.0))  # fmt: skip
    rows.append(Row(f"{name}: 429", counts["429"], "", 1.0, 0.0))
    return rows


def make(url: str) -> None:
    """Export a student of random weights."""
    import torch

    from rbm_dist import __version__
    from rbm_dist.models.student import make_mlp, mlp_to_rbm
    from rbm_dist.serve.export import export
    from rbm_dist.serve.format import Column, Features, ModelFile, NetworkFacts, NodeId

    torch.manual_seed(0)
    mlp = make_mlp(FEATURES, HIDDEN, CLASSES, num_layers=2, norm="layer", dropout=0.0, seed=0).eval()
    student = mlp_to_rbm(mlp, [torch.randn(EXPERTS, FEATURES)], top_k=1).eval()
    facts = NetworkFacts(
        kind="rbm", inputs=("feat",), num_features=FEATURES, hidden=HIDDEN, num_classes=CLASSES, num_layers=2,
        norm="layer", num_experts=EXPERTS, top_k=1, routing="input", routing_temperature=1.0, input_attention=False,
        ensemble_size=1,
    )  # fmt: skip
    column = Column(name="feat", how="list", type="numbers", width=FEATURES)
    model = ModelFile(
        name="rbm", rbm_dist=__version__, network=facts, class_names=None, inputs={"feat": FEATURES},
        features=Features(columns=(column,), named=False, missing=False, rows=""),
        id=NodeId(column=None, kind="integer", arrow="int64"),
        made_from={"run": "random weights", "graph": {"num_nodes": 1, "num_edges": 1}},
    )  # fmt: skip
    tensors_ = {name: each.numpy() for name, each in student.state_dict().items()}
    scaling = np.stack([np.zeros(FEATURES), np.zeros(FEATURES), np.ones(FEATURES)])
    export(url, model, tensors_ | {"scaling.columns": scaling, "scaling.indicators": np.empty(0, np.int64)})


def serve(url: str) -> None:
    """Run the server with one more endpoint."""
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from rbm_dist.serve import http, server

    async def floor(request: Request) -> Response:
        request.scope["rbm_dist.facts"].model = "rbm"
        await request.body()
        return Response(b"x" * int(request.query_params["bytes"]), media_type="application/octet-stream")

    application = http.application

    def with_floor(*arguments: Any) -> Any:
        made = application(*arguments)
        made.app.router.routes.insert(0, Route("/floor", floor, methods=["POST"]))  # found as soon as ours is
        return made

    server.application = with_floor
    server.serve([url], "native", "127.0.0.1", 0, http.Limits(), 0.0, False)


def _drain(stream: int) -> None:
    while os.read(stream, 1 << 20):
        pass


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2])
    else:
        main("Answers over HTTP, 64 → 128 → 10, one process", measure)
