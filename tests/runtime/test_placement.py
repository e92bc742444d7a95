"""Which host is whose, on a real Ray cluster of two hosts."""

import pytest
import ray
from ray.cluster_utils import Cluster

from rbm_dist.cpus import usable_cpus
from rbm_dist.runtime.placement import (
    PREEMPTIBLE,
    PartQueue,
    lasting_host,
    on,
    this_host,
    threads_per_worker,
    working_hosts,
)
from tests.patience import patient


def node_of(host: str) -> dict:
    return next(node for node in ray.nodes() if node["NodeID"] == host)


@ray.remote(num_cpus=0)
def lasting() -> tuple[str, str]:
    """Where the task is, and the host that it finds."""
    return this_host(), lasting_host().node_id


@pytest.fixture
def spot(cluster: Cluster) -> str:
    """The host that may be preempted."""
    (host,) = [node["NodeID"] for node in ray.nodes() if node["Labels"].get("ray.io/market-type") == "spot"]
    return host


def test_a_lasting_host_is_ones_own_or_the_head(spot: str) -> None:
    head = this_host()
    assert lasting_host().node_id == head != spot
    task = lasting.options(scheduling_strategy=on(spot))
    assert ray.get(task.remote(), timeout=patient(60)) == (spot, head)


@pytest.mark.slow
def test_hosts_come_and_go(cluster: Cluster, spot: str) -> None:
    before = working_hosts()
    assert before == sorted([this_host(), spot])
    assert working_hosts(use_gpu=True) == before, "there is no GPU"
    no_cpu = cluster.add_node(num_cpus=0, num_gpus=1, resources={PREEMPTIBLE: 1})
    try:
        assert working_hosts() == before
        assert working_hosts(use_gpu=True) == [no_cpu.node_id]
        task = lasting.options(scheduling_strategy=on(no_cpu.node_id))
        assert ray.get(task.remote(), timeout=patient(60)) == (no_cpu.node_id, this_host())
    finally:
        cluster.remove_node(no_cpu)
    assert working_hosts(use_gpu=True) == before


def test_workers_share_what_ray_has_of_the_host(cluster: Cluster) -> None:
    def threads(workers: int, cpus: int) -> int:
        task = ray.remote(num_cpus=cpus)(threads_per_worker).options(scheduling_strategy=on(this_host()))
        return ray.get(task.remote(workers), timeout=patient(60))

    available = min(usable_cpus(), 3)
    assert threads(1, cpus=1) == available
    assert threads(2, cpus=1) == max(1, available // 2)
    assert threads(100, cpus=1) == 1
    assert threads(100, cpus=2) == min(usable_cpus(), 2)


def test_own_parts_first_then_the_last_of_who_has_most() -> None:
    queue = PartQueue([0, 1, 2, 3, 4, 5, 6], ["a", "b", "c"])  # 0 1, 2 3, 4 5 6
    assert [queue.take("a"), queue.take("a"), queue.take("a")] == [0, 1, 6]
    assert queue.take("elsewhere") == 3
    queue.give_back(1)
    assert [queue.take("b"), queue.take("b"), queue.take("b"), queue.take("a")] == [2, 5, 1, 4]
    assert queue.take("a") is None
    assert PartQueue([], ["a"]).take("a") is None
