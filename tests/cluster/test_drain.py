"""What a pod does before it ends, on a real Ray node at work: the cluster hears of it, and so does a run on it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.manifests import ROOT, pods_of, read
from tests.patience import patient

_NODE = f"""
import ray, sys, time
node = ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=2**27, log_to_driver=False)
@ray.remote
class Work:
    def go_on(self):
        time.sleep({patient(100)})
work = Work.remote()
work.go_on.remote()
print(node.address_info["gcs_address"], flush=True)
while not ray._private.state.state.get_draining_nodes():
    time.sleep(0.1)
(deadline,) = ray._private.state.state.get_draining_nodes().values()
print(deadline / 1000 - time.time(), flush=True)
sys.stdin.read()
"""


@pytest.mark.timeout(patient(90))
def test_a_pod_that_ends_says_so_to_ray() -> None:
    _, worker = pods_of(read(ROOT / "cluster" / "kuberay" / "rayjob.yaml")["spec"]["rayClusterSpec"])
    shell, option, script = worker["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    tell, sleep = script.split(" && ")
    seconds = int(sleep.removeprefix("sleep "))
    environment = os.environ | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 48, "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    node = subprocess.Popen(
        [sys.executable, "-c", _NODE], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert node.stdout is not None
        address = node.stdout.readline().strip()
        # KubeRay sets the address, and the token, in the pods.
        told = subprocess.run(
            [shell, option, tell], env=environment | {"RAY_ADDRESS": address}, capture_output=True, text=True,
            timeout=patient(60), check=False,
        )  # fmt: skip
        assert told.returncode == 0, told.stderr
        assert 0 < float(node.stdout.readline()) <= seconds
    finally:
        node.communicate()
