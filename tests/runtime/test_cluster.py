"""Clusters that are there, and that are not."""

import time

import pytest

from rbm_dist.config.run import ClusterConfig
from rbm_dist.errors import InputError
from rbm_dist.runtime.cluster import ray_cluster
from tests.patience import patient


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no such address"])
def test_an_address_without_a_cluster_is_one_message(address: str) -> None:
    start = time.monotonic()
    with pytest.raises(InputError, match="no Ray cluster answers at") as error, ray_cluster(ClusterConfig(), address):
        pytest.fail("connected to nothing")
    assert address in str(error.value)
    assert time.monotonic() - start < patient(90)
