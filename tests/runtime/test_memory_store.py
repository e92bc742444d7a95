"""The memory-store actor on a real Ray cluster."""

import pytest
import ray
import torch
from ray.exceptions import RayError

from rbm_dist.errors import RunError
from rbm_dist.moe.memory import RoutingMemory
from rbm_dist.moe.routing import MemoryStatistics, memory_statistics, route
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.runtime.failures import explain
from rbm_dist.runtime.memory_store import ActorMemoryStore, _MemoryActor, _pack
from tests.patience import patient

SETTINGS = {"decay": 0.9, "self_similarity": 0.1, "lr": 0.01, "reseed_after": 1}


def initial() -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(4, width, generator=rng, dtype=torch.float64) for width in (3, 6)]


def statistics(memories: list[torch.Tensor], step: int, rows: slice = slice(None)) -> list[MemoryStatistics]:
    rng = torch.Generator().manual_seed(step)
    rows_per_layer = [torch.randn(9, m.shape[1], generator=rng, dtype=torch.float64)[rows] for m in memories]
    return [memory_statistics(x, route(x, m, 2), 4) for x, m in zip(rows_per_layer, memories, strict=True)]


def test_one_rank_sees_the_memory_that_one_process_computes(cluster: None) -> None:
    store = ActorMemoryStore(Mesh.single(), timeout_s=patient(60), **SETTINGS)
    reference = RoutingMemory(initial(), **SETTINGS)
    store.init(initial(), None)
    for step in range(4):
        memories = store.pull(step)
        for found, expected in zip(memories, reference.memories, strict=True):
            assert torch.equal(found, expected.detach())
        store.push(step, statistics(memories, step))
        reference.step(statistics([m.detach() for m in reference.memories], step))
    snapshot = store.snapshot(4)
    other = ActorMemoryStore(Mesh.single(), timeout_s=patient(60), **SETTINGS)
    other.init(initial(), snapshot)
    for found, expected in zip(other.pull(4), reference.memories, strict=True):
        assert torch.equal(found, expected.detach()), "a fresh actor goes on from a snapshot"
    with pytest.raises(RuntimeError, match="version 9 was asked for"):
        other.pull(9)


def test_sums_of_ranks_and_the_deadline(cluster: None) -> None:
    actor = ray.remote(num_cpus=0)(_MemoryActor).remote(3, SETTINGS, 2.0)
    ray.get(actor.init.remote([_pack(m) for m in initial()], None))
    packed = [
        [(_pack(layer.sum_ED), _pack(layer.mass_E)) for layer in statistics(initial(), 0, slice(rank, None, 3))]
        for rank in range(3)
    ]
    answers = ray.get([actor.push.remote(0, rank, packed[rank]) for rank in (2, 0, 1)])
    reference = RoutingMemory(initial(), **SETTINGS)
    reference.step(statistics(initial(), 0))
    for answer in answers:
        for found, expected in zip(answer, reference.memories, strict=True):
            torch.testing.assert_close(torch.from_numpy(found.copy()), expected.detach(), rtol=1e-12, atol=1e-14)
    with pytest.raises(RayError) as late:
        ray.get([actor.push.remote(1, rank, packed[rank]) for rank in (0, 2)])
    error = explain(late.value, "student")
    assert isinstance(error, RunError)
    assert "version 1: nothing from rank(s) [1] for 2 s" in str(error)
