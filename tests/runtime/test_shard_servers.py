"""Shard servers on a real Ray cluster: right answers, a lost server, one that does not answer, damaged parts."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from rbm_dist.config.run import ClusterConfig
from rbm_dist.errors import InputError, RunError
from rbm_dist.graph.store import GraphStore
from rbm_dist.parallel.deal import deal
from rbm_dist.runtime.placement import this_host, working_hosts
from rbm_dist.runtime.shard_servers import ShardServers, open_graph, shard_servers
from tests.patience import patient
from tests.small_graph import small_graph, small_store, with_sparse_features, write_graph

PARTS, SERVERS = 5, 2


def elsewhere(servers: ShardServers) -> GraphStore:
    """The graph as a host sees it that holds no part."""
    return GraphStore.open(servers.open("numba").url, parts=[], remote=servers)


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A small graph with soft labels."""
    return small_store(str(tmp_path), PARTS).url


@pytest.fixture
def servers(cluster: None, url: str) -> Iterator[ShardServers]:
    """Two servers of five parts."""
    with shard_servers(
        ClusterConfig(shard_servers=SERVERS, collective_timeout_s=patient(300), start_timeout_s=patient(300)), url
    ) as started:
        assert started is not None
        yield started


def pids(servers: ShardServers) -> list[int]:
    return ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in servers.actors], timeout=patient(30))


def test_rows_and_samples_are_those_of_the_mapped_graph(servers: ShardServers, url: str) -> None:
    whole, store = GraphStore.open(url), elsewhere(servers)
    ids = np.random.default_rng(0).integers(0, whole.num_nodes, 20_000)  # more than are asked for at a time
    for name in ("feat", "label", "soft"):
        np.testing.assert_array_equal(store.gather(name, ids), whole.gather(name, ids))
    seeds = np.arange(0, 240, 3)
    expected, found = (each.sample(seeds, (5, -1, 2), key=2**64 - 1) for each in (whole, store))
    np.testing.assert_array_equal(found.nodes, expected.nodes)
    np.testing.assert_array_equal(found.src, expected.src)


def test_each_host_has_a_server_of_its_own_parts(servers: ShardServers) -> None:
    hosts = working_hosts()
    assert ray.get([actor.host.remote() for actor in servers.actors]) == hosts
    near = deal(PARTS, hosts)[hosts.index(this_host())]
    assert servers.open("numba").held_parts == near
    assert len(near) in (2, 3)


def test_sparse_rows(cluster: None, tmp_path: Path) -> None:
    graph = with_sparse_features(small_graph())
    url = write_graph(str(tmp_path), graph, np.arange(graph.csc.num_nodes) % 3).url
    with shard_servers(
        ClusterConfig(shard_servers=9, collective_timeout_s=patient(300), start_timeout_s=patient(300)), url
    ) as servers:  # more than parts
        assert servers is not None
        ids = np.random.default_rng(0).integers(0, 240, 500)
        np.testing.assert_array_equal(elsewhere(servers).gather("feat", ids), GraphStore.open(url).gather("feat", ids))


def test_without_servers_everything_is_mapped(url: str) -> None:
    with shard_servers(ClusterConfig(), url) as servers:
        assert servers is None
        assert open_graph(url, servers=servers).held_parts == list(range(PARTS))


def test_a_lost_server_starts_again_with_its_parts(servers: ShardServers, url: str) -> None:
    store, whole, ids = elsewhere(servers), GraphStore.open(url), np.arange(240)
    before = pids(servers)
    os.kill(before[0], signal.SIGKILL)
    np.testing.assert_array_equal(store.gather("feat", ids), whole.gather("feat", ids))
    os.kill(pids(servers)[1], signal.SIGKILL)
    np.testing.assert_array_equal(store.sample(ids[:9], (3, 3), key=4).nodes, whole.sample(ids[:9], (3, 3), 4).nodes)
    assert not set(before) & set(pids(servers))
    np.testing.assert_array_equal(store.gather("soft", ids), whole.gather("soft", ids))


def test_a_server_that_does_not_answer_is_an_error_that_names_its_parts(servers: ShardServers) -> None:
    store = elsewhere(servers)
    store.gather("label", store.ids(1))
    servers.timeout_s = 4.0
    stopped = pids(servers)[1]
    os.kill(stopped, signal.SIGSTOP)
    start = time.monotonic()
    try:
        with pytest.raises(RunError, match="part 3: no answer from shard server 1 for 4 s"):
            store.gather("feat", store.ids(3))
        with pytest.raises(RunError, match="parts 2, 3: no answer"):
            store.sample(np.array([store.ids(2)[0], store.ids(3)[0]]), (2,), key=0)
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert time.monotonic() - start < patient(60)


def test_a_damaged_part_is_named(servers: ShardServers, url: str) -> None:
    file = Path(url) / "part-00002" / "soft.npy"
    file.write_bytes(file.read_bytes()[:-5])
    store = elsewhere(servers)
    with pytest.raises(InputError, match=r"part-00002/soft\.npy: not a whole \.npy array"):
        store.gather("soft", store.ids(2))
    store.gather("label", store.ids(2))
