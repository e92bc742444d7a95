"""The server's application: the Open Inference Protocol, a plain endpoint, metrics. Any ASGI server can run it.

Whatever cannot be answered is refused with a status of 4xx and `{"error": reason}`. `server.py` runs it on its own,
`runtime/ray_serve.py` under Ray Serve.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, HTTPException, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route

from rbm_dist import __version__
from rbm_dist.errors import InputError
from rbm_dist.serve import plain, protocol
from rbm_dist.serve.around import CLOSED_BY_CLIENT, Around, Facts, State
from rbm_dist.serve.metrics import Metrics
from rbm_dist.serve.repository import Repository, ServedModel

_BODY_S = 30.0  # for a body to arrive
_READ_ON_LOOP = 1 << 18  # bytes: about a millisecond; of larger bodies, reading would keep others waiting
_JSON = "application/json"
T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """Of one request, and of requests at once."""

    max_body: int = 8 << 20  # bytes
    max_rows: int = 4096
    max_waiting: int = 256  # requests


def application(
    repository: Repository, metrics: Metrics, state: State, limits: Limits, token: str | None, poll_s: float = 1.0
) -> Around:
    """The application. It watches its models' folders while it runs, `poll_s` seconds apart."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        watching = asyncio.create_task(repository.watch(poll_s))
        yield
        watching.cancel()

    app = FastAPI(
        title="rbm-dist", version=__version__, lifespan=lifespan, redoc_url=None, swagger_ui_oauth2_redirect_url=None,
        description="Classes of rows, by students that were distilled from a graph neural network. Beside `/predict` "
        "the server speaks the Open Inference Protocol, version 2, with binary tensors: "
        "`POST /v2/models/{model}/infer`.",
    )  # fmt: skip
    app.add_exception_handler(InputError, _refused)
    app.add_exception_handler(StarletteHTTPException, _refused)
    app.add_exception_handler(500, _failed)
    _add_protocol(app, repository, state, limits)
    _add_plain(app, repository, state, limits)

    @app.get("/metrics", summary="Figures for Prometheus", response_class=Response)
    async def figures() -> Response:
        metrics.under_way.set(state.under_way)
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return Around(app, state, metrics, token)


def _add_protocol(app: FastAPI, repository: Repository, state: State, limits: Limits) -> None:
    @app.get("/v2", summary="The server")
    async def server() -> dict[str, Any]:
        return {"name": "rbm-dist", "version": __version__, "extensions": protocol.EXTENSIONS}

    @app.get("/v2/health/live", summary="Whether the server runs")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready", summary="Whether the server takes requests")
    async def ready() -> dict[str, bool]:
        if not state.ready:
            raise HTTPException(503, "the server is about to end")
        return {"ready": True}

    @app.get("/v2/models/{model}", summary="A model's inputs and outputs")
    @app.get("/v2/models/{model}/versions/{version}", summary="The same, of a version")
    async def metadata(model: str, version: str | None = None) -> dict[str, Any]:
        found = _find(repository, model, version)
        return protocol.metadata(found.student, found.name)

    @app.get("/v2/models/{model}/ready", summary="Whether a model takes requests")
    @app.get("/v2/models/{model}/versions/{version}/ready", summary="The same, of a version")
    async def model_ready(model: str, version: str | None = None) -> dict[str, Any]:
        return {"name": _find(repository, model, version).name, "ready": True}

    async def infer(request: Request) -> Response:
        model = _find(repository, request.path_params["model"], request.path_params.get("version"))
        facts: Facts = request.scope["rbm_dist.facts"]
        facts.model = model.name
        body = await _body(request, state, limits)
        header_length = _header(request, protocol.HEADER_LENGTH)
        asked = await _read(body, lambda: protocol.parse(body, header_length, model.student, limits.max_rows))
        facts.id, facts.rows = asked.id, len(next(iter(asked.inputs.values())))
        probability_BC = await model.batcher.probabilities(asked.inputs)
        content, json_length = protocol.answer(asked, model.name, model.student, probability_BC)
        if json_length is None:
            return Response(content, media_type=_JSON)
        headers = {protocol.HEADER_LENGTH: str(json_length)}
        return Response(content, media_type="application/octet-stream", headers=headers)

    # Before all others, as routes are tried in turn; and Starlette's own: FastAPI's take longer, and what they would
    # check is checked by the protocol.
    app.router.routes[:0] = [
        Route("/v2/models/{model}/infer", infer, methods=["POST"]),
        Route("/v2/models/{model}/versions/{version}/infer", infer, methods=["POST"]),
    ]


