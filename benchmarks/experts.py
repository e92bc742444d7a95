"""Stacked experts, forward and backward: one grouped matrix product against a loop over experts, and against one dense
product of the same arithmetic (the floor). And a whole step of an RbM against a plain torch MLP of as many flop.

    python -m benchmarks.experts [--quick] [--json FILE]

Floor: 6 · R · D · O flop for R routed rows (forward 2, backward 4); a single dense matmul of the same rows reaches it.
A step is 8,192 rows, 100 → 256 → 256 → 47, 8 experts, k = 2, dropout 0.1: forward, losses, memory, backward, Adam. The
MLP is made of torch's own layers and has the width at which its flop are those of the RbM's chosen experts.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.report import Row, main, seconds
from benchmarks.steps import Memory, Step, batch_of, rbm_of, settings_of
from rbm_dist.moe.experts import StackedExperts
from rbm_dist.parallel.mesh import Mesh


def measure(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    budget_s = 1.5 if quick else 8.0
    rows = _compare(8, 3 * 1024, 128, budget_s) + _compare(64, 3 * 4096, 128, budget_s)
    return rows + [_step(routing, budget_s) for routing in ("layers", "input")]


def _compare(num_experts: int, routed: int, width: int, budget_s: float) -> list[Row]:
    experts = StackedExperts(torch.randn(num_experts, width, width), torch.randn(num_experts, width))
    weight = experts.weight_LDO
    # Skewed, as routing is: the load of expert e falls like 1 / (e + 1).
    share = 1 / (torch.arange(num_experts) + 1.0)
    counts = torch.bincount(torch.multinomial(share, routed, replacement=True), minlength=num_experts)
    x = torch.randn(routed, width, requires_grad=True)

    def loop() -> Tensor:
        groups = x.split(counts.tolist())
        return torch.cat([group @ weight[e] for e, group in enumerate(groups)])

    def cost(forward: Callable[[], Tensor]) -> float:
        def step() -> None:
            experts.zero_grad()
            x.grad = None
            forward().sum().backward()

        return seconds(step, budget_s)

    mine, peer, floor = (cost(forward) for forward in (lambda: experts(x, counts), loop, lambda: x @ weight[0]))
    gflops = 6 * routed * width * width / mine / 1e9
    name = f"{num_experts} experts, {routed:,} rows × {width}"
    return [
        Row(f"{name}: vs a loop", gflops, "GFLOP/s", peer / mine, 0.9),
        Row(f"{name}: share of one dense product", gflops, "GFLOP/s", floor / mine, 0.5),
    ]


def _step(routing: str, budget_s: float) -> Row:
    rows, widths, k = 8192, (100, 256, 256, 47), 2
    settings, mesh = settings_of(num_experts=8, top_k=k, routing=routing, dropout=0.1), Mesh.single()
    rbm = rbm_of(widths, 8, k, routing)
    batch, step, memory = (
        batch_of(rows, widths[0], widths[-1], mesh),
        Step(rbm, settings, mesh),
        Memory(rbm, settings, mesh),
    )
    x, soft = batch.x_BF, batch.soft_BC

    flop = k * sum(d * o for d, o in pairwise(widths))
    ends = widths[0] + widths[-1]
    wide = round((math.sqrt(ends**2 + 4 * flop) - ends) / 2)  # d·w + w² + w·o = flop
    layers: list[nn.Module] = []
    for d, o in pairwise((widths[0], wide, wide, widths[-1])):
        layers += [nn.Dropout(0.1), nn.Linear(d, o), nn.LayerNorm(o), nn.ReLU()]
    mlp = nn.Sequential(*layers[:-2])
    mlp_optimizer = torch.optim.Adam(mlp.parameters())

    def mlp_step() -> None:
        (F.kl_div(mlp(x).log_softmax(1), soft, reduction="sum") / rows).backward()
        mlp_optimizer.step()
        mlp_optimizer.zero_grad()

    mine, peer = seconds(lambda: memory(step(batch)), budget_s), seconds(mlp_step, budget_s)
    return Row(f"RbM step, routing by {routing}: vs an MLP of equal flop", mine * 1e3, "ms", peer / mine, 0.8)


if __name__ == "__main__":
    main("Stacked experts, forward and backward, float32, one thread", measure)
