"""Answering with a student: frozen RbMs against the same by dispatch, and against an MLP of their hidden width.

    python -m benchmarks.serving [--quick] [--json FILE]

Two of them: E = 16, k = 1, routed once on the input, as by default; and E = 8, k = 3, routed in every layer, as
published. The MLP is the floor: experts take k times its arithmetic (2 · k · D · O flop per row), routing 2 · D · E.
Below lies the cost of calling about a dozen torch operations per layer, which at batch 1 is most of the time.
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
    students = {
        "16 experts, k = 1": mlp_to_rbm(mlp, [torch.randn(16, features)], top_k=1).eval(),
        "8 experts, k = 3": mlp_to_rbm(mlp, [torch.randn(8, features), torch.randn(8, hidden)], top_k=3).eval(),
    }
    rows = []
    with torch.inference_mode():
        for name, rbm in students.items():
            frozen, share = freeze(rbm), 0.3 if rbm.routed_layers[0].top_k == 1 else 0.1
            for batch in (1, 32, 1024):
                x = torch.randn(batch, features)
                models = (frozen, rbm, mlp)
                mine, by_dispatch, plain = (seconds(functools.partial(model, x), budget_s) for model in models)
                value, where = mine / batch * 1e6, f"{name}, batch {batch:,}"
                rows.append(Row(f"{where}: vs dispatch", value, "µs per node", by_dispatch / mine, 1.0))
                rows.append(Row(f"{where}: vs the MLP", value, "µs per node", plain / mine, share))
    return rows


if __name__ == "__main__":
    main("Serving RbMs, 64 → 128 → 10, one thread", measure)
