"""What surrounds every request, whatever it asks for: the token, the number under way, a log line, the figures.

A plain ASGI application around another one, so that it costs microseconds and works under any server.
"""

import asyncio
import hmac
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rbm_dist.serve.metrics import Metrics

_OPEN = ("/v2/health/", "/docs", "/openapi.json")  # for probes and people; they say nothing about models
CLOSED_BY_CLIENT = 499  # nginx's: who asked left before the answer


@dataclass(slots=True)
class Facts:
    """What an endpoint learns about its request, for the log and the figures."""

    model: str = ""
    rows: int = 0
    id: str | None = None


@dataclass
class State:
    """Of a server: whether it takes requests, how many are not answered yet, and how many never will be."""

    ready: bool = True
    under_way: int = 0
    cut_off: int = 0


def log(**facts: Any) -> None:
    """Write a line of JSON to standard output."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    with suppress(OSError):  # a log that no one reads any longer keeps no one from an answer
        sys.stdout.buffer.write(orjson.dumps({"time": now} | facts) + b"\n")
        sys.stdout.buffer.flush()


class Around:
    """The outermost application."""

    def __init__(self, app: ASGIApp, state: State, metrics: Metrics, token: str | None):
        self.app, self.state, self._metrics = app, state, metrics
        self._token = None if token is None else f"Bearer {token}".encode()
        self._counters: dict[tuple[str, int], Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), CLOSED_BY_CLIENT
        facts = scope["rbm_dist.facts"] = Facts()

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not self.state.ready:  # its next request is for another server
                    message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
            await send(message)

        self.state.under_way += 1
        try:
            if self._token is None or self._allowed(scope):
                await self.app(scope, receive, watched)
            else:
                await _refuse(watched)
        except asyncio.CancelledError:
            self.state.cut_off += 1
            raise
        finally:
            self.state.under_way -= 1
            self._note(scope, facts, status, time.perf_counter() - start)

    def _allowed(self, scope: Scope) -> bool:
        assert self._token is not None
        if scope["path"].startswith(_OPEN):
            return True
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        return hmac.compare_digest(given, self._token)

    def _note(self, scope: Scope, facts: Facts, status: int, seconds: float) -> None:
        counters = self._counters.get((facts.model, status))
        if counters is None:
            metrics, model = self._metrics, facts.model
            counters = (metrics.requests.labels(model, str(status)), metrics.seconds.labels(model))
            counters += (metrics.rows.labels(model),)
            self._counters[facts.model, status] = counters
        counters[0].inc()
        counters[1].observe(seconds)
        if status == 200 and facts.rows:
            counters[2].inc(facts.rows)
        log(
            method=scope["method"], path=scope["path"], status=status, ms=round(1e3 * seconds, 3), model=facts.model,
            rows=facts.rows, id=facts.id,
        )  # fmt: skip


async def _refuse(send: Send) -> None:
    body = b'{"error":"a token is wanted: Authorization: Bearer TOKEN"}'
    headers = [
        (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
        (b"www-authenticate", b"Bearer"),
    ]  # fmt: skip
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
