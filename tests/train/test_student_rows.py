"""Batches of students: the rows of the store, whether they are read ahead or kept, and all that training is to know."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rbm_dist.config.run import StudentConfig
from rbm_dist.distill.krd import Reliability
from rbm_dist.distill.losses import Batch
from rbm_dist.graph.splits import TRAIN
from rbm_dist.graph.store import GraphStore
from rbm_dist.moe.sparse_rows import SparseRows, dense
from rbm_dist.randomness.rows import derive_keys
from rbm_dist.train.part_batches import PartBatches, joined
from rbm_dist.train.reliable_pairs import ReliablePairs
from rbm_dist.train.student_rows import Drawn, StudentRows
from tests.small_graph import small_graph, small_store, with_sparse_features, write_graph

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> GraphStore:
    """The small graph with a teacher's hidden states and entropy changes."""
    store = small_store(str(tmp_path_factory.mktemp("rows")))
    rng = np.random.default_rng(0)
    for name, rows in {"hidden": rng.normal(size=(240, 9)), "entropy_change": rng.random(240)}.items():
        rows = rows.astype(np.float32)
        parts = range(store.num_parts)
        files = [store.write_part(name, p, rows.dtype, rows.shape[1:], [rows[store.ids(p)]]) for p in parts]
        store.publish(name, files)
    return store


def batches_of(store: GraphStore) -> PartBatches:
    """Of the parts 1 and 2 alone."""
    return PartBatches.of(store, [1, 2], lambda split: split >= 0, 50)


def drawn(of: PartBatches) -> list[Drawn]:
    return [Drawn(step, shares, 100 + step, 200 + step) for step, shares in enumerate(of.epoch(3, 1))]


def rows_of(store: GraphStore, dtype: torch.dtype = torch.float32, pairs: bool = False, **settings: Any) -> StudentRows:
    student = StudentConfig.model_validate(settings)
    krd = ReliablePairs(student.krd, store, Reliability(student.krd)) if pairs else None
    return StudentRows(store, student, CPU, dtype, 60.0, krd)


def all_batches(rows: StudentRows, of: PartBatches) -> list[Batch]:
    with rows.batches("test", of, drawn(of)) as batches:
        return list(batches)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_has_all_that_is_known_of_its_rows(store: GraphStore, kept: bool, dtype: torch.dtype) -> None:
    rows, of = rows_of(store, dtype, similarity=0.1), batches_of(store)
    assert rows.keep(of.ids, budget=10**9 if kept else 0) == kept
    found = all_batches(rows, of)
    assert len(found) == of.num_steps
    for batch, each in zip(found, drawn(of), strict=True):
        ids = joined(each.shares)
        for tensor, name in ((batch.x_BF, "feat"), (batch.soft_BC, "soft"), (batch.hidden_BT, "hidden")):
            assert isinstance(tensor, torch.Tensor)
            assert tensor.dtype == dtype
            np.testing.assert_array_equal(tensor.numpy(), store.gather(name, ids).astype(tensor.numpy().dtype))
        training = store.gather("split", ids) == TRAIN
        np.testing.assert_array_equal(batch.label_B, np.where(training, store.gather("label", ids), -1))
        assert torch.equal(batch.key_B, derive_keys(each.dropout, torch.from_numpy(ids)))
        assert batch.global_rows == of.global_rows(each.step) > len(ids)
        assert batch.pairs is None
    with rows.labelled("test", of) as labelled:
        labels = torch.cat([label_B for _, label_B in labelled]).numpy()
    everyone = np.concatenate([joined(shares) for shares in of.epoch(0, None)])
    np.testing.assert_array_equal(labels, store.gather("label", everyone))


def test_pairs_come_with_their_batch(store: GraphStore) -> None:
    rows, of = rows_of(store, pairs=True, objective="krd"), batches_of(store)
    settings = StudentConfig().krd
    expected = ReliablePairs(settings, store, Reliability(settings))
    for batch, each in zip(all_batches(rows, of), drawn(of), strict=True):
        pairs = expected.draw(joined(each.shares), each.pairs, torch.float32)
        assert batch.pairs is not None
        for name, tensor in vars(pairs).items():
            assert torch.equal(getattr(batch.pairs, name), tensor), name


@pytest.mark.parametrize("kept", [False, True])
def test_sparse_rows_stay_sparse_unless_they_are_kept(tmp_path: Path, kept: bool) -> None:
    graph = with_sparse_features(small_graph())
    store = write_graph(str(tmp_path), graph, np.arange(240, dtype=np.int32) // 80)
    soft = np.random.default_rng(0).random((240, 5)).astype(np.float32)
    store.publish("soft", [store.write_part("soft", p, soft.dtype, (5,), [soft[store.ids(p)]]) for p in range(3)])
    rows, of = rows_of(store), batches_of(store)
    assert rows.keep(of.ids, budget=10**9 if kept else 0) == kept
    for batch, each in zip(all_batches(rows, of), drawn(of), strict=True):
        assert isinstance(batch.x_BF, torch.Tensor if kept else SparseRows)
        np.testing.assert_array_equal(dense(batch.x_BF), store.gather("feat", joined(each.shares)))


def test_rows_are_kept_where_there_is_room_for_all(store: GraphStore) -> None:
    of = batches_of(store)
    size = len(of.ids) * ((12 + 5) * 4 + 16)
    assert not rows_of(store).keep(of.ids, of.ids[:3], budget=size - 1)
    assert rows_of(store).keep(of.ids, of.ids[:3], budget=size)
    assert not rows_of(store).keep(of.ids), "on a CPU files are mapped into memory anyway"


def test_a_rank_without_parts_has_batches_without_rows(store: GraphStore) -> None:
    of = PartBatches.of(store, [], lambda split: split >= 0, 50)
    found = all_batches(rows_of(store), of)
    assert len(found) == batches_of(store).num_steps
    assert all(len(batch.x_BF) == 0 and batch.global_rows > 0 for batch in found)
