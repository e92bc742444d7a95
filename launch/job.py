"""The jobs of `rbm-dist` on a Ray cluster: list them, say how one fares, show its log, stop it.

Exit codes: `status` and `logs --follow` end as a job that has ended did; else 0 done, 1 the cluster does not answer or
the job does not stop, 2 there is no such job, 130 interrupted.
"""

import shlex
import time
from datetime import datetime, timedelta
from typing import Annotated, Any

import typer

from launch import jobs
from launch.jobs import DEFAULT_ADDRESS, JobServer, first_line, request_errors, with_scheme
from rbm_dist.errors import InputError, RunError

_POLL_S = 0.5
_SPARE_S = 30.0  # for Ray to notice and to note that a job has ended
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
Job = Annotated[str, typer.Argument(metavar="[JOB]", help="Its name, or `latest`.")]


@app.command(name="ls")
def list_jobs(address: JobServer = DEFAULT_ADDRESS) -> None:
    """List the jobs, the latest first."""
    for each in _jobs(jobs.connect(with_scheme(address)), address):
        print(_line(each))


@app.command()
def status(job: Job = "latest", address: JobServer = DEFAULT_ADDRESS) -> None:
    """Say how a job fares; ends with its exit code if it has ended, and with 0 while it has not."""
    details = _find(jobs.connect(with_scheme(address)), job, address)
    print(_line(details))
    raise typer.Exit(jobs.exit_code(details) if details.status.is_terminal() else 0)


@app.command()
def logs(
    job: Job = "latest",
    follow_: Annotated[bool, typer.Option("--follow", help="Until the job ends; then end as it did.")] = False,
    address: JobServer = DEFAULT_ADDRESS,
) -> None:
    """Show what a job printed."""
    client = jobs.connect(with_scheme(address))
    name = _find(client, job, address).submission_id
    if follow_:
        raise typer.Exit(jobs.follow(client, name, with_scheme(address)))
    try:
        print(client.get_job_logs(name), end="")
    except request_errors() as error:
        raise RunError(f"{address} did not send the log of {name}: {first_line(error)}") from None


@app.command()
def stop(job: Job = "latest", address: JobServer = DEFAULT_ADDRESS) -> None:
    """Ask a job to end (SIGTERM), and wait until it has; what it has not kept then is lost after a while (SIGKILL)."""
    client = jobs.connect(with_scheme(address))
    details = _find(client, job, address)
    name = details.submission_id
    grace_s = float(jobs.runtime_environment()["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"])
    end = time.monotonic() + grace_s + _SPARE_S
    try:
        if not details.status.is_terminal():
            client.stop_job(name)
        while not details.status.is_terminal():
            if time.monotonic() > end:
                raise RunError(f"{name} has not ended {grace_s + _SPARE_S:g} s after it was told to")
            time.sleep(_POLL_S)
            details = client.get_job_info(name)
    except request_errors() as error:
        raise RunError(f"{address} did not confirm that {name} has ended: {first_line(error)}") from None
    print(_line(details))


def _jobs(client: Any, address: str) -> list[Any]:
    """What Ray knows of this package's jobs, the latest first. Raises `RunError`."""
    try:
        found = client.list_jobs()
    except request_errors() as error:
        raise RunError(f"{address} did not list its jobs: {first_line(error)}") from None
    # Others submit to the cluster, too; and Ray has no name for what was not submitted.
    ours = [each for each in found if each.submission_id and each.entrypoint.startswith(shlex.join(jobs.ENTRYPOINT))]
    return sorted(ours, key=lambda each: each.start_time or 0, reverse=True)


def _find(client: Any, job: str, address: str) -> Any:
    """One job. Raises `InputError` if it is not there."""
    jobs = _jobs(client, address)
    for each in jobs:
        if job in ("latest", each.submission_id):
            return each
    names = ", ".join(each.submission_id for each in jobs[:5])
    raise InputError(
        f"{job}: no such job of rbm-dist at {address}; {f'the latest are {names}' if names else 'it has none'}"
    )


def _line(job: Any) -> str:
    began, ended = (stamp and stamp / 1000 for stamp in (job.start_time, job.end_time))
    since = f"{datetime.fromtimestamp(began):%Y-%m-%d %H:%M:%S}" if began else "-"
    spent = str(timedelta(seconds=int((ended or time.time()) - began))) if began else "-"
    code = "" if job.driver_exit_code in (None, 0) else f" ({job.driver_exit_code})"
    return f"{job.submission_id}  {job.status}{code}  {since}  {spent}  {job.entrypoint}"


if __name__ == "__main__":
    jobs.main(app)
