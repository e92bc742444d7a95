"""Serve exported students on a Ray cluster: as replicas under Ray Serve, more of them under load.

What is sent is what cluster/kuberay/rayservice.yaml holds for Kubernetes. The same command again, with other folders or
numbers, exchanges the replicas one after another. The cluster's nodes need rbm-dist with its extra `ray-serve`.
Exit codes: 0 the replicas answer, 1 they do not, or the cluster does not, 2 what was asked for cannot be.
"""

import time
from typing import Annotated, Any

import typer

from launch.jobs import DEFAULT_ADDRESS, JobServer, first_line, main, request_errors, use_token_for, with_scheme
from rbm_dist import storage
from rbm_dist.errors import InputError, RunError
from rbm_dist.serve import format as format_
from rbm_dist.serve.repository import named

_POLL_S = 1.0
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def serve(
    folders: Annotated[list[str], typer.Argument(metavar="[NAME=]FOLDER…", help="Exported students.")],
    address: JobServer = DEFAULT_ADDRESS,
    host: Annotated[str, typer.Option(help="Where the nodes' proxies listen, unless they do already.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    replicas: Annotated[int, typer.Option(min=1, help="At least so many.")] = 1,
    max_replicas: Annotated[int, typer.Option(min=1, help="At most so many, under load.")] = 4,
    without_token: Annotated[bool, typer.Option(help="Serve although replicas have no RBM_DIST_SERVE_TOKEN.")] = False,
    timeout_s: Annotated[float, typer.Option(min=1, help="How long to wait for the replicas.")] = 300.0,
) -> None:
    """Deploy, and wait until the replicas answer."""
    if replicas > max_replicas:
        raise InputError(f"--replicas: {replicas} is more than --max-replicas: {max_replicas}")
    models = {name: storage.absolute(url) for name, url in named(folders).items()}
    for url in models.values():
        format_.read(url)
    deployment = {
        "name": "students",
        "autoscaling_config": {"min_replicas": replicas, "max_replicas": max_replicas, "target_ongoing_requests": 32},
    }
    application = {
        "name": "students", "route_prefix": "/", "import_path": "rbm_dist.runtime.ray_serve:students",
        "args": {"models": models, "without_token": without_token}, "deployments": [deployment],
    }  # fmt: skip
    address = with_scheme(address)
    _deploy(address, {"host": host, "port": port}, application, timeout_s)
    print(f"{', '.join(models)}: served on port {port} by the nodes of the cluster of {address}")


def _deploy(address: str, http: dict[str, Any], application: dict[str, Any], timeout_s: float) -> None:
    """Raises `RunError` if the cluster does not answer, or its replicas do not come up."""
    use_token_for(address)
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    name, end = application["name"], time.monotonic() + timeout_s
    try:
        client = ServeSubmissionClient(address)
        there = client.get_serve_details().get("applications", {})
        # What is sent stands for all of Ray Serve's applications: those of others stay.
        others = [each["deployed_app_config"] for key, each in there.items() if key != name]
        client.deploy_applications({"http_options": http, "applications": [*filter(None, others), application]})
        while True:
            found = client.get_serve_details()["applications"].get(name, {})
            status = found.get("status", "DEPLOYING")
            if status == "RUNNING":
                break
            if status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise RunError(f"{address}: the replicas do not come up: {_reason(found)}")
            if time.monotonic() > end:
                raise RunError(f"{address}: the replicas are {status} after {timeout_s:g} s: {_reason(found)}")
            time.sleep(_POLL_S)
    except request_errors() as error:
        raise RunError(
            f"{address}: no Ray Serve is reached there (--address or RAY_API_SERVER_ADDRESS): {first_line(error)}"
        ) from None


def _reason(application: dict[str, Any]) -> str:
    """What Ray Serve says of an application: the error of a replica, if one ended so; else all that there is."""
    said = [each.get("message", "") for each in application.get("deployments", {}).values()]
    text = "\n".join([*said, application.get("message", "")])
    errors = [line.strip() for line in text.splitlines() if "InputError" in line or "RunError" in line]
    return errors[-1] if errors else " ".join(text.split())[-500:]


if __name__ == "__main__":
    main(app)
