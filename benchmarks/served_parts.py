"""Rows of parts that another host holds, by shard servers, against the same parts mapped on this host; and how many of
them a cache of hot nodes spares, against a cache of the same size of nodes chosen at random.

    python -m benchmarks.served_parts [--quick] [--json FILE]

Client and servers share this machine and its cores, so there is no wire: what is seen is the cost of asking. Its floor
is the mapped gather plus one copy of the rows into Ray's shared memory and one out of it.
"""

import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle

import numpy as np

from benchmarks.report import Row, main, seconds
from benchmarks.sampling import FANOUT, SEEDS
from rbm_dist.config.run import ClusterConfig, Config
from rbm_dist.graph.presampling import fill_hot
from rbm_dist.graph.store import GraphStore
from rbm_dist.runtime.cluster import ray_cluster
from rbm_dist.runtime.shard_servers import ShardServers, shard_servers
from rbm_dist.stages.partition import write_graph
from rbm_dist.stages.source import below, over_here, stage_source

PARTS, SERVERS = 8, 2
HELD = range(0, PARTS, 2)  # half of the parts, where the cache is measured
BATCHES = 32
COPIES_SHARE = 0.08  # of the mapped rate that is to be reached where a question is large


def make(url: str, num_nodes: int) -> None:
    """A graph of power-law degrees and 100 features in shards."""
    source = {"kind": "synthetic", "num_nodes": num_nodes, "degree": 25, "power": 2.1}
    config = Config.model_validate(
        {"run_dir": url, "source": source, "partition": {"method": "streaming", "num_parts": PARTS}}
    )
    files = below(stage_source(config, f"{url}/source", over_here), "source")
    write_graph(config, f"{url}/source", files, f"{url}/graph", over_here)


def rates(url: str, servers: ShardServers, budget_s: float) -> list[Row]:
    def wall_s(call: Callable[[np.ndarray], object], batches: list[np.ndarray]) -> float:
        turns = cycle(batches)
        return seconds(lambda: call(next(turns)), budget_s, time.perf_counter)

    mapped, served = GraphStore.open(url), GraphStore.open(url, parts=[], remote=servers)
    rows = []
    for size in (100, 1_000, 10_000, 100_000):
        ids = [np.random.default_rng(i).integers(0, mapped.num_nodes, size) for i in range(8)]
        local_s, remote_s = (wall_s(partial(store.gather, "feat"), ids) for store in (mapped, served))
        name = f"{size:,} rows of {mapped.num_features} features"
        rows.append(Row(f"{name}: mapped", size / local_s / 1e3, "k rows/s", 1.0, 1.0))
        target = COPIES_SHARE if size >= 10_000 else 0.0
        rows.append(Row(f"{name}: by servers", size / remote_s / 1e3, "k rows/s", local_s / remote_s, target))
    seeds = [np.random.default_rng(i).choice(mapped.num_nodes, SEEDS, replace=False) for i in range(8)]
    local_s, remote_s = (wall_s(partial(store.sample, fanout=FANOUT, key=0), seeds) for store in (mapped, served))
    rows.append(Row("sampling by servers, 1,024 seeds", 1 / remote_s, "batches/s", local_s / remote_s, COPIES_SHARE))
    return rows


def hit_rates(url: str, servers: ShardServers) -> list[Row]:
    store = GraphStore.open(url, parts=HELD, remote=servers)
    own = np.concatenate([store.ids(part) for part in HELD])
    away = store.num_nodes - len(own)
    drawn = [(np.random.default_rng(i).choice(own, SEEDS, replace=False), i) for i in range(2 * BATCHES)]
    rows = []
    for share in (0.01, 0.05, 0.2, 0.5):
        fill_hot(store, "feat", int(share * away) * store.num_features * 4, drawn[:BATCHES], FANOUT)
        assert store.hot is not None
        for seeds, key in drawn[BATCHES:]:  # other seeds and other draws than those that chose
            nodes = store.sample(seeds, FANOUT, key).nodes
            store.hot.find(nodes[~np.isin(store.owner(nodes), HELD)])
        asked, hits = store.hot.take_counts()
        by_chance = len(store.hot) / away  # the hit rate of random nodes
        name = f"cache of {share:.0%} of the other hosts' rows: hits"
        rows.append(Row(name, 100 * hits / asked, "%", hits / asked / by_chance, 1.0))
    return rows


def measure(quick: bool) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        make(folder, 60_000 if quick else 1_000_000)
        cluster = ClusterConfig(shard_servers=SERVERS)
        with ray_cluster(cluster, None), shard_servers(cluster, f"{folder}/graph") as servers:
            assert servers is not None
            return rates(f"{folder}/graph", servers, 0.5 if quick else 3.0) + hit_rates(f"{folder}/graph", servers)


if __name__ == "__main__":
    main("Parts on other hosts", measure)
