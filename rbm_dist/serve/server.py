"""The server as a process: it listens, says where, and ends without leaving a request unanswered.

On SIGTERM or SIGINT it is no longer ready and tells each connection to close, but answers; after `drain_s` it stops
listening, answers what is under way, and is done: exit code 0, as a server that was told to end did not fail. A second
signal ends it at once.
"""

import gc
import os
import socket
import time
from types import FrameType

import uvicorn
from threadpoolctl import threadpool_limits

from rbm_dist.errors import InputError, RunError
from rbm_dist.serve.around import State, log
from rbm_dist.serve.http import Limits, application
from rbm_dist.serve.loaded import EngineName
from rbm_dist.serve.metrics import Metrics
from rbm_dist.serve.repository import Repository

TOKEN = "RBM_DIST_SERVE_TOKEN"
_BACKLOG = 2048
_LAST_ANSWERS_S = 20  # with the default drain still within the 30 s that Kubernetes gives
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    folders: list[str], engine: EngineName, host: str, port: int, limits: Limits, drain_s: float, without_token: bool
) -> None:
    """Serve students until a signal ends it. Raises `InputError`, and `RunError` if requests were left unanswered."""
    token = token_of(f"--host {host}", without_token or host in _LOOPBACK)
    metrics, state = Metrics(), State()
    with threadpool_limits(1):  # one core for the answers, the others for other processes
        repository = Repository(folders, engine, metrics, log)
        app = application(repository, metrics, state, limits, token)
        config = uvicorn.Config(
            app,
            access_log=False,
            log_level="warning",
            timeout_graceful_shutdown=_LAST_ANSWERS_S,
            server_header=False,
            ws="none",
        )
        with _listening(host, port) as listener:
            models = {model.name: model.student.digest for model in repository}
            log(event="serving", host=host, port=listener.getsockname()[1], models=models, token=token is not None)
            server = _Server(config, state, drain_s)
            gc.freeze()  # what is here stays: the collector need not walk through it again and again
            server.run([listener])
    log(event="ended", unanswered=state.cut_off)
    if state.cut_off:
        raise RunError(f"{state.cut_off} requests were not answered before the server ended")


def token_of(where: str, may_be_without: bool) -> str | None:
    """The token that requests must carry, from the environment. Raises `InputError` if there must be one and is not."""
    token = os.environ.get(TOKEN) or None
    if token is not None and not (token.isascii() and token.isprintable()):
        raise InputError(f"{TOKEN}: printable ASCII characters expected")
    if token is None and not may_be_without:
        raise InputError(
            f"{where}: others can reach it, and {TOKEN} is not set; set it to a secret, or say without-token if "
            "something in front of it asks who they are"
        )
    return token


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=_BACKLOG
        )
    except (OSError, OverflowError) as error:
        raise InputError(f"{host}:{port}: cannot listen there (--host, --port): {error}") from None


class _Server(uvicorn.Server):
    """uvicorn's, with a time between the first signal and the end of listening, and an exit code of its own."""

    def __init__(self, config: uvicorn.Config, state: State, drain_s: float):
        super().__init__(config)
        self._state, self._drain_s = state, drain_s
        self._leave_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On a signal. uvicorn's own would raise it again at the end, and so decide the exit code."""
        if self._leave_at is not None:
            self.should_exit = self.force_exit = True
            return
        log(event="ending", signal=sig)
        self._state.ready = False
        self._leave_at = time.monotonic() + self._drain_s

    async def on_tick(self, counter: int) -> bool:
        """Called by uvicorn ten times a second: whether to end."""
        if self._leave_at is not None and time.monotonic() >= self._leave_at:
            self.should_exit = True
        return bool(await super().on_tick(counter))
