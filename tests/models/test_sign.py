"""SIGN against its formula, written out with numpy."""

import numpy as np
import pytest
import torch

from rbm_dist.models.gnn import seeded
from rbm_dist.models.sign import Sign

F, H, C, HOPS = 5, 8, 3, 2


def normalised(norm: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    state = {name: tensor.detach().numpy() for name, tensor in norm.state_dict().items()}
    if not state:
        return x
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    return x * state["weight"] + state["bias"]


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_formula(norm: str) -> None:
    model = seeded(0, lambda: Sign(F, H, C, HOPS, 0.5, norm)).double().eval()
    model.temperature.fill_(0.7)
    rows = np.random.default_rng(0).normal(size=(6, F * (HOPS + 1)))
    parts = []
    for hop, (branch, each) in enumerate(zip(model.branches, model.branch_norms, strict=True)):
        x = rows[:, hop * F : (hop + 1) * F]
        parts.append(
            np.maximum(normalised(each, x @ branch.weight.detach().numpy().T + branch.bias.detach().numpy()), 0)
        )
    joined = np.concatenate(parts, axis=1) @ model.joined.weight.detach().numpy().T + model.joined.bias.detach().numpy()
    hidden = np.maximum(normalised(model.norm, joined), 0)
    logits = (hidden @ model.classes.weight.detach().numpy().T + model.classes.bias.detach().numpy()) / 0.7
    with torch.no_grad():
        found, states = model.forward_hidden(torch.from_numpy(rows))
    np.testing.assert_allclose(found, logits, rtol=1e-9)
    np.testing.assert_allclose(states, hidden, rtol=1e-9)


def test_dropout_belongs_to_the_node() -> None:
    model = seeded(0, lambda: Sign(F, H, C, HOPS, 0.5))
    rows, keys = torch.randn(6, F * (HOPS + 1)), torch.arange(6)
    order = torch.tensor([3, 1, 5])
    with torch.no_grad():
        torch.testing.assert_close(model(rows, keys)[order], model(rows[order], keys[order]))
        assert not torch.allclose(model(rows, keys), model(rows, keys + 6))
