"""A Ray cluster for each file of this folder: two hosts, of which the second may be preempted."""

from collections.abc import Iterator

import pytest
from ray.cluster_utils import Cluster

from rbm_dist.config.run import ClusterConfig
from rbm_dist.runtime.cluster import ray_cluster


@pytest.fixture(scope="module")  # not to the end: Ray has one cluster per process, and other files start their own
def cluster() -> Iterator[Cluster]:
    hosts = Cluster(initialize_head=True, head_node_args={"num_cpus": 3, "include_dashboard": False})
    hosts.add_node(num_cpus=2, labels={"ray.io/market-type": "spot"})
    try:
        with ray_cluster(ClusterConfig(), hosts.address):
            yield hosts
    finally:
        hosts.shutdown()
