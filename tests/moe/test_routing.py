"""Routing and its losses against the formulas, written out row by row in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rbm_dist.moe.routing import (
    MemoryStatistics,
    commitment_loss,
    load_balance_loss,
    memory_statistics,
    moving_average,
    route,
    self_similarity_loss,
)

SHAPES = {
    "rows": st.integers(1, 20),
    "width": st.integers(1, 9),
    "experts": st.integers(2, 7) | st.just(150),  # of many, each has few rows
    "seed": st.integers(0, 99),
}


def draw(rows: int, width: int, experts: int, seed: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=rng, dtype=torch.float64)
    return x, torch.randn(experts, width, generator=rng, dtype=torch.float64)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / (math.sqrt(float(a @ a)) * math.sqrt(float(b @ b)))


def reference(x: Tensor, memory: Tensor, k: int) -> list[list[tuple[int, float, float]]]:
    """Per row its k experts, best first: (expert, weight, cosine)."""
    rows = []
    for row in x:
        scores = sorted(((cosine(row, m), e) for e, m in enumerate(memory)), reverse=True)[:k]
        total = sum(math.exp(s) for s, _ in scores)
        rows.append([(e, math.exp(s) / total, s) for s, e in scores])
    return rows


@settings(max_examples=40, deadline=None)
@given(**SHAPES, k=st.integers(1, 3))
def test_route(rows: int, width: int, experts: int, seed: int, k: int) -> None:
    x, memory = draw(rows, width, experts, seed)
    k = min(k, experts)
    routing = route(x, memory, k)
    for row, expected in enumerate(reference(x, memory, k)):
        found = zip(routing.experts_Bk[row].tolist(), routing.weights_Bk[row].tolist(), strict=True)
        if width == 1:  # cosines are ±1: which of the equals is chosen is open
            assert sorted(routing.cosines_Bk[row].tolist()) == pytest.approx(sorted(c for _, _, c in expected))
        else:
            assert [e for e, _ in found] == [e for e, _, _ in expected]
        assert routing.weights_Bk[row].tolist() == pytest.approx([a for _, a, _ in expected])


@settings(max_examples=40, deadline=None)
@given(**SHAPES)
def test_moving_average(rows: int, width: int, experts: int, seed: int) -> None:
    x, memory = draw(rows, width, experts, seed)
    routing = route(x, memory, 2)
    found = moving_average(memory, memory_statistics(x, routing, experts), decay=0.9)
    for expert in range(experts):
        chosen = [
            (float(routing.weights_Bk[row, slot]), x[row])
            for row in range(rows)
            for slot in range(2)
            if routing.experts_Bk[row, slot] == expert
        ]
        if not chosen:
            expected = memory[expert]  # a starved expert keeps its memory
        else:
            total = sum(math.exp(a) for a, _ in chosen)
            average = sum(math.exp(a) / total * row / row.norm() for a, row in chosen)
            expected = 0.9 * memory[expert] / memory[expert].norm() + 0.1 * average
        torch.testing.assert_close(found[expert], expected)


def test_statistics_of_parts_add_up() -> None:
    x, memory = draw(17, 4, 5, 0)
    whole = memory_statistics(x, route(x, memory, 2), 5)
    parts = [memory_statistics(part, route(part, memory, 2), 5) for part in (x[:3], x[3:3], x[3:])]
    total = MemoryStatistics.total(parts)
    torch.testing.assert_close(total.sum_ED, whole.sum_ED)
    torch.testing.assert_close(total.mass_E, whole.mass_E)


def test_losses() -> None:
    x, memory = draw(11, 6, 4, 3)
    routing, rows = route(x, memory, 3), reference(x, memory, 3)
    assert commitment_loss(routing, 11).item() == pytest.approx(-sum(a * c for row in rows for _, a, c in row) / 11)
    assert commitment_loss(routing, 22).item() == pytest.approx(-sum(a * c for row in rows for _, a, c in row) / 22)
    pairs = [cosine(a, b) for a in memory for b in memory]
    assert self_similarity_loss(memory).item() == pytest.approx(sum(pairs) / 16)
    mass = [sum(a for row in rows for e, a, _ in row if e == expert) for expert in range(4)]
    mean = sum(mass) / 4
    variance = sum((m - mean) ** 2 for m in mass) / 4
    assert load_balance_loss(routing, 4, None).item() == pytest.approx(variance / mean**2)


def test_gradients() -> None:
    x, memory = draw(6, 5, 4, 1)
    x.requires_grad_()

    def losses(x: Tensor) -> Tensor:
        routing = route(x, memory, 2)
        return commitment_loss(routing, 6) + load_balance_loss(routing, 4, None)

    assert torch.autograd.gradcheck(losses, (x,))


def test_what_carries_no_gradient() -> None:
    x, memory = draw(6, 5, 4, 1)
    x.requires_grad_()
    memory.requires_grad_()
    commitment_loss(route(x, memory, 2), 6).backward()
    assert x.grad is not None
    assert memory.grad is None, "the commitment loss moves rows, not memories"
    # Half of the symmetric similarity is stopped: each pair pulls once, through its first member.
    self_similarity_loss(memory).backward()
    unit = (memory / memory.norm(dim=1, keepdim=True)).detach()
    free = memory.detach().clone().requires_grad_()
    ((free / free.norm(dim=1, keepdim=True)) @ unit.T).mean().backward()
    torch.testing.assert_close(memory.grad, free.grad)
