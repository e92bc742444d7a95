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


STARVED = 3


def starve(layers: list[MemoryStatistics], expert: int = STARVED) -> list[MemoryStatistics]:
    """The same sums, as if no row had chosen one expert."""
    for layer in layers:
        layer.sum_ED[expert], layer.mass_E[expert] = 0, 0
    return layers


def fed(memory: RoutingMemory, steps: range) -> RoutingMemory:
    """The memory after steps that starve an expert."""
    for step in steps:
        memory.step(starve(statistics([m.detach() for m in memory.memories], step)))
    return memory


def test_a_starved_expert_starts_anew_beside_the_busiest(caplog: pytest.LogCaptureFixture) -> None:
    memory, never = RoutingMemory(initial(), **SETTINGS, reseed_after=3), RoutingMemory(initial(), **SETTINGS)
    fed(memory, range(2))
    assert not caplog.messages
    assert all(memory.snapshot()[f"{layer}.idle"].tolist() == [0, 0, 0, 2] for layer in range(2))
    before = [m.detach().clone() for m in memory.memories]
    fed(memory, range(2, 3))
    fed(never, range(3))
    busiest = [int(layer.mass_E.argmax()) for layer in starve(statistics(before, 2))]
    assert caplog.messages == [
        f"routing memory: layer {layer}: expert 3 had no row for 3 steps; its memory starts anew beside expert {near}"
        for layer, near in enumerate(busiest)
    ]
    state, other = memory.snapshot(), never.snapshot()
    for layer, near in enumerate(busiest):
        found = state[f"{layer}.memory"]
        assert torch.equal(found[:STARVED], other[f"{layer}.memory"][:STARVED]), "nobody else moves"
        assert found[STARVED].norm().item() == pytest.approx(1)
        distance = (found[STARVED] - F.normalize(found[near], dim=0)).norm().item()
        assert 0 < distance < 0.11
        assert F.cosine_similarity(found[STARVED], other[f"{layer}.memory"][STARVED], dim=0) < 0.95
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[f"{layer}.{moment}"][:STARVED], other[f"{layer}.{moment}"][:STARVED])
            assert other[f"{layer}.{moment}"][STARVED].abs().sum() > 0
            assert not state[f"{layer}.{moment}"][STARVED].any(), "Adam forgets what the old memory did"
        assert state[f"{layer}.idle"].tolist() == [0] * 4
    assert all(torch.equal(a, b) for a, b in zip(memory.memories, fed_from_start().memories, strict=True))


def fed_from_start() -> RoutingMemory:
    return fed(RoutingMemory(initial(), **SETTINGS, reseed_after=3), range(3))


def test_idle_steps_count_in_a_row() -> None:
    memory = RoutingMemory(initial(), **SETTINGS, reseed_after=3)
    fed(memory, range(2))
    rows = [m.detach().clone() for m in memory.memories]
    for layer, m in enumerate(rows):  # one row goes to the starved expert
        rows[layer] = memory_statistics(m[STARVED][None], route(m[STARVED][None], m, 2), 4)
    memory.step(rows)
    assert all(memory.snapshot()[f"{layer}.idle"][STARVED] == 0 for layer in range(2))
    fed(memory, range(3, 5))
    assert all(memory.snapshot()[f"{layer}.idle"][STARVED] == 2 for layer in range(2))


def test_reseeding_goes_on_from_a_snapshot() -> None:
    whole = fed(RoutingMemory(initial(), **SETTINGS, reseed_after=3), range(8))
    first = fed(RoutingMemory(initial(), **SETTINGS, reseed_after=3), range(5))
    second = RoutingMemory([torch.zeros_like(m) for m in initial()], **SETTINGS, reseed_after=3)
    second.restore(first.snapshot())
    fed(second, range(5, 8))
    for name, tensor in whole.snapshot().items():
        assert torch.equal(second.snapshot()[name], tensor), name


def pushed(rank: int, world: int) -> list[torch.Tensor]:
    group = torch.distributed.group.WORLD if world > 1 else None
    store = InProcessMemoryStore(group, **SETTINGS, reseed_after=2)
    store.init(initial(), None)
    for step in range(4):
        layers = statistics(store.pull(step), step, slice(rank, None, world))
        store.push(step, starve(layers) if step < 3 else layers)
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
