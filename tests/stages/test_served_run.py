"""Stages on two hosts, each of which maps only some parts and asks the other for the rest."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ray.cluster_utils import Cluster

from rbm_dist.graph.store import GraphStore
from tests.patience import patient
from tests.stages.conftest import SHORT, rbm_dist


@pytest.fixture(scope="module")
def two_hosts() -> Iterator[str]:
    """The address of a cluster of two raylets, with a worker's room on each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    try:
        yield cluster.address
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_it_gives_what_a_run_gives_that_maps_everything(two_hosts: str, finished_run: Path, tmp_path: Path) -> None:
    # Three, so that wherever servers and ranks come to lie, some rank lacks a part. With two, a host may have its
    # rank's parts and the other rank's from its server: then nobody asks for anything.
    served = ["cluster.shard_servers=3", "cluster.cache_mb=1", f"cluster.collective_timeout_s={patient(120)}"]
    run = [
        "encodings",
        "configs/quickstart.yaml",
        f"run_dir={tmp_path / 'run'}",
        *SHORT,
        *served,
        "--address",
        two_hosts,
    ]
    done = rbm_dist(*run)
    assert done.returncode == 0, done.stdout + done.stderr
    found, expected = (GraphStore.open(f"{each}/graph") for each in (tmp_path / "run", finished_run))
    for name in ("soft", "pos", "prop"):
        for part in range(expected.num_parts):
            np.testing.assert_array_equal(found.array(name, part), expected.array(name, part), err_msg=name)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rates = [row["cache_hit_rate"] for row in rows if row["loop"] == "teacher"]
    assert len(rates) == 6
    assert all(rate > 0.8 for rate in rates), "all of the digits fit a megabyte"
