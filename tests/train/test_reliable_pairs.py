"""KRD: who teaches whom and how often, and what each node weighs."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rbm_dist.config.run import KrdConfig
from rbm_dist.distill.krd import Reliability, krd_loss
from rbm_dist.graph.splits import UNSEEN
from rbm_dist.graph.store import GraphStore
from rbm_dist.randomness.bits import key
from rbm_dist.sources.source import hide_unseen
from rbm_dist.train.reliable_pairs import ReliablePairs
from tests.small_graph import small_graph, small_store, write_graph


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    """The small graph; its nodes' entropy changes go up to 0.5."""
    return with_change(small_store(str(tmp_path_factory.mktemp("krd"))), 0.5)


def with_change(store: GraphStore, highest: float) -> GraphStore:
    change = np.random.default_rng(7).random(store.num_nodes).astype(np.float32)
    change *= highest / change.max()
    publish(store, "entropy_change", change)
    return store


def neighbours(store: GraphStore, node: int) -> list[int]:
    return store.sample(np.array([node]), (-1,), 0).nodes[1:].tolist()


def links(store: GraphStore, ids: list[int], which: str) -> list[tuple[int, int]]:
    """(i, j) for all j that can teach i, one by one."""
    kind = store.gather("soft", np.arange(store.num_nodes)).argmax(1)
    return [(i, j) for i in ids for j in neighbours(store, i) if which == "all" or kind[i] == kind[j]]


def publish(store: GraphStore, name: str, rows: np.ndarray) -> None:
    rows = rows.astype(np.float32)
    parts = range(store.num_parts)
    files = [store.write_part(name, p, rows.dtype, rows.shape[1:], [rows[store.ids(p)]]) for p in parts]
    store.publish(name, files)


def published(logits: Tensor, soft: Tensor, teacher: Tensor, row: Tensor, pairs: int, temperature: float) -> Tensor:
    """A mean over pairs, without weights."""
    log_p, log_q = (each.log_softmax(1) for each in (soft.log() / temperature, logits / temperature))
    p = log_p.exp()
    information = (p * log_p).sum(1)[teacher].sum()
    taught = torch.zeros_like(log_q).index_add_(0, row, p[teacher])
    return (information - (taught * log_q).sum()) * (temperature**2 / pairs)


def pairs_of(store: GraphStore, settings: KrdConfig, power: float | None = None) -> ReliablePairs:
    return ReliablePairs(settings, store, Reliability(settings, power))


def drawn(pairs: ReliablePairs, ids: np.ndarray, draw: int) -> set[tuple[int, int]]:
    """(i, j) by node id."""
    links = pairs.links(ids, draw)
    found = list(zip(ids[links.row_m].tolist(), links.nodes[links.teacher_m].tolist(), strict=True))
    assert len(set(found)) == len(found), "a pair counts once"
    return set(found)


def test_change_is_scaled_to_one(store: GraphStore) -> None:
    sampling, ids = pairs_of(store, KrdConfig()), np.arange(store.num_nodes)
    assert sampling.change(ids).max() == 1
    np.testing.assert_allclose(sampling.change(ids), store.gather("entropy_change", ids) / 0.5, rtol=1e-6)


@pytest.mark.parametrize("method", ["change", "pairs", "bins"])
def test_how_far_an_unseen_node_changes_changes_nothing(tmp_path: Path, method: str) -> None:
    graph = hide_unseen(small_graph(), 0.3, 1)
    store = write_graph(str(tmp_path), graph, np.arange(graph.csc.num_nodes, dtype=np.int32) % 3)
    split = np.concatenate([store.array("split", part) for part in range(3)])
    seen, unseen = np.flatnonzero(split != UNSEEN), np.flatnonzero(split == UNSEEN)
    assert len(unseen) > 20
    change = np.random.default_rng(2).random(store.num_nodes)
    publish(store, "soft", np.random.default_rng(3).random((store.num_nodes, 2)))
    found = []
    for highest in (0.1, 5.0):
        change[unseen[3]] = highest
        parts = range(store.num_parts)
        rows = change.astype(np.float32)
        store.publish(
            "entropy_change",
            [store.write_part("entropy_change", p, rows.dtype, (), [rows[store.ids(p)]]) for p in parts],
        )
        sampling = pairs_of(GraphStore.open(f"{tmp_path}/graph"), KrdConfig(), 0.7)
        if method == "change":
            found.append(sampling.change(seen))
        elif method == "pairs":
            found.append(sorted(drawn(sampling, seen, 5)))
        else:
            found.append(sampling.draw(seen, 5, torch.float32).bin_B.numpy())
    np.testing.assert_array_equal(*found)
    if method == "change":
        assert found[0].max() == 1


