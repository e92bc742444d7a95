"""How many ranks share a set of experts, when nobody says."""

import logging
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rbm_dist.config.run import Config
from rbm_dist.parallel import expert_layout
from rbm_dist.parallel.expert_layout import Layout, Wire, choose, layouts, measured_wire, share_experts
from rbm_dist.parallel.mesh import Mesh
from tests.gloo import run_ranks

WIDTHS = [(100, 256), (256, 47)]
SLOW, QUICK = Wire(1e-3, 1e8), Wire(1e-5, 1e8)


def test_what_a_layout_takes() -> None:
    alone, _, four, eight = layouts(WIDTHS, 8, 1, 800, 8, 10, SLOW)
    expert = 4 * (101 * 256 + 257 * 47)
    assert [each.expert_parallel for each in (alone, four, eight)] == [1, 4, 8]
    assert [each.held for each in (alone, four, eight)] == [10 * 8 * expert, 10 * 2 * expert, 10 * expert]
    assert alone.exchange_s == pytest.approx(1e-3 + 2 * 7 / 8 * 8 * expert / 1e8)
    rows = 2 * 4 * 100 * (100 + 256 + 256 + 47)  # of a rank, there and back, forward and backward, in bytes
    assert eight.exchange_s == pytest.approx(18e-3 + 7 / 8 * rows / 1e8), "no gradients of experts to sum"
    assert four.exchange_s == pytest.approx(19e-3 + (2 / 2 * 2 * expert + 3 / 4 * rows) / 1e8)


@given(experts=st.integers(1, 20), ranks=st.integers(1, 12), top_k=st.integers(1, 4))
def test_every_rank_has_experts_and_holds_less_the_more_share(experts: int, ranks: int, top_k: int) -> None:
    found = layouts(WIDTHS, experts, min(top_k, experts), 512, ranks, 8, QUICK)
    assert found[0].expert_parallel == 1
    for each in found:
        assert ranks % each.expert_parallel == 0
        shard = -(-experts // each.expert_parallel)
        assert (each.expert_parallel - 1) * shard < experts
    assert [each.held for each in found] == sorted((each.held for each in found), reverse=True)


@pytest.mark.parametrize(
    ("seconds", "memory", "chosen", "other"),
    [
        ([1.0, 0.6], 10, 1, 2),  # a bit less on the wire is not worth the wait for the rank with most rows
        ([1.0, 0.4], 10, 2, 1),
        ([1.0, 2.0], 10, 1, 2),
        ([1.0, 2.0], 5, 2, 1),  # it does not fit otherwise
        ([1.0, 2.0], 1, 2, 1),  # nor so, but it is nearest to it
        ([1.0], 10, 1, 1),
    ],
)
def test_choice(seconds: list[float], memory: float, chosen: int, other: int) -> None:
    found = [Layout(group + 1, 8 / (group + 1), each) for group, each in enumerate(seconds)]
    taken, against = choose(found, memory)
    assert (taken.expert_parallel, against.expert_parallel) == (chosen, other)


def laid_out(rank: int, cluster: dict, given: int) -> tuple[int, bool, list[str]]:
    """Ranks per set, whether the ranks that hold the same experts find each other, and what was said."""
    expert_layout.measured_wire = lambda mesh: QUICK  # a fast network to few rows: worth sharing
    config = Config.model_validate(
        {
            "run_dir": "run",
            "partition": {"num_parts": 4},
            "cluster": {"train_workers": 4} | cluster,
            "student": {"batch_size": 4},
        }
    )
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("rbm_dist").addHandler(handler)
    logging.getLogger("rbm_dist").setLevel(logging.INFO)
    mesh = share_experts(Mesh.init(given, torch.device("cpu")), config, WIDTHS)
    holders = torch.tensor([float(rank)])
    if mesh.replica_group is not None:
        torch.distributed.all_reduce(holders, group=mesh.replica_group)
    same = [each for each in range(4) if each % mesh.expert_parallel == rank % mesh.expert_parallel]
    return mesh.expert_parallel, holders.item() == sum(same), said


@pytest.mark.parametrize(
    ("cluster", "given", "expected"), [({}, 1, 4), ({}, 2, 2), ({"expert_parallel": 1}, 1, 1)]
)  # fmt: skip
def test_ranks_are_laid_out_once_and_rank_0_says_why(cluster: dict, given: int, expected: int) -> None:
    found = run_ranks(laid_out, 4, cluster, given)
    assert [each[:2] for each in found] == [(expected, True)] * 4
    chosen = (given, expected) == (1, 4)
    assert [len(said) for _, _, said in found] == [int(chosen), 0, 0, 0]
    if chosen:
        assert re.fullmatch(r"experts shared by 4 ranks: \d+ of .*; all on each rank: .* ms", found[0][2][0])


def wire(rank: int) -> Wire:
    return measured_wire(Mesh.init(1, torch.device("cpu")))


def test_all_ranks_hear_of_one_measurement() -> None:
    first, second = run_ranks(wire, 2)
    assert first == second
    assert 0 < first.call_s < 10
    assert 1e5 < first.bytes_per_s < 1e12
