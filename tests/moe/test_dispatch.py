"""Dispatch and combine, local and all-to-all, against the dense weighted sum."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rbm_dist.moe.collectives import all_reduce_sum, traffic
from rbm_dist.moe.dispatch import AllToAllDispatcher, Dispatched, LocalDispatcher
from rbm_dist.randomness.rows import derive_keys
from tests.gloo import run_ranks

E, K, D, OUT = 5, 2, 4, 3
ROWS = {2: [3, 6], 3: [4, 0, 7]}  # one rank may have no rows; with three ranks the last has one expert


def problem(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, their experts, weights, and every expert's matrix."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, D, generator=rng, dtype=torch.float64)
    experts = (
        torch.stack([torch.randperm(E, generator=rng)[:K] for _ in range(rows)]) if rows else torch.empty(0, K).long()
    )
    weights = torch.rand(rows, K, generator=rng, dtype=torch.float64)
    matrices = torch.randn(E, D, OUT, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    return x, experts, weights, matrices


def dense(x: Tensor, experts: Tensor, weights: Tensor, matrices: Tensor) -> Tensor:
    return torch.einsum("bk,bd,bkdo->bo", weights, x, matrices[experts])


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 12), seed=st.integers(0, 50))
def test_local(rows: int, seed: int) -> None:
    x, experts, weights, matrices = problem(rows, seed)
    dispatcher = LocalDispatcher(E)
    routed = dispatcher.dispatch(x, experts, weights, torch.arange(rows))
    assert routed.counts_L.tolist() == [int((experts == e).sum()) for e in range(E)]
    grouped = experts.flatten()[routed.at_R]
    assert torch.equal(grouped, grouped.sort().values)
    assert torch.equal(routed.place_Tk.flatten()[routed.at_R], torch.arange(rows * K))
    assert torch.equal(routed.key_Tk, derive_keys(torch.arange(rows)[:, None], experts))
    outputs = outputs_of(routed, matrices)
    torch.testing.assert_close(dispatcher.combine(outputs, routed.meta), dense(x, experts, weights, matrices))


def outputs_of(routed: Dispatched, matrices: Tensor) -> Tensor:
    """The weighted sums of the experts that are here, row by row."""
    here = routed.place_Tk >= 0
    row, _ = here.nonzero(as_tuple=True)
    each = torch.einsum("rd,rdo->ro", routed.rows_TD[row], matrices[routed.experts_Tk[here]])
    weighed = each * routed.weights_Tk[here][:, None]
    return weighed.new_zeros(len(routed.rows_TD), OUT).index_add(0, row, weighed)


def across(rank: int, world: int) -> dict[str, object]:
    x, experts, weights, matrices = problem(ROWS[world][rank], rank)
    x.requires_grad_()
    weights.requires_grad_()
    dispatcher = AllToAllDispatcher(E, torch.distributed.group.WORLD)
    routed = dispatcher.dispatch(x, experts, weights, rank * 100 + torch.arange(len(x)))
    first = dispatcher.local.first
    local = matrices[first : first + dispatcher.local.num_local].clone().requires_grad_()
    out = dispatcher.combine(outputs_of(routed, local), routed.meta)
    out.square().sum().backward()
    here = routed.place_Tk >= 0
    received = routed.key_Tk[here].tolist()
    return {"out": out.detach(), "x": x.grad, "weights": weights.grad, "matrices": local.grad, "received": received}


@pytest.mark.parametrize("world", [2, 3])
def test_all_to_all(world: int) -> None:
    results = run_ranks(across, world, world)
    matrices = problem(1, 0)[3].requires_grad_()
    matrix_grads = torch.zeros_like(matrices)
    pairs = []
    for rank, rows in enumerate(ROWS[world]):
        x, experts, weights, _ = problem(rows, rank)
        pairs += [derive_keys(rank * 100 + row, e).item() for row in range(rows) for e in experts[row]]
        leaves = (x.requires_grad_(), weights.requires_grad_(), matrices)
        out = dense(x, experts, weights, matrices)
        torch.testing.assert_close(results[rank]["out"], out.detach())
        grad_x, grad_weights, grad_matrices = torch.autograd.grad(out.square().sum(), leaves)
        matrix_grads += grad_matrices
        torch.testing.assert_close(results[rank]["x"], grad_x)
        torch.testing.assert_close(results[rank]["weights"], grad_weights)
    torch.testing.assert_close(torch.cat([result["matrices"] for result in results]), matrix_grads)
    assert sorted(pair for result in results for pair in result["received"]) == sorted(pairs), "each pair once"


def sent(rank: int, wire: torch.dtype | None) -> dict[str, float]:
    """What is counted of a rank: of four rows one stays here, three go to the other rank's expert, and come back."""
    dispatcher = AllToAllDispatcher(2, torch.distributed.group.WORLD, wire)
    chosen = torch.tensor([[rank], [1 - rank], [1 - rank], [1 - rank]])
    x = torch.ones(4, D, dtype=torch.float64, requires_grad=True)
    weights = torch.ones(4, 1, dtype=torch.float64, requires_grad=True)
    before = replace(traffic)
    routed = dispatcher.dispatch(x, chosen, weights, None)
    outputs = outputs_of(routed, torch.ones(1, D, OUT, dtype=torch.float64))
    dispatcher.combine(outputs, routed.meta).sum().backward()
    return traffic.since(before)


@pytest.mark.parametrize(("wire", "size"), [(None, 8), (torch.bfloat16, 2)])
def test_what_is_sent_to_others_is_counted(wire: torch.dtype | None, size: int) -> None:
    least = 3 * size * 2 * (D + OUT)  # rows and sums, and the gradients of both
    routed = least + 3 * 8 * 3  # the choices, the weights, and the gradients of these
    expected = {"sent": routed, "routed": routed, "least": least, "copies": 4, "stayed": 1}
    assert run_ranks(sent, 2, wire) == [expected] * 2


def summed_up(rank: int) -> float:
    before = traffic.sent
    x = torch.ones(10, dtype=torch.float32, requires_grad=True)
    all_reduce_sum(x, torch.distributed.group.WORLD).sum().backward()
    return traffic.sent - before


def test_a_sum_is_counted_as_in_a_ring() -> None:
    assert run_ranks(summed_up, 4) == [pytest.approx(2 * 2 * 3 / 4 * 10 * 4)] * 4, "forward and backward"
