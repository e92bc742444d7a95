"""Answering with a student: the frozen RbM against the same RbM by dispatch, and against an MLP of its hidden width.

    python -m benchmarks.serving [--quick] [--json FILE]

Floor at batch 1: the weights are read once (E · D · O · 4 bytes); at batch 1,024: 2 · E · D · O flop per row for the
product over all experts. Below these lies the cost of calling about a dozen torch operations per layer.
"""

import functools

import torch

from benchmarks.report import Row, main, seconds
from rbm_dist.models.student import make_mlp, mlp_to_rbm
from rbm_dist.serve.frozen import freeze


def measure(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    budget_s = 0.8 if quick else 5.0
    features, hidden, classes = 64, 128, 10
    mlp = make_mlp(features, hidden, classes, num_layers=2, norm="layer", dropout=0.0, seed=0).eval()
    rbm = mlp_to_rbm(mlp, [torch.randn(8, features), torch.randn(8, hidden)], top_k=3).eval()
    frozen = freeze(rbm)
    rows = []
    with torch.inference_mode():
        for batch in (1, 32, 1024):
            x = torch.randn(batch, features)
            mine, by_dispatch, plain = (seconds(functools.partial(model, x), budget_s) for model in (frozen, rbm, mlp))
            value = mine / batch * 1e6
            rows.append(Row(f"batch {batch:,}: vs dispatch", value, "µs per node", by_dispatch / mine, 1.0))
            rows.append(Row(f"batch {batch:,}: vs the MLP", value, "µs per node", plain / mine, 0.1))
    return rows


if __name__ == "__main__":
    main("Serving an RbM of 8 experts, k = 3, 64 → 128 → 10, one thread", measure)
