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
from tests.patience import patient

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


@pytest.fixture(scope="module")
def job() -> dict[str, Any]:
    """The one document of the KubeRay manifest."""
    (document,) = yaml.safe_load_all((ROOT / "cluster" / "kuberay" / "rayjob.yaml").read_text())
    assert (document["apiVersion"], document["kind"]) == ("ray.io/v1", "RayJob")
    return document["spec"]


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["rayClusterSpec"]
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
    for pod in pods(job):
        claims = {volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
        (container,) = pod["containers"]
        mounts = {Path(mount["mountPath"]) for mount in container["volumeMounts"] if mount["name"] in claims}
        assert mounts & set(run_dir.parents)


def test_the_environment_is_that_of_a_submitted_job(job: dict[str, Any]) -> None:
    submitted = yaml.safe_load((ROOT / "launch" / "runtime_env.yaml").read_text())
    assert yaml.safe_load(job["runtimeEnvYAML"]) == submitted
    assert all(isinstance(value, str) for value in submitted["env_vars"].values())  # Ray refuses others


def test_a_token_guards_the_cluster_and_the_head_does_no_work(job: dict[str, Any]) -> None:
    cluster = job["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0", "num-gpus": "0"}
    assert job["shutdownAfterJobFinishes"] is True
    assert job["backoffLimit"] > 0


def test_all_pods_run_the_image_of_this_release(job: dict[str, Any]) -> None:
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text()
    image = f"rbm-dist:{__version__}"
    assert {container["image"] for pod in pods(job) for container in pod["containers"]} == {image}
    assert f"--tag {image}" in dockerfile
    assert job["rayClusterSpec"]["rayVersion"] == pinned("ray")


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
