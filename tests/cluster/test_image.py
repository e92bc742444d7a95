"""The image of all nodes: what its file does, and what goes into the build."""

import re
import shutil
import subprocess

import pytest

from rbm_dist import __version__
from tests.cluster.manifests import KUBERAY, RAY_UP, ROOT, all_pods, cluster_of, read
from tests.patience import patient

DOCKERFILE = (ROOT / "cluster" / "Dockerfile").read_text()
STEPS = [line.split(maxsplit=1) for line in DOCKERFILE.replace("\\\n", " ").splitlines() if re.match(r"[A-Z]+ ", line)]


def test_it_is_sound() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run(
        ["hadolint", ROOT / "cluster" / "Dockerfile"], capture_output=True, text=True, timeout=patient(30), check=False
    )
    assert done.returncode == 0, done.stdout


def test_its_base_is_pinned_and_its_user_is_not_root() -> None:
    (base,) = (text for step, text in STEPS if step == "FROM")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+", base)
    user = [text for step, text in STEPS if step == "USER"][-1]
    assert int(user) == 1000, "a number, by which Kubernetes knows that it is not root"
    assert f"--uid {user} ray" in DOCKERFILE


def test_it_keeps_no_downloads_and_no_secrets() -> None:
    for step, text in STEPS:
        assert step != "ADD"
        if step == "RUN":
            assert ("apt-get install" in text) == ("rm -rf /var/lib/apt/lists/*" in text)
            assert text.count("pip install") == text.count("pip install --no-cache-dir")
            assert text.count("pip install") == text.count("--constraint constraints.txt")
        if step in ("ARG", "ENV"):
            assert not re.search(r"(?i)token|secret|password|key", text)


def test_the_build_gets_what_is_copied_and_nothing_else() -> None:
    copied = {source for step, text in STEPS if step == "COPY" for source in text.split()[:-1]}
    assert [source for source in copied if not (ROOT / source).exists()] == []
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == copied


def test_all_nodes_run_the_image_of_this_release() -> None:
    image = f"rbm-dist:{__version__}"
    assert f"--tag {image}" in DOCKERFILE
    constraints = (ROOT / "constraints.txt").read_text().splitlines()
    for manifest in map(read, KUBERAY):
        assert {container["image"] for pod in all_pods(manifest) for container in pod["containers"]} == {image}
        assert f"ray=={cluster_of(manifest)['rayVersion']}" in constraints
    for document in map(read, RAY_UP):
        assert document["docker"]["image"] == f"REGISTRY/{image}"
