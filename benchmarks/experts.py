"""Stacked experts, forward and backward: one grouped matrix product against a loop over experts, and against one dense
product of the same arithmetic (the floor).

    python -m benchmarks.experts [--quick] [--json FILE]

Floor: 6 · R · D · O flop for R routed rows (forward 2, backward 4); a single dense matmul of the same rows reaches it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.report import Row, main, seconds
from rbm_dist.moe.experts import StackedExperts


def measure(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    budget_s = 1.5 if quick else 8.0
    return _compare(8, 3 * 1024, 128, budget_s) + _compare(64, 3 * 4096, 128, budget_s)


def _compare(num_experts: int, routed: int, width: int, budget_s: float) -> list[Row]:
    experts = StackedExperts(torch.randn(num_experts, width, width), torch.randn(num_experts, width))
    weight, bias = experts.weight_LDO, experts.bias_LO
    # Skewed, as routing is: the load of expert e falls like 1 / (e + 1).
    share = 1 / (torch.arange(num_experts) + 1.0)
    counts = torch.bincount(torch.multinomial(share, routed, replacement=True), minlength=num_experts)
    x = torch.randn(routed, width, requires_grad=True)

    def loop() -> Tensor:
        groups = x.split(counts.tolist())
        return torch.cat([group @ weight[e] + bias[e] for e, group in enumerate(groups)])

    def cost(forward: Callable[[], Tensor]) -> float:
        def step() -> None:
            experts.zero_grad()
            x.grad = None
            forward().sum().backward()

        return seconds(step, budget_s)

    mine, peer, floor = (
        cost(forward) for forward in (lambda: experts(x, counts), loop, lambda: x @ weight[0] + bias[0])
    )
    gflops = 6 * routed * width * width / mine / 1e9
    name = f"{num_experts} experts, {routed:,} rows × {width}"
    return [
        Row(f"{name}: vs a loop", gflops, "GFLOP/s", peer / mine, 0.9),
        Row(f"{name}: share of one dense product", gflops, "GFLOP/s", floor / mine, 0.5),
    ]


if __name__ == "__main__":
    main("Stacked experts, forward and backward, float32, one thread", measure)