@pytest.mark.parametrize(
    ("which", "power", "least"), [("all", 0.4, 1000), ("all", 1.0, 1000), ("all", 3.0, 1000), ("agreeing", 1.0, 300)]
)
def test_a_neighbour_teaches_as_often_as_it_is_reliable(
    store: GraphStore, which: str, power: float, least: int
) -> None:
    settings = KrdConfig.model_validate({"neighbours": which})
    sampling, ids, draws = pairs_of(store, settings, power), np.arange(store.num_nodes), 300
    counts: dict[tuple[int, int], int] = {}
    for number in range(draws):
        for pair in drawn(sampling, ids, key(number)):
            counts[pair] = counts.get(pair, 0) + 1
    possible = links(store, ids.tolist(), which)
    assert set(counts) <= {*possible, *((i, i) for i in ids.tolist())}
    assert all(counts[i, i] == draws for i in ids.tolist()), "a node always teaches itself"
    probability = 1 - sampling.change(np.array([j for _, j in possible])) ** power
    kept = np.array([counts.get(link, 0) for link in possible])
    sure = (probability > 0.03) & (probability < 0.97)
    deviation = (kept - draws * probability)[sure] / np.sqrt(draws * probability * (1 - probability))[sure]
    assert sure.sum() > least
    assert np.var(deviation) == pytest.approx(1, abs=5 * (2 / sure.sum()) ** 0.5)
    assert np.mean(deviation) == pytest.approx(0, abs=5 / sure.sum() ** 0.5)
    assert not kept[probability == 0].any()


@pytest.mark.parametrize("which", ["agreeing", "all"])
@pytest.mark.parametrize("fanout", [-1, 3])
def test_draws_do_not_depend_on_who_shares_the_batch(store: GraphStore, fanout: int, which: str) -> None:
    sampling = pairs_of(store, KrdConfig.model_validate({"fanout": fanout, "neighbours": which}))
    batch = np.random.default_rng(0).permutation(store.num_nodes)[:50]
    together = drawn(sampling, batch, 99)
    apart = [drawn(sampling, rows, 99) for rows in np.split(batch, [1, 20])]
    assert together == set(itertools.chain(*apart))
    assert together != drawn(sampling, batch, 100)
    np.testing.assert_array_equal(sampling.links(batch, 99).nodes[:50], batch)
    none = sampling.draw(batch[:0], 99, torch.float32)
    assert len(none.soft_nC) == len(none.row_m) == len(none.teacher_m) == len(none.bin_B) == 0


@pytest.mark.parametrize("which", ["agreeing", "all"])
def test_teachers_that_never_change_all_teach(tmp_path: Path, which: str) -> None:
    store, ids = with_change(small_store(str(tmp_path)), 0.0), np.arange(20)
    sampling = pairs_of(store, KrdConfig.model_validate({"neighbours": which}))
    expected = {*links(store, ids.tolist(), which), *((i, i) for i in range(20))}
    assert drawn(sampling, ids, 1) == expected


def test_every_row_weighs_the_same_and_its_teachers_mean_its_class(store: GraphStore) -> None:
    sampling, ids = pairs_of(store, KrdConfig()), np.random.default_rng(0).permutation(store.num_nodes)[:90]
    pairs = sampling.draw(ids, 5, torch.float64)
    np.testing.assert_array_equal(pairs.soft_nC, store.gather("soft", sampling.links(ids, 5).nodes))
    weight = torch.zeros(90, dtype=torch.float64).index_add_(0, pairs.row_m, pairs.weight_B[pairs.row_m])
    torch.testing.assert_close(weight, torch.ones(90, dtype=torch.float64))
    soft = pairs.soft_nC
    target = torch.zeros(90, soft.shape[1], dtype=torch.float64).index_add_(
        0, pairs.row_m, soft[pairs.teacher_m] * pairs.weight_B[pairs.row_m, None]
    )
    assert (torch.bincount(pairs.row_m) > 1).sum() > 50
    assert torch.equal(target.argmax(1), soft[:90].argmax(1))


def test_as_published_every_pair_weighs_the_same_bit_for_bit(store: GraphStore) -> None:
    sampling, ids = pairs_of(store, KrdConfig(neighbours="all")), np.arange(0, store.num_nodes, 3)
    pairs, logits = sampling.draw(ids, 5, torch.float32), torch.randn(80, 5, generator=torch.Generator().manual_seed(0))
    given = (pairs.soft_nC, pairs.teacher_m, pairs.row_m)
    assert len(pairs.row_m) > 200
    found, expected = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weight, total = pairs.weight_B, pairs.weight_B[pairs.row_m].sum().item()
    loss, reference = krd_loss(found, *given, weight, total, 1.0), published(expected, *given, len(pairs.row_m), 1.0)
    loss.backward()
    reference.backward()
    assert torch.equal(loss, reference)
    assert torch.equal(found.grad, expected.grad)


def test_bins_are_those_of_a_histogram(store: GraphStore) -> None:
    sampling, ids = pairs_of(store, KrdConfig(bins=10)), np.arange(0, store.num_nodes, 2)
    found = sampling.draw(ids, 1, torch.float32).bin_B.numpy()
    expected = np.histogram(sampling.change(ids), np.linspace(0, 1, 11))[0]
    np.testing.assert_array_equal(np.bincount(found, minlength=10), expected)
