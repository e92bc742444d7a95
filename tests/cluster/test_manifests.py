"""The files of `cluster/` and `launch/` agree with each other and with the package."""

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rbm_dist.config.load import load
from rbm_dist.serve.server import TOKEN
from tests.cluster.manifests import ROOT, pods_of, read
from tests.patience import patient

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    """The run as a Kubernetes job."""
    return read(ROOT / "cluster" / "kuberay" / "rayjob.yaml")["spec"]


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    """What serves students."""
    return read(ROOT / "cluster" / "kuberay" / "rayservice.yaml")["spec"]


def test_the_entrypoint_is_a_run_whose_workers_find_their_gpus(job: dict[str, Any]) -> None:
    command = shlex.split(job["entrypoint"])
    assert command[:4] == ["python", "-m", "rbm_dist", "run"]
    config = load(ROOT / command[4], command[5:])
    gpus = 0
    for group in job["rayClusterSpec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        gpus += group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert config.cluster.use_gpu
    assert config.cluster.most_workers == config.cluster.inference_workers == gpus
    assert config.cluster.fewest_workers < gpus, "on spot nodes: it goes on with fewer"
    assert not set(job["entrypoint"]) & set("'\"$*?"), (
        "several shells and Ray read it: nothing that one of them would change"
    )


def test_the_run_directory_is_on_a_volume_of_every_pod(job: dict[str, Any]) -> None:
    command = shlex.split(job["entrypoint"])
    run_dir = Path(load(ROOT / command[4], command[5:]).run_dir)
    for pod in pods_of(job["rayClusterSpec"]):
        claims = {volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
        (container,) = pod["containers"]
        mounts = {Path(mount["mountPath"]) for mount in container["volumeMounts"] if mount["name"] in claims}
        assert mounts & set(run_dir.parents)


def test_the_environment_is_that_of_a_submitted_job(job: dict[str, Any]) -> None:
    submitted = yaml.safe_load((ROOT / "launch" / "runtime_env.yaml").read_text())
    assert yaml.safe_load(job["runtimeEnvYAML"]) == submitted
    assert all(isinstance(value, str) for value in submitted["env_vars"].values())  # Ray refuses others


def test_a_failed_job_is_tried_again_and_its_cluster_ends(job: dict[str, Any]) -> None:
    assert job["shutdownAfterJobFinishes"] is True
    assert job["backoffLimit"] > 0


def test_the_service_is_what_ray_serve_and_we_understand(service: dict[str, Any]) -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="rbm-dist[ray-serve] is not installed")
    from rbm_dist.runtime import ray_serve

    config = schema.ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == f"{ray_serve.__name__}:{ray_serve.students.__name__}"
    settings = ray_serve.Settings.model_validate(application.args)
    assert not settings.without_token
    (deployment,) = application.deployments
    assert deployment.name == ray_serve.Students.name
    assert deployment.max_ongoing_requests == ray_serve.MAX_ONGOING
    for pod in pods_of(service["rayClusterConfig"]):
        (container,) = pod["containers"]
        given = {each["name"]: each for each in container["env"]}
        assert given[TOKEN]["valueFrom"]["secretKeyRef"]["key"] == "token"
        assert {"name": "serve", "containerPort": config.http_options.port} in container["ports"]
        mounts = {Path(mount["mountPath"]) for mount in container["volumeMounts"]}
        assert all(mounts & set(Path(folder).parents) for folder in settings.models.values())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True, timeout=patient(20))
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    checked = subprocess.run(["shellcheck", script], capture_output=True, text=True, timeout=patient(60), check=False)
    assert checked.returncode == 0, checked.stdout
