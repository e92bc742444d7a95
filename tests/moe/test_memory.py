"""The routing memory: both writers against an optimiser over plain parameters, and the in-process store."""

import pytest
import torch
import torch.nn.functional as F

from rbm_dist.moe.memory import InProcessMemoryStore, RoutingMemory
from rbm_dist.moe.routing import MemoryStatistics, memory_statistics, route
from tests.gloo import run_ranks

SETTINGS = {"decay": 0.9, "self_similarity": 0.5, "lr": 0.01}


def initial() -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(4, width, generator=rng, dtype=torch.float64) for width in (3, 6)]


def statistics(memories: list[torch.Tensor], step: int, rows: slice = slice(None)) -> list[MemoryStatistics]:
    rng = torch.Generator().manual_seed(step)
    layers = []
    for memory in memories:
        x = torch.randn(9, memory.shape[1], generator=rng, dtype=torch.float64)[rows]
        layers.append(memory_statistics(x, route(x, memory, 2), 4))
    return layers


def test_both_writers() -> None:
    memory = RoutingMemory(initial(), **SETTINGS)
    parameters = [torch.nn.Parameter(m.clone()) for m in initial()]
    adam = torch.optim.Adam(parameters, lr=0.01)
    for step in range(5):
        layers = statistics([p.data for p in parameters], step)
        memory.step(statistics([m.detach() for m in memory.memories], step))
        for parameter, layer in zip(parameters, layers, strict=True):
            average = layer.sum_ED / layer.mass_E[:, None]
            kept = 0.9 * F.normalize(parameter.data) + 0.1 * average
            parameter.data = torch.where(layer.mass_E[:, None] > 0, kept, parameter.data)
        adam.zero_grad()
        for parameter in parameters:
            unit = F.normalize(parameter)
            (0.5 * (unit @ unit.detach().T).mean()).backward()
        adam.step()
        assert memory.version == step + 1
        for found, expected in zip(memory.memories, parameters, strict=True):
            torch.testing.assert_close(found, expected.data.requires_grad_())


def test_goes_on_from_a_snapshot() -> None:
    whole, first = RoutingMemory(initial(), **SETTINGS), RoutingMemory(initial(), **SETTINGS)
    for step in range(6):
        whole.step(statistics([m.detach() for m in whole.memories], step))
    for step in range(3):
        first.step(statistics([m.detach() for m in first.memories], step))
    second = RoutingMemory([torch.zeros_like(m) for m in initial()], **SETTINGS)
    second.restore(first.snapshot())
    for step in range(3, 6):
        second.step(statistics([m.detach() for m in second.memories], step))
    assert second.version == 6
    for found, expected in zip(second.memories, whole.memories, strict=True):
        assert torch.equal(found, expected)


def pushed(rank: int, world: int) -> list[torch.Tensor]:
    group = torch.distributed.group.WORLD if world > 1 else None
    store = InProcessMemoryStore(group, **SETTINGS)
    store.init(initial(), None)
    for step in range(4):
        share = slice(rank, None, world)
        store.push(step, statistics(store.pull(step), step, share))
    return [memory.clone() for memory in store.pull(4)]


def test_in_process_store_does_not_depend_on_the_number_of_ranks() -> None:
    alone = pushed(0, 1)
    for memories in run_ranks(pushed, 3, 3):
        for found, expected in zip(memories, alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_a_wrong_version_is_refused() -> None:
    store = InProcessMemoryStore(None, **SETTINGS)
    with pytest.raises(RuntimeError, match="no memory"):
        store.pull(0)
    store.init(initial(), None)
    with pytest.raises(RuntimeError, match="version 3 was asked for, version 0 is here"):
        store.pull(3)
