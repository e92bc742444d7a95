"""A bed: hosts that differ, an object storage that they share, and Ray on them as on real hosts."""

import contextlib
import os
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.hosts import Host, Switch, wait_for

# By default Ray closes a connection of which 20 s nothing is heard, and takes 65 s to give up a host that is gone.
_RAY_PATIENCE = {"RAY_grpc_keepalive_timeout_ms": "45000", "RAY_health_check_timeout_ms": "5000"}


class Bed:
    """A switch, an object storage on a host of its own (`store`, with the bucket `bucket`), and hosts by name.

    The first of `names` is the head of their Ray cluster, see `start_ray`.
    """

    def __init__(self, folder: Path, names: list[str], scratch_mb: int = 256):
        self.switch = Switch()
        self.shared = folder / "shared"
        self.shared.mkdir()
        self.hosts: dict[str, Host] = {}
        self.storage_url = "http://10.77.0.2:5000"
        self._environment = {
            "AWS_ENDPOINT_URL": self.storage_url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            **_RAY_PATIENCE,
            "RBM_DIST_TEST_PATIENCE": os.environ.get("RBM_DIST_TEST_PATIENCE", "5"),
        }
        self.folder, self._scratch_mb = folder, scratch_mb
        try:
            for name in ("store", *names):
                self.add(name)
            self.store, self.head = self.hosts["store"], self.hosts[names[0]]
            self.store.popen("python", "-m", "moto.server", "-p", "5001", stderr=subprocess.DEVNULL)
            self.start_relay()
            self._s3: Any = None
            wait_for(self._make_bucket, "object storage")
        except BaseException:
            self.close()
            raise

    def add(self, name: str) -> Host:
        """One more host."""
        host = Host(
            self.switch, len(self.hosts) + 2, name, self.folder / name, self.shared, self._environment,
            self._scratch_mb,
        )  # fmt: skip
        self.hosts[name] = host
        return host

    def start_ray(self, *hosts: Host, num_cpus: int = 2) -> None:
        """Start Ray as on real hosts, the head's first where it is among them; returns when all are in the cluster."""
        common = ["--num-cpus", str(num_cpus), "--object-store-memory", "100000000", "--disable-usage-stats"]
        if self.head in hosts:
            self.head.run("ray", "start", "--head", "--node-ip-address", self.head.address, "--dashboard-host=0.0.0.0",
                          "--include-dashboard=true", *common)  # fmt: skip
        others = [host for host in hosts if host is not self.head]
        with ThreadPoolExecutor(max(1, len(others))) as threads:
            list(threads.map(lambda host: host.run("ray", "start", "--address", f"{self.head.address}:6379",
                                                   "--node-ip-address", host.address, *common), others))  # fmt: skip

    def start_relay(self) -> None:
        """Let all hosts reach the object storage; its server, whose memory holds all, is only for its own host."""
        self.store.popen("python", "-m", "tests.cluster.relay", "5000", "5001")

        def listens() -> bool:
            with contextlib.suppress(OSError), socket.create_connection((self.store.address, 5000), 1):
                return True
            return False

        wait_for(lambda: self.switch.call(listens), "the relay")

    def mend(self) -> None:
        """Power, links and Ray as they were; what is whole is left alone."""
        hosts = [host for host in self.hosts.values() if host is not self.store]
        if not self.head.is_up() or not self.head.processes("gcs_server"):
            broken = hosts  # Ray does not outlive its head
        else:
            broken = [host for host in hosts if not host.is_up() or not host.processes("raylet/raylet ")]
        for host in self.hosts.values():
            if host in broken:
                host.kill()
                host.start()
            host.restore()
        self.start_ray(*broken)

    def keys(self, prefix: str = "") -> list[str]:
        """The keys in the bucket."""
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket="bucket", Prefix=prefix)
        return self.switch.call(lambda: [each["Key"] for page in pages for each in page.get("Contents", [])])

    def read(self, key: str) -> bytes:
        return self.switch.call(lambda: self._s3.get_object(Bucket="bucket", Key=key)["Body"].read())

    def write(self, key: str, content: bytes) -> None:
        self.switch.call(lambda: self._s3.put_object(Bucket="bucket", Key=key, Body=content))

    def _make_bucket(self) -> bool:
        boto3 = pytest.importorskip("boto3", reason="moto is not installed")
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        settings = Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1})
        self._s3 = self._s3 or boto3.client(
            "s3", endpoint_url=self.storage_url, aws_access_key_id="testing", aws_secret_access_key="testing",
            region_name="us-east-1", config=settings,
        )  # fmt: skip
        try:
            self.switch.call(lambda: self._s3.create_bucket(Bucket="bucket"))
        except BotoCoreError:
            return False
        return True

    def close(self) -> None:
        """End all hosts; what is on their disks stays."""
        for host in self.hosts.values():
            host.kill()
        self.switch.close()
