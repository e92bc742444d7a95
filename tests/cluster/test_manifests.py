"""The files of `cluster/` and `launch/` agree with each other and with the package."""

import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from rbm_dist import __version__
from rbm_dist.config.load import load
from rbm_dist.serve.server import TOKEN
from tests.patience import patient

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    """The one document of the KubeRay manifest."""
    (document,) = yaml.safe_load_all((ROOT / "cluster" / "kuberay" / "rayjob.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayJob")
    return document["spec"]


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    """The one document of the manifest that serves students."""
    (document,) = yaml.safe_load_all((ROOT / "cluster" / "kuberay" / "rayservice.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayService")
    return document["spec"]


@pytest.fixture(scope="module", params=["job", "service"])
def cluster(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The cluster of each manifest."""
    spec = request.getfixturevalue(request.param)
    return spec["rayClusterSpec" if request.param == "job" else "rayClusterConfig"]


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]]


def pinned(name: str) -> str:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    (version,) = [line.removeprefix(f"{name}==") for line in lines if line.startswith(f"{name}==")]
    return version


def test_the_entrypoint_is_a_run_whose_workers_find_their_gpus(job: dict[str, Any]) -> None:
    command = shlex.split(job["entrypoint"])
    assert command[:4] == ["python", "-m", "rbm_dist", "run"]
    config = load(ROOT / command[4], command[5:])
    gpus = 0
    for group in job["rayClusterSpec"]["workerGroupSpecs"]:
        (container,) = group["template"]["spec"]["containers"]
        gpus += group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
    assert config.cluster.use_gpu
    assert config.cluster.train_workers == config.cluster.inference_workers == gpus


def test_the_run_directory_is_on_a_volume_of_every_pod(job: dict[str, Any]) -> None:
    command = shlex.split(job["entrypoint"])
    run_dir = Path(load(ROOT / command[4], command[5:]).run_dir)
    for pod in pods(job["rayClusterSpec"]):
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


def test_a_token_guards_the_cluster_and_the_head_does_no_work(cluster: dict[str, Any]) -> None:
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    for pod in pods(cluster):
        assert pod["securityContext"] == {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000}


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
    for pod in pods(service["rayClusterConfig"]):
        (container,) = pod["containers"]
        given = {each["name"]: each for each in container["env"]}
        assert given[TOKEN]["valueFrom"]["secretKeyRef"]["key"] == "token"
        assert {"name": "serve", "containerPort": config.http_options.port} in container["ports"]
        mounts = {Path(mount["mountPath"]) for mount in container["volumeMounts"]}
        assert all(mounts & set(Path(folder).parents) for folder in settings.models.values())


def test_all_pods_run_the_image_of_this_release(cluster: dict[str, Any]) -> None:
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text()
    image = f"rbm-dist:{__version__}"
    assert {container["image"] for pod in pods(cluster) for container in pod["containers"]} == {image}
    assert f"--tag {image}" in dockerfile
    assert cluster["rayVersion"] == pinned("ray")


def test_the_image_copies_files_that_are_there() -> None:
    lines = (ROOT / "cluster" / "Dockerfile").read_text().splitlines()
    copied = [source for line in lines if line.startswith("COPY ") for source in line.split()[1:-1]]
    assert {"rbm_dist", "configs", "constraints.txt"} <= set(copied)
    assert [source for source in copied if not (ROOT / source).exists()] == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_sound(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True, timeout=patient(20))
    if shutil.which("shellcheck"):
        checked = subprocess.run(
            ["shellcheck", script], capture_output=True, text=True, timeout=patient(60), check=False
        )
        assert checked.returncode == 0, checked.stdout
