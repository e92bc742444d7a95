"""Batches by part: every node once per epoch, in shares that do not depend on which rank carries a part."""

import time

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from rbm_dist.train.part_batches import PartBatches


def of_all(nodes: list[np.ndarray], batch_size: int) -> PartBatches:
    """All parts on one rank."""
    return PartBatches(list(map(len, nodes)), dict(enumerate(nodes)), batch_size)


def of_some(whole: PartBatches, parts: list[int]) -> PartBatches:
    """What a rank with these parts has."""
    return PartBatches(whole.counts, {part: whole.nodes[part] for part in parts}, whole.batch_size)


@st.composite
def batches(draw: st.DrawFn) -> PartBatches:
    """Parts of zero to forty nodes, with ids that ascend over the parts."""
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=6))
    ends = np.cumsum(sizes)
    nodes = [np.arange(end - size, end) * 3 for end, size in zip(ends, sizes, strict=True)]
    return of_all(nodes, draw(st.integers(1, 50)))


EPOCHS = st.one_of(st.none(), st.integers(0, 5))


@given(batches=batches(), seed=st.integers(0, 2**31), epoch=EPOCHS)
def test_an_epoch_is_every_node_once(batches: PartBatches, seed: int, epoch: int | None) -> None:
    steps = batches.epoch(seed, epoch)
    assert len(steps) == batches.num_steps
    for part, nodes in batches.nodes.items():
        given_by_part = np.concatenate([step[part] for step in steps] or [nodes[:0]])
        np.testing.assert_array_equal(np.sort(given_by_part), nodes)


@given(batches=batches(), seed=st.integers(0, 2**31), epoch=EPOCHS)
def test_steps_are_even_and_none_is_empty(batches: PartBatches, seed: int, epoch: int | None) -> None:
    num_steps, total = batches.num_steps, batches.num_nodes
    assert (num_steps == 0) == (total == 0)
    for number, step in enumerate(batches.epoch(seed, epoch)):
        assert batches.global_rows(number) == sum(map(len, step)) > 0
        for part, nodes in batches.nodes.items():
            assert abs(len(step[part]) - len(nodes) / num_steps) < 1
        assert abs(sum(map(len, step)) - total / num_steps) < len(batches.nodes)


@given(batches=batches(), seed=st.integers(0, 2**31), epoch=EPOCHS)
def test_step_t_of_s_ends_at_t_s_of_every_part(batches: PartBatches, seed: int, epoch: int | None) -> None:
    """Part by part and step by step, as the definition says; runs cut off long ago go on with the same batches."""
    parts, steps = list(range(len(batches.nodes))), batches.num_steps
    whole = [np.concatenate([step[part] for step in batches.epoch(seed, epoch)] or [[]]) for part in parts]
    for number, step in enumerate(batches.epoch(seed, epoch)):
        ends = [(len(nodes) * number // steps, len(nodes) * (number + 1) // steps) for nodes in batches.nodes.values()]
        assert batches.global_rows(number) == sum(stop - start for start, stop in ends)
        for rows, part, (start, stop) in zip(step, whole, ends, strict=True):
            np.testing.assert_array_equal(rows, part[start:stop])
            assert rows.dtype == np.int64


def test_many_parts_cost_little() -> None:
    """Every step of 1,024 parts; when each step went through all parts for each of them, this took 20 s."""
    sizes = np.random.default_rng(0).integers(900, 1100, 1024)
    of_a_rank = of_some(of_all([np.arange(size) for size in sizes], 4096), list(range(0, 1024, 64)))
    start = time.process_time()
    rows = [of_a_rank.global_rows(step) for step in range(of_a_rank.num_steps)]
    of_a_rank.epoch(0, None)
    assert sum(rows) == sizes.sum()
    assert time.process_time() - start < 2


@given(batches=batches())
def test_as_many_steps_as_the_batch_size_asks_for(batches: PartBatches) -> None:
    sizes = [len(nodes) for nodes in batches.nodes.values()]
    asked = int(np.ceil(sum(sizes) / batches.batch_size))
    # More than the largest part has nodes would leave some steps empty.
    assert batches.num_steps == min(asked, max(sizes))


@given(batches=batches(), seed=st.integers(0, 2**31), epoch=EPOCHS, data=st.data())
def test_a_part_gives_the_same_whoever_carries_it(
    batches: PartBatches, seed: int, epoch: int | None, data: st.DataObject
) -> None:
    parts = data.draw(st.permutations(range(len(batches.nodes))))
    alone = {part: of_some(batches, [part]).epoch(seed, epoch) for part in parts}
    for step, rows in enumerate(of_some(batches, parts).epoch(seed, epoch)):
        for part, nodes in zip(parts, rows, strict=True):
            np.testing.assert_array_equal(nodes, alone[part][step][0])


def test_orders_belong_to_seed_epoch_and_part() -> None:
    nodes = np.arange(50)
    batches = of_all([nodes, nodes], 10)

    def order(part: int, seed: int, epoch: int | None) -> list[int]:
        return np.concatenate([step[0] for step in of_some(batches, [part]).epoch(seed, epoch)]).tolist()

    first = order(0, 1, 2)
    assert order(0, 1, 2) == first
    for other in (order(1, 1, 2), order(0, 3, 2), order(0, 1, 3)):
        assert other != first
    assert order(0, 1, None) == nodes.tolist()


def test_every_node_comes_first_equally_often() -> None:
    batches = of_all([np.arange(8)], 1)
    counts = np.bincount([int(batches.epoch(3, epoch)[0][0][0]) for epoch in range(1600)], minlength=8)
    assert scipy.stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("sizes", [[], [0, 0]])
def test_no_nodes_are_no_steps(sizes: list[int]) -> None:
    batches = of_all([np.arange(size) for size in sizes], 8)
    assert batches.num_steps == 0
    assert batches.epoch(0, 0) == []


@given(batches=batches(), data=st.data())
def test_positions_are_those_among_all_nodes(batches: PartBatches, data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.sampled_from(range(len(batches.counts))), unique=True))
    of_a_rank, everyone = of_some(batches, parts), np.concatenate(list(batches.nodes.values()))
    np.testing.assert_array_equal(everyone[of_a_rank.positions], of_a_rank.ids)
