"""A look at every host of a cluster before a run: one small actor on each, and measurements between all pairs.

A host that does not answer in time is named, and what the others say is still told.
"""

import socket
import time
import uuid
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rbm_dist import storage
from rbm_dist.config.run import ClusterConfig
from rbm_dist.runtime.cluster import ray_cluster
from rbm_dist.runtime.host_facts import Facts, Receiver, host_facts, send, storage_facts

_ANSWER_S = 60.0  # longest wait for hosts to answer one question
_CLOCK_TRIES = 5


class _Examined:
    """On a host; nothing in its start can fail, so that what does is told by host."""

    def __init__(self, ip: str):
        self._ip = ip

    def facts(self, session_dir: str) -> Facts:
        return host_facts(session_dir)

    def now(self) -> float:
        return time.time()

    def storage(self, run_dir: str, marker: str) -> Facts:
        return storage_facts(run_dir, marker)

    def listen(self) -> int:
        self._receiver = Receiver(self._ip)
        return self._receiver.port

    def send(self, ip: str, port: int) -> float | str:
        return send(ip, port, self._ip)


def examine(address: str | None, run_dir: str | None) -> dict[str, Any]:
    """Facts by host, of this machine alone or of the cluster at `address`, and of the machine that asks under `here`.

    Of each host of a cluster also `ray` resources, `clock_s` (its clock less ours) and `rates` to the others by name;
    of one that does not answer, `silent`: why. Raises `InputError` if the cluster or the run directory cannot be used.
    """
    here = host_facts()
    if run_dir is not None:
        run_dir = storage.absolute(run_dir)
        storage.filesystem(run_dir)
    if address is None:
        if run_dir is not None:
            here["storage"] = storage_facts(run_dir)
        return {"here": here, "hosts": {socket.gethostname(): here}}
    with ray_cluster(ClusterConfig(), address):
        return {"here": here, "hosts": _examine_cluster(run_dir)}


def _examine_cluster(run_dir: str | None) -> dict[str, Facts]:
    nodes = {_name(node): node for node in ray.nodes() if node["Alive"]}
    actors = {name: _actor(node) for name, node in nodes.items()}
    sessions = {name: node["RayletSocketName"].rsplit("/sockets/", 1)[0] for name, node in nodes.items()}
    hosts = _ask({name: actor.facts.remote(sessions[name]) for name, actor in actors.items()}, "silent")
    well = [name for name, facts in hosts.items() if "silent" not in facts]
    for name in well:
        hosts[name]["resources"] = nodes[name]["Resources"]
        hosts[name]["clock_s"] = _clock_s(actors[name])
    for name, rates in _rates({name: (actors[name], nodes[name]["NodeManagerAddress"]) for name in well}).items():
        hosts[name]["rates"] = rates
    if run_dir is not None:
        marker = storage.join(run_dir, f"doctor-{uuid.uuid4().hex[:8]}.json")
        with suppress(Exception):  # the hosts say what is wrong with it
            storage.write_json(marker, {})
        found = _ask({name: actors[name].storage.remote(run_dir, marker) for name in well}, "error")
        for name in well:
            hosts[name]["storage"] = found[name]
        with suppress(Exception):
            storage.remove(marker)
    return hosts


def _name(node: dict[str, Any]) -> str:
    """Of a host for people; several Ray nodes may be on one."""
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']}, {node['NodeID'][:6]})"


def _actor(node: dict[str, Any]) -> Any:
    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(num_cpus=0)(_Examined).options(scheduling_strategy=there).remote(node["NodeManagerAddress"])


def _ask(calls: dict[str, Any], wrong: str) -> dict[str, Any]:
    """The answers by host, all asked at once; instead of one that fails or is late, `{wrong: why}`."""
    deadline, answers = time.monotonic() + _ANSWER_S, {}
    for name, call in calls.items():
        try:
            answers[name] = ray.get(call, timeout=max(0.0, deadline - time.monotonic()))
        except GetTimeoutError:
            answers[name] = {wrong: f"no answer for {_ANSWER_S:g} s"}
        except RayError as error:
            answers[name] = {wrong: (str(error).strip().splitlines() or [type(error).__name__])[-1]}
    return answers


def _clock_s(actor: Any) -> float | None:
    """How far a host's clock is ahead of ours, as told by its fastest answer, which is taken to be on its way half."""
    best: tuple[float, float] | None = None
    for _ in range(_CLOCK_TRIES):
        before = time.time()
        try:
            there = ray.get(actor.now.remote(), timeout=_ANSWER_S)
        except (RayError, GetTimeoutError):
            return None
        after = time.time()
        best = min(best or (after - before, 0.0), (after - before, there - (before + after) / 2))
    return best[1] if best else None


def _rates(actors: dict[str, tuple[Any, str]]) -> dict[str, dict[str, float | str]]:
    """Bytes per second from every host to every other, or what went wrong; at a time each sends to one."""
    ports = _ask({name: actor.listen.remote() for name, (actor, _) in actors.items()}, "wrong")
    names = list(actors)
    rates: dict[str, dict[str, float | str]] = {name: {} for name in names}
    for shift in range(1, len(names)):
        pairs = {name: names[(index + shift) % len(names)] for index, name in enumerate(names)}
        calls = {}
        for name, other in pairs.items():
            if isinstance(ports[other], dict):
                rates[name][other] = f"it cannot listen: {ports[other]['wrong']}"
            else:
                calls[name] = actors[name][0].send.remote(actors[other][1], ports[other])
        for name, rate in _ask(calls, "wrong").items():
            rates[name][pairs[name]] = rate["wrong"] if isinstance(rate, dict) else rate
    return rates
