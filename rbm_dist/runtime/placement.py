"""Who works where: the hosts of a run, which of them is a part's home, and who takes which part next.

Training ranks (`Mesh.parts`), shard servers and inference actors all go by `deal`, so that a host opens one range of
parts, whatever it does with them. Results do not depend on it: parts are the unit of randomness.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rbm_dist.cpus import usable_cpus
from rbm_dist.parallel.deal import deal

PREEMPTIBLE = "preemptible"
"""A custom resource of Ray nodes that may be taken away; so may those with the label `ray.io/market-type: spot`."""
_MARKET_TYPE = "ray.io/market-type"


def this_host() -> str:
    """The name of the host that this process is on: the id of its Ray node."""
    return ray.get_runtime_context().get_node_id()


@dataclass(frozen=True)
class Host:
    """A node of the cluster that takes work: one that is about to be taken away does not."""

    address: str
    total: dict[str, float]  # by resource: CPU, GPU
    free: dict[str, float]

    def fits(self, resources: dict[str, float]) -> int:
        """How many workers with these resources have room here now."""
        return int(min(self.free.get(name, 0.0) // amount for name, amount in resources.items() if amount))


def hosts() -> list[Host]:
    """Every node that takes work, and what is free there now."""
    free = available_resources_per_node()
    return [Host(node["NodeManagerAddress"], node["Resources"], free.get(node["NodeID"], {})) for node in _nodes()]


def leaving_hosts() -> set[str]:
    """Ids of the nodes that are about to be taken away: preempted, or scaled down."""
    return set(ray._private.state.state.get_draining_nodes())


def describe_room(resources: dict[str, float]) -> str:
    """For messages: what a worker wants, and what each host has."""
    wanted = " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
    there = "; ".join(
        f"{host.address}: "
        + ", ".join(f"{host.free.get(name, 0):g} of {host.total.get(name, 0):g} {name} free" for name in resources)
        for host in hosts()
    )
    return f"each wants {wanted}; there is {there or 'no host'}"


def working_hosts(use_gpu: bool = False) -> list[str]:
    """The hosts that can carry work, in a fixed order: those with CPUs; with GPUs, if they are used and there are any.

    A cluster's head is often told to have neither.
    """
    nodes = _nodes()
    for resource in ["GPU"] * use_gpu + ["CPU"]:
        found = [node["NodeID"] for node in nodes if node["Resources"].get(resource)]
        if found:
            return sorted(found)
    return sorted(node["NodeID"] for node in nodes)


def on(host: str) -> dict[str, Any]:
    """The options of an actor that is to be on this host, or elsewhere once it is gone."""
    # Ray puts an actor without any demand on a random host, whatever the strategy: so it demands one byte.
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(host, soft=True), "memory": 1}


def lasting_host() -> dict[str, Any]:
    """As `on` a host that nobody takes away: this one, if it lasts, else the head or another that does.

    For what many wait for. Where every host may be taken away, it is this one: what asks ends with it anyway.
    """
    here = this_host()
    lasting = [node for node in _nodes() if not _preemptible(node)]
    lasting.sort(key=lambda node: (node["NodeID"] != here, not _is_head(node), node["NodeID"]))
    return on(lasting[0]["NodeID"] if lasting else here)


def threads_per_worker(workers_here: int) -> int:
    """Threads of each of some workers that share this host, of which the caller is one.

    A share of the CPUs that may be used and that Ray has, but as many as Ray gave to the caller.
    """
    usable = usable_cpus()
    mine = next((node for node in _nodes() if node["NodeID"] == this_host()), None)
    of_ray = int(mine["Resources"].get("CPU", usable)) if mine else usable
    assigned = int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))
    return max(1, min(usable, max(assigned, min(usable, of_ray) // workers_here)))


class PartQueue:
    """Parts that wait for a worker. A host gets its own first; then those of the host that has most left."""

    def __init__(self, parts: Sequence[int], hosts: Sequence[str]):
        """hosts: those that parts are dealt to; others may take parts too."""
        dealt = deal(max(parts, default=-1) + 1, hosts)
        self._home = {part: host for host, own in zip(hosts, dealt, strict=True) for part in own}
        self._left = {host: deque[int]() for host in hosts}
        for part in parts:
            self._left[self._home[part]].append(part)

    def take(self, host: str) -> int | None:
        """The next part of a worker on this host; None if none is left."""
        own = self._left.get(host)
        if own:
            return own.popleft()
        most = max(self._left.values(), key=len)
        return most.pop() if most else None  # its last: the host itself works from the front

    def give_back(self, part: int) -> None:
        """A part whose worker was lost."""
        self._left[self._home[part]].appendleft(part)


def _nodes() -> list[dict[str, Any]]:
    leaving = leaving_hosts()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in leaving]


def _preemptible(node: dict[str, Any]) -> bool:
    return node.get("Labels", {}).get(_MARKET_TYPE) == "spot" or bool(node["Resources"].get(PREEMPTIBLE))


def _is_head(node: dict[str, Any]) -> bool:
    return "node:__internal_head__" in node["Resources"]
