"""Hot nodes: who is kept, against a count by hand; what is kept is right, and is not asked for again."""

from collections import Counter

import numpy as np
import pytest

from rbm_dist.graph.hot_rows import HotRows
from rbm_dist.graph.presampling import fill_hot
from rbm_dist.graph.store import GraphStore
from tests.graph.other_host import OtherHost
from tests.small_graph import small_store

FANOUT = (4, 3)
ROW = 12 * 4  # bytes


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A graph of 240 nodes in four parts."""
    return small_store(str(tmp_path_factory.mktemp("graph"))).url


def batches(store: GraphStore) -> list[tuple[np.ndarray, int]]:
    ids = np.random.default_rng(0).permutation(store.ids(3))
    return [(ids[first : first + 8], key) for key, first in enumerate(range(0, len(ids), 8))]


@pytest.mark.parametrize("rows", [0, 1, 10, 37, 1000])
def test_the_most_sampled_nodes_of_other_hosts_are_kept(url: str, rows: int) -> None:
    store = GraphStore.open(url, parts=[3], remote=OtherHost(url))
    fill_hot(store, "feat", rows * ROW + ROW - 1, batches(store), FANOUT)
    assert store.hot is not None
    whole = GraphStore.open(url)
    times = Counter(
        int(node) for seeds, key in batches(store) for node in whole.sample(seeds, FANOUT, key).nodes
        if whole.owner(node) != 3
    )  # fmt: skip
    ids = np.array([node for node in range(240) if store.hot.find(np.array([node]))[0][0]])
    assert len(ids) == len(store.hot) == min(rows, len(times))
    kept, left = [times[node] for node in ids], [times[node] for node in times if node not in ids]
    assert min(kept, default=np.inf) >= max(left, default=0), "a node is kept that is needed less than one that is not"
    assert min(kept, default=np.inf) >= 1


def test_kept_rows_are_right_counted_and_not_asked_for_again(url: str) -> None:
    other = OtherHost(url)
    store, whole = GraphStore.open(url, parts=[0], remote=other), GraphStore.open(url)
    kept = np.arange(60, 180, 2)
    store.hot = HotRows("feat", kept, whole.gather("feat", kept))
    ids = np.random.default_rng(1).integers(0, 240, 300)
    np.testing.assert_array_equal(store.gather("feat", ids), whole.gather("feat", ids))
    away = ids[whole.owner(ids) != 0]
    asked = np.concatenate(other.asked)
    np.testing.assert_array_equal(np.sort(asked), np.sort(away[~np.isin(away, kept)]))
    assert store.hot.take_counts() == (len(away), np.isin(away, kept).sum())
    assert store.hot.take_counts() == (0, 0)
    store.gather("label", ids)
    assert store.hot.take_counts() == (0, 0), "another array's rows were looked up"
