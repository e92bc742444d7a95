"""Clusters that are there, and that are not."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rbm_dist.config.run import ClusterConfig
from rbm_dist.errors import InputError
from rbm_dist.runtime.cluster import ray_cluster
from tests.patience import patient


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no such address"])
def test_an_address_without_a_cluster_is_one_message(address: str) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match="no Ray cluster answers at") as error, ray_cluster(ClusterConfig(), address):
        pytest.fail("connected to nothing")
    assert address in str(error.value)
    assert time.monotonic() - start < patient(90)


_HEAD = """
import ray, sys
head = ray.init(address="local", num_cpus=1, include_dashboard=False, object_store_memory=2**27, log_to_driver=False)
print(head.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


def test_a_cluster_that_wants_a_token_says_so_in_one_message(tmp_path: Path) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 48, "RAY_USAGE_STATS_ENABLED": "0"}
    head = subprocess.Popen(
        [sys.executable, "-c", _HEAD], env=os.environ | token, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert head.stdout is not None
        address = head.stdout.readline().strip()
        done = subprocess.run(
            [sys.executable, "-m", "rbm_dist", "source", "configs/quickstart.yaml", f"run_dir={tmp_path}/run"],
            env=os.environ | {"RAY_ADDRESS": address}, capture_output=True, text=True, timeout=patient(60), check=False,
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
    finally:
        head.communicate()
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the Ray cluster at {address} wants a token")
    assert len(done.stderr.splitlines()) == 1
