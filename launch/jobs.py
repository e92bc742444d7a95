"""`rbm-dist` as a job on a Ray cluster: send the package, show the log, and end as the command itself would.

`ray job submit` turns every failure into exit code 1; this gives the command's own. 1 is also a cluster that does not
answer, 130 an interrupt: the job then goes on without us, 143 a job that was stopped.
"""

import logging
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

import rbm_dist
from rbm_dist.errors import InputError, RunError

_REQUEST_TIMEOUT_S = (10, 30)  # to connect; between two bytes of an answer
_LOST_AFTER_S = 120.0
_POLL_S = 1.0
_LOG_CHARS_PER_S = 200_000  # how much of the log is read again per second, however long it grows

JobServer = Annotated[
    str, typer.Option(help="The job server (dashboard) of the cluster.", envvar="RAY_API_SERVER_ADDRESS")
]
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
ENTRYPOINT = ["python", "-m", "rbm_dist"]
STOPPED = 128 + signal.SIGTERM


def run_job(arguments: list[str], files: list[Path], address: str, results: str) -> int:
    """Run `rbm-dist` with these arguments and some files beside it, and follow it; gives its exit code.

    results: where they will be, for the user. Raises `RunError`.
    """
    address = with_scheme(address)
    client = connect(address)
    job = _send(client, arguments, files, address)
    print(f"job {job} at {address}; results in {results}", flush=True)
    return follow(client, job, address)


def main(app: Callable[[], None]) -> None:
    """Run a command; errors are one message on standard error and a true exit code."""
    try:
        app()
    except (InputError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)


def runtime_environment() -> dict[str, Any]:
    """That of every job, from `runtime_env.yaml`."""
    return yaml.safe_load(Path(__file__).with_name("runtime_env.yaml").read_text(encoding="utf-8"))


def with_scheme(address: str) -> str:
    return address if "://" in address else f"http://{address}"


def use_token_for(address: str) -> None:
    """Before Ray is imported: so that its clients talk to this address, with the token that is there."""
    # Ray lets these variables win over the address it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    # `ray start` uses a token that is there; a client does so only in this mode, which Ray reads when it is imported.
    if "RAY_AUTH_TOKEN" in os.environ or _token_file().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def connect(address: str) -> Any:
    """A client of the job server. Raises `RunError` if none answers there."""
    use_token_for(address)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.disable(logging.INFO)  # how Ray packs the folder

    class Client(JobSubmissionClient):
        # The one way to give each request of Ray's client a deadline.
        def _do_request(self, *args: Any, **kwargs: Any) -> Any:
            return super()._do_request(*args, timeout=_REQUEST_TIMEOUT_S, **kwargs)

    try:
        return Client(address)
    except AuthenticationError as error:
        raise RunError(
            f"{address}: {first_line(error)}. Set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the cluster's token"
        ) from None
    except request_errors() as error:
        raise RunError(
            f"no Ray job server answers at {address} (--address or RAY_API_SERVER_ADDRESS): {first_line(error)}"
        ) from None


def _send(client: Any, arguments: list[str], files: list[Path], address: str) -> str:
    """Send the package and some files, and start the job. Raises `RunError`."""
    # A folder of exactly these: whatever else lies beside them stays here, and files may come from anywhere.
    with tempfile.TemporaryDirectory() as folder:
        package = Path(rbm_dist.__file__).parent
        shutil.copytree(package, Path(folder) / package.name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in files:
            shutil.copy(file, folder)
        try:
            return client.submit_job(
                entrypoint=shlex.join([*ENTRYPOINT, *arguments]),
                runtime_env=runtime_environment() | {"working_dir": folder},
            )
        except request_errors() as error:
            raise RunError(f"{address} did not confirm the job: {first_line(error)}") from None


def follow(client: Any, job: str, address: str) -> int:
    """Print the job's log until it ends; its exit code. Raises `RunError` if the server is silent for too long."""
    try:
        return _follow(client, job, address)
    except KeyboardInterrupt:
        print(f"\ninterrupted; the job goes on. {_how_to_go_on(job, address)}", file=sys.stderr)
        return 130


def _follow(client: Any, job: str, address: str) -> int:
    # The log is read again and again instead of holding a stream open: a lost connection then costs nothing, and a
    # server that goes away is never mistaken for a job that ended.
    shown, heard = 0, time.monotonic()
    while True:
        try:
            # In this order: the log of a job that has ended is whole.
            details = client.get_job_info(job)
            log = client.get_job_logs(job)
        except request_errors() as error:
            if time.monotonic() - heard > _LOST_AFTER_S:
                raise RunError(
                    f"{address} has not answered for {_LOST_AFTER_S:g} s ({first_line(error)}). If the cluster is "
                    f"gone, submit the same again and it goes on; if not, so does the job. "
                    f"{_how_to_go_on(job, address)}"
                ) from None
        else:
            heard = time.monotonic()
            print(log[shown:], end="", flush=True)
            shown = len(log)
            if details.status.is_terminal():
                return exit_code(details)
        time.sleep(_POLL_S + shown / _LOG_CHARS_PER_S)


def exit_code(details: Any) -> int:
    """That of a job that has ended."""
    code: int | None = details.driver_exit_code
    if code is None:  # Ray keeps none of a job that was stopped, or never started
        print(f"error: the job ended as {details.status}: {details.message}", file=sys.stderr)
        return STOPPED if details.status == "STOPPED" else 1
    return code if code >= 0 else 128 - code  # killed by a signal: what a shell would say


def _how_to_go_on(job: str, address: str) -> str:
    script = shlex.quote(str(Path(__file__).with_name("job.sh")))
    return (
        f"Follow it:\n  {script} logs {job} --follow --address {address}\n"
        f"Stop it:\n  {script} stop {job} --address {address}"
    )


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def request_errors() -> tuple[type[Exception], ...]:
    from ray.exceptions import AuthenticationError

    # The connection (also of `requests`); a refusal of the server; an answer that is none of a Ray job server.
    return (OSError, RuntimeError, AuthenticationError, ValueError, KeyError)


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
