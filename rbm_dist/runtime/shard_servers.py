"""Shard servers: Ray actors that read some parts each and answer workers on other hosts.

Worth it where parts lie on object storage and no host's disk holds them all: each server's host fetches its own parts
only. A server keeps no state of its own: one that is lost starts again elsewhere and opens its parts from storage.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from threading import Lock
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError

from rbm_dist.config.run import ClusterConfig
from rbm_dist.errors import RunError
from rbm_dist.graph.csc import id_dtype
from rbm_dist.graph.store import GraphStore, StoredRows
from rbm_dist.parallel.deal import deal
from rbm_dist.runtime.failures import explain
from rbm_dist.runtime.liveness import LifeSigns
from rbm_dist.runtime.placement import on, this_host, working_hosts
from rbm_dist.runtime.worker_logs import forward_warnings

_NODES = 8192  # asked for at a time: bounds an answer, which travels through Ray's object store
_IN_FLIGHT = 4  # questions per server
_THREADS = 4  # of a server: one waits for its disk while others compute


class ShardServers:
    """The servers of a graph's parts, as a worker sees them (`RemoteParts`); can be sent to other processes.

    Waits raise `RunError`, which names the parts, after `timeout_s`.
    """

    def __init__(
        self, url: str, offsets: np.ndarray, actors: list[Any], parts: list[list[int]], hosts: list[str],
        timeout_s: float,
    ):  # fmt: skip
        self._url, self._offsets, self.actors, self._parts, self._hosts = url, offsets, actors, parts, hosts
        self.timeout_s = timeout_s
        self._server_of = np.empty(len(offsets) - 1, np.int64)
        for server, owned in enumerate(parts):
            self._server_of[owned] = server

    def open(self, sampler: str) -> GraphStore:
        """Open the graph here: what this host's servers have is mapped, the rest is asked for."""
        host = this_host()
        near = [part for parts, at in zip(self._parts, self._hosts, strict=True) if at == host for part in parts]
        return GraphStore.open(self._url, sampler, parts=near, remote=self)

    def gather(self, name: str, ids: np.ndarray) -> Iterator[tuple[np.ndarray, StoredRows]]:
        return self._ask("gather", ids, name)

    def in_edges(self, ids: np.ndarray, width: int, key: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        return ((at, counts, sources) for at, (counts, sources) in self._ask("in_edges", ids, width, key))

    def _ask(self, method: str, ids: np.ndarray, *arguments: Any) -> Iterator[tuple[np.ndarray, Any]]:
        """Ask each owner for its nodes, all owners at once; gives positions in `ids` and the answer for them."""
        server_n = self._server_of[np.searchsorted(self._offsets, ids, side="right") - 1]
        pieces = [
            (first, int(server), at[first : first + _NODES])
            for server in np.unique(server_n)
            for at in [np.flatnonzero(server_n == server)]
            for first in range(0, len(at), _NODES)
        ]
        pieces.sort(key=lambda piece: piece[:2])  # so that no owner waits for another
        waiting = iter(pieces)
        asked: deque[tuple[int, np.ndarray, Any]] = deque()

        def ask(count: int) -> None:
            for _, server, at in islice(waiting, count):
                call = getattr(self.actors[server], method)
                asked.append((server, at, call.remote(ids[at], *arguments)))

        def answers() -> Iterator[tuple[np.ndarray, Any]]:
            while asked:
                server, at, ref = asked.popleft()
                answer = self._wait(ref, server, ids[at])
                ask(1)
                yield at, answer

        ask(_IN_FLIGHT * len({server for _, server, _ in pieces}))
        return answers()

    def _wait(self, ref: Any, server: int, ids: np.ndarray) -> Any:
        try:
            return ray.get(ref, timeout=self.timeout_s)
        except GetTimeoutError:
            raise RunError(
                f"{self._url}: {self._named(ids)}: no answer from shard server {server} for {self.timeout_s:g} s"
            ) from None
        except RayError as error:
            raise explain(error, f"{self._url}: {self._named(ids)}, shard server {server}") from None

    def _named(self, ids: np.ndarray) -> str:
        parts = np.unique(np.searchsorted(self._offsets, ids, side="right") - 1)
        return f"part{'s' * (len(parts) > 1)} {', '.join(map(str, parts))}"


@contextmanager
def shard_servers(config: ClusterConfig, url: str) -> Iterator[ShardServers | None]:
    """Servers of the graph at `url` for the length of the block, in turn on all hosts; None if not wanted."""
    if not config.shard_servers:
        yield None
        return
    offsets = GraphStore.open(url).offsets
    num_parts = len(offsets) - 1
    count = min(config.shard_servers, num_parts)
    places = sorted(islice(cycle(working_hosts(config.use_gpu)), count))
    parts = deal(num_parts, places)
    # No CPU of its own: Ray Train would wait for ever for CPUs that servers hold.
    server_class = ray.remote(
        num_cpus=0, max_restarts=-1, max_task_retries=-1, max_concurrency=_THREADS
    )(_ShardServer)  # fmt: skip
    actors = [server_class.options(**on(host)).remote(url, owned) for host, owned in zip(places, parts, strict=True)]
    try:
        try:
            hosts = ray.get([actor.host.remote() for actor in actors], timeout=config.start_timeout_s)
        except GetTimeoutError:
            raise RunError(
                f"{url}: not all of {count} shard servers started within {config.start_timeout_s:g} s"
            ) from None
        yield ShardServers(url, offsets, actors, parts, hosts, config.collective_timeout_s)
    finally:
        for actor in actors:
            ray.kill(actor)


def open_graph(url: str, sampler: str = "numba", servers: ShardServers | None = None) -> GraphStore:
    """Open a graph in a worker: all of it, or with what servers elsewhere hold asked for there."""
    return GraphStore.open(url, sampler) if servers is None else servers.open(sampler)


class _ShardServer:
    def __init__(self, url: str, parts: list[int]):
        forward_warnings(f"shard server of part {parts[0]}{' and others' * (len(parts) > 1)}")
        LifeSigns(f"shard server of part {parts[0]}").start()
        self._url, self._parts = url, parts
        self._opened: GraphStore | None = None
        self._opening = Lock()

    def host(self) -> str:
        return this_host()

    def gather(self, ids: np.ndarray, name: str) -> StoredRows:
        rows = self._store().stored_rows(name, ids)
        return np.asarray(rows) if isinstance(rows, np.ndarray) else rows  # not a memmap, which is pickled otherwise

    def in_edges(self, ids: np.ndarray, width: int, key: int) -> tuple[np.ndarray, np.ndarray]:
        store = self._store()
        counts, sources = store.in_edges(ids, width, key)
        return counts.astype(np.int32), sources.astype(id_dtype(store.num_nodes))

    def _store(self) -> GraphStore:
        # Not opened in __init__, where an InputError would arrive wrapped in the actor's death.
        with self._opening:
            self._opened = self._opened or GraphStore.open(self._url, parts=self._parts)
        return self._opened