def _add_plain(app: FastAPI, repository: Repository, state: State, limits: Limits) -> None:
    question = {"content": {_JSON: {"schema": plain.Question.model_json_schema()}}, "required": True}
    codes = {
        400: "cannot be read",
        401: "no token",
        404: "no such model",
        408: "too slow",
        413: "too large",
        429: "too many",
    }

    @app.post(
        "/predict", summary="Classes and probabilities of some rows", response_model=plain.Answer,
        responses={code: {"model": plain.Failure, "description": text} for code, text in codes.items()},
        openapi_extra={"requestBody": question},
    )  # fmt: skip
    async def predict(request: Request, model: str | None = None) -> Response:
        """`model`: which of the server's models; by default its first."""
        found = _find(repository, model)
        facts: Facts = request.scope["rbm_dist.facts"]
        facts.model, facts.id = found.name, _header(request, "x-request-id")
        body = await _body(request, state, limits)
        asked, inputs = await _read(body, lambda: plain.parse(body, found.student, limits.max_rows))
        facts.rows = len(next(iter(inputs.values())))
        probability_BC = await found.batcher.probabilities(inputs)
        memories = None
        if asked.explain:
            features = {"rows": inputs.get("feat")} | {name: inputs[name] for name in inputs if name != "feat"}
            memories = [each["memories"] for each in await asyncio.to_thread(found.student.explain, **features)]
        said = plain.answer(asked, found.name, found.student, probability_BC, memories)
        return Response(orjson.dumps(said), media_type=_JSON)


def _find(repository: Repository, name: str | None, version: str | None = None) -> ServedModel:
    found = repository.find(name, version)
    if found is None:
        known = ", ".join(f"{each.name} (version {each.student.digest})" for each in repository)
        raise HTTPException(404, f"no such model or version; there are: {known}")
    return found


async def _body(request: Request, state: State, limits: Limits) -> bytes:
    """All of a request's body. Raises `HTTPException` where there is too much of it, or of them."""
    if state.under_way > limits.max_waiting:
        raise HTTPException(429, f"{limits.max_waiting:,} requests are under way; try again", {"Retry-After": "1"})
    if _header(request, "content-encoding") not in (None, "identity"):
        raise HTTPException(415, "compressed bodies are not read")
    too_large = HTTPException(413, f"the body is larger than {limits.max_body:,} bytes (--max-body)")
    if int(_header(request, "content-length") or 0) > limits.max_body:  # the server has checked that it is a number
        raise too_large
    chunks, size = [], 0
    try:
        async with asyncio.timeout(_BODY_S):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limits.max_body:
                    raise too_large
                chunks.append(chunk)
    except TimeoutError:
        raise HTTPException(408, f"the body did not arrive within {_BODY_S:g} s") from None
    except ClientDisconnect:
        raise HTTPException(CLOSED_BY_CLIENT, "the connection was closed within the body") from None
    return b"".join(chunks)


def _header(request: Request, name: str) -> str | None:
    wanted = name.encode()
    for found, value in request.scope["headers"]:  # in lower case; Starlette's mapping takes ten times as long
        if found == wanted:
            return str(value, "latin-1")
    return None


async def _read(body: bytes, parse: Callable[[], T]) -> T:
    return parse() if len(body) <= _READ_ON_LOOP else await asyncio.to_thread(parse)


def _refused(_: Request, error: Exception) -> Response:
    status, reason, headers = 400, str(error), None
    if isinstance(error, StarletteHTTPException):
        status, reason, headers = error.status_code, str(error.detail), error.headers
    elif isinstance(error, protocol.TooManyRowsError):
        status = 413
    # Text may hold halves of characters, which are no UTF-8.
    reason = reason.encode(errors="replace").decode()
    return Response(orjson.dumps({"error": reason}), status, headers, _JSON)


def _failed(_: Request, error: Exception) -> Response:
    return Response(orjson.dumps({"error": "the server failed; its log says why"}), 500, media_type=_JSON)
