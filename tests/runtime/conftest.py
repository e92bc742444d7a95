"""One local Ray cluster for the tests of this folder."""

from collections.abc import Iterator

import pytest

from rbm_dist.config.run import ClusterConfig
from rbm_dist.runtime.cluster import ray_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    with ray_cluster(ClusterConfig(), None):
        yield
