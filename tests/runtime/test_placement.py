"""Which host is whose, on a real Ray cluster of two hosts."""

from typing import Any

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


class Anywhere:
    """An actor without a CPU."""

    def host(self) -> str:
        return this_host()

    def actors_that_last(self) -> list[str]:
        """Where such actors come to be that this one starts."""
        return hosts_of([lasting_host()] * 4)


def hosts_of(options: list[dict[str, Any]]) -> list[str]:
    actors = [ray.remote(num_cpus=0)(Anywhere).options(**each).remote() for each in options]
    return ray.get([actor.host.remote() for actor in actors], timeout=patient(120))


@pytest.fixture
def spot(cluster: Cluster) -> str:
    """The host that may be preempted."""
    (host,) = [node["NodeID"] for node in ray.nodes() if node["Labels"].get("ray.io/market-type") == "spot"]
    return host


def test_a_lasting_host_is_ones_own_or_the_head(spot: str) -> None:
    head = this_host()
    assert hosts_of([lasting_host(), on(spot), on(head), on(spot), on(head)]) == [head, spot, head, spot, head]
    there = ray.remote(num_cpus=0)(Anywhere).options(**on(spot)).remote()
    assert ray.get(there.actors_that_last.remote(), timeout=patient(120)) == [head] * 4


@pytest.mark.slow
def test_hosts_come_and_go(cluster: Cluster, spot: str) -> None:
    before = working_hosts()
    assert before == sorted([this_host(), spot])
    assert working_hosts(use_gpu=True) == before, "there is no GPU"
    no_cpu = cluster.add_node(num_cpus=0, num_gpus=1, resources={PREEMPTIBLE: 1})
    try:
        assert working_hosts() == before
        assert working_hosts(use_gpu=True) == [no_cpu.node_id]
        there = ray.remote(num_cpus=0)(Anywhere).options(**on(no_cpu.node_id)).remote()
        assert ray.get(there.host.remote(), timeout=patient(60)) == no_cpu.node_id
        assert ray.get(there.actors_that_last.remote(), timeout=patient(120)) == [this_host()] * 4
    finally:
        cluster.remove_node(no_cpu)
    assert working_hosts(use_gpu=True) == before


def test_workers_share_what_ray_has_of_the_host(cluster: Cluster) -> None:
    def threads(workers: int, cpus: int) -> int:
        task = ray.remote(num_cpus=cpus)(threads_per_worker).options(**on(this_host()))
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
