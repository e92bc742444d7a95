"""Experts on three ranks against the dense formula, for whatever layout, rows and choices come up."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from rbm_dist.models.student import ExpertsLayer
from rbm_dist.moe.dispatch import AllToAllDispatcher
from rbm_dist.moe.experts import StackedExperts
from rbm_dist.moe.keyed_dropout import keyed_dropout
from rbm_dist.randomness.rows import derive_keys
from tests.gloo import Ranks

WORLD = 3


@dataclass(frozen=True)
class Case:
    """So many rows on each rank; all choose the same experts, or any."""

    rows: tuple[int, int, int]
    experts: int
    k: int
    widths: tuple[int, int]
    same: bool
    dropout: float
    seed: int

    def tensors(self) -> list[Tensor]:
        """Rows, weights, all experts' matrices and biases; then choices and keys; in float64."""
        rng = torch.Generator().manual_seed(self.seed)
        rows, (d, o) = sum(self.rows), self.widths
        chosen = torch.rand(1 if self.same else rows, self.experts, generator=rng).argsort(1)[:, : self.k]
        shapes = [(rows, d), (rows, self.k), (self.experts, d, o), (self.experts, o)]
        drawn = [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]
        return [*drawn, chosen.expand(rows, -1), torch.arange(rows)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    experts = draw(st.integers(1, 7))
    return Case(
        rows=draw(st.tuples(*[st.integers(0, 5)] * WORLD)),
        experts=experts,
        k=draw(st.integers(1, experts)),
        widths=draw(st.tuples(st.integers(1, 6), st.integers(1, 6))),
        same=draw(st.booleans()),
        dropout=draw(st.sampled_from([0.0, 0.5])),
        seed=draw(st.integers(0, 99)),
    )


def dense(case: Case) -> list[Tensor]:
    """The outputs of all rows, and the gradients of the sum of their squares, row by row and expert by expert."""
    x, weights, matrices, biases, chosen, keys = case.tensors()
    leaves = [each.requires_grad_() for each in (x, weights, matrices, biases)]
    out = []
    for b in range(len(x)):
        sums = x.new_zeros(case.widths[1])
        for j, e in enumerate(chosen[b].tolist()):
            dropped = keyed_dropout(x[b : b + 1], derive_keys(keys[b : b + 1], e), case.dropout)[0]
            sums = sums + weights[b, j] * (dropped @ matrices[e] + biases[e])
        out.append(sums)
    outputs = torch.stack(out) if out else x.new_zeros(0, case.widths[1])
    total = outputs.square().sum() + sum(each.sum() * 0 for each in leaves)
    return [outputs.detach(), *torch.autograd.grad(total, leaves)]


def sharded(rank: int, case: Case, wire: torch.dtype | None) -> list[Tensor]:
    """The same of this rank's rows and experts."""
    x, weights, matrices, biases, chosen, keys = case.tensors()
    first = sum(case.rows[:rank])
    here = slice(first, first + case.rows[rank])
    dispatcher = AllToAllDispatcher(case.experts, dist.group.WORLD, wire)
    held = slice(dispatcher.local.first, dispatcher.local.first + dispatcher.local.num_local)
    experts = StackedExperts(matrices[held], biases[held])
    layer = ExpertsLayer(experts, case.k, case.dropout, dispatcher)
    leaves = [each[here].clone().requires_grad_() for each in (x, weights)]
    out = layer.mix(leaves[0], chosen[here], leaves[1], keys[here])
    out.square().sum().backward()
    leaves += [experts.weight_LDO, experts.bias_LO]
    return [out.detach(), *(torch.zeros_like(each) if each.grad is None else each.grad for each in leaves)]


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(WORLD) as ranks:
        yield ranks


@given(case=cases())
@example(case=Case((1, 0, 0), 1, 1, (1, 1), same=True, dropout=0.0, seed=0))  # one row, one expert
@example(case=Case((0, 0, 0), 2, 1, (3, 2), same=False, dropout=0.5, seed=0))  # none at all
@example(case=Case((5, 5, 5), 7, 7, (4, 4), same=False, dropout=0.5, seed=0))  # every row to every expert
@example(case=Case((0, 5, 0), 6, 1, (4, 3), same=True, dropout=0.5, seed=0))  # all rows of one rank to one expert
def test_any_layout(ranks: Ranks, case: Case) -> None:
    for name, found, expected in zip(
        ("outputs", "rows", "weights", "matrices", "biases"),
        map(torch.cat, zip(*ranks(sharded, case, None), strict=True)),
        dense(case),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")


@given(case=cases())
def test_bfloat16_on_the_wire_rounds_and_nothing_else(ranks: Ranks, case: Case) -> None:
    """Each number travels at most twice, with eight bits: once there and once back."""
    found = map(torch.cat, zip(*ranks(sharded, case, torch.bfloat16), strict=True))
    for rounded, expected in zip(found, dense(case), strict=True):
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(rounded, expected, rtol=0.05, atol=0.05 * scale + 1e-12)
