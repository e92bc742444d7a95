"""The layout of ranks: parts and experts are each dealt exactly once per group, parts by hosts."""

from itertools import pairwise

import pytest
import torch

from rbm_dist.parallel.deal import deal
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.reduce import sum_figures
from tests.gloo import run_ranks


def describe(rank: int, expert_parallel: int) -> dict[str, object]:
    mesh = Mesh.init(expert_parallel, torch.device("cpu"), host=f"host {rank % 2}")
    return {
        "parts": mesh.parts(7),
        "experts": list(mesh.local_experts(8)),
        "dispatched": mesh.dispatcher(8).local if mesh.expert_group else mesh.dispatcher(8),
        "sum": sum_figures([float(rank), 1.0], mesh),
        "groups": [group is not None for group in (mesh.world_group, mesh.expert_group, mesh.replica_group)],
    }


@pytest.mark.parametrize(
    ("world", "expert_parallel", "experts"),
    [(1, 1, [8]), (3, 3, [3, 3, 2]), (4, 2, [4, 4, 4, 4]), (5, 5, [2, 2, 2, 2, 0])],
)
def test_layout(world: int, expert_parallel: int, experts: list[int]) -> None:
    ranks = run_ranks(describe, world, expert_parallel)
    assert [len(rank["experts"]) for rank in ranks] == experts
    for first in range(0, world, expert_parallel):
        together = [rank["experts"] for rank in ranks[first : first + expert_parallel]]
        assert [expert for each in together for expert in each] == list(range(8)), "each expert once, in rank order"
    for rank in ranks:
        dispatcher = rank["dispatched"]
        assert rank["experts"] == list(range(dispatcher.first, dispatcher.first + dispatcher.num_local))
    assert sorted(part for rank in ranks for part in rank["parts"]) == list(range(7))
    for host in (0, 1):
        here = [rank["parts"] for rank in ranks[host::2]]
        assert here == deal(7, [f"host {rank % 2}" for rank in range(world)])[host::2]
    expected_groups = [world > 1, expert_parallel > 1, 1 < world != expert_parallel]
    assert all(rank["groups"] == expected_groups for rank in ranks)
    assert all(rank["sum"] == [sum(range(world)), world] for rank in ranks)


@pytest.mark.parametrize("hosts", ["a", "ba", "abab", "aab", "babbcb", "aaaaaaab", "cab" * 7])
@pytest.mark.parametrize("num_parts", [0, 1, 7, 16, 40])
def test_parts_are_dealt_evenly_and_each_host_has_one_range(hosts: str, num_parts: int) -> None:
    dealt = deal(num_parts, hosts)
    assert sorted(part for parts in dealt for part in parts) == list(range(num_parts))
    assert {len(parts) for parts in dealt} <= {num_parts // len(hosts), -(-num_parts // len(hosts))}
    for host in set(hosts):
        parts = sorted(part for at, parts in zip(hosts, dealt, strict=True) if at == host for part in parts)
        assert all(after == before + 1 for before, after in pairwise(parts))


def test_hosts_with_equally_many_workers_have_the_same_parts_whatever_the_workers_are() -> None:
    few, many = deal(13, "ab"), deal(13, "baab")
    assert few[0] == sorted(many[1] + many[2])
    assert few[1] == sorted(many[0] + many[3])


def bad(rank: int) -> None:
    with pytest.raises(ValueError, match="3 ranks cannot be laid out with 2"):
        Mesh.init(2, torch.device("cpu"))


def test_sizes_that_do_not_fit() -> None:
    run_ranks(bad, 3)
