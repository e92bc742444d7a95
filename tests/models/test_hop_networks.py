"""SGC, SIGN and SAGN against their formulas, written out with numpy."""

import numpy as np
import pytest
import torch

from rbm_dist.models.gnn import seeded
from rbm_dist.models.hop_networks import Sagn, Sgc, Sign

F, H, C, HOPS = 5, 8, 3, 2


def normalised(norm: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    state = {name: tensor.detach().numpy() for name, tensor in norm.state_dict().items()}
    if not state:
        return x
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    return x * state["weight"] + state["bias"]


def linear(layer: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    state = {name: tensor.detach().numpy() for name, tensor in layer.state_dict().items()}
    return x @ state["weight"].T + state.get("bias", 0.0)


@pytest.mark.parametrize("norm", ["none", "layer"])
@pytest.mark.parametrize("kind", [Sign, Sagn])
def test_formula(kind: type[Sign] | type[Sagn], norm: str) -> None:
    model = seeded(0, lambda: kind(F, H, C, HOPS, 0.5, norm)).double().eval()
    model.temperature.fill_(0.7)
    rows = np.random.default_rng(0).normal(size=(6, F * (HOPS + 1)))
    parts = []
    for hop, (branch, each) in enumerate(zip(model.branches, model.branch_norms, strict=True)):
        parts.append(np.maximum(normalised(each, linear(branch, rows[:, hop * F : (hop + 1) * F])), 0))
    if isinstance(model, Sagn):
        scores = np.stack([linear(model.attention, np.concatenate([parts[0], x], axis=1))[:, 0] for x in parts])
        exp = np.exp(np.where(scores > 0, scores, 0.2 * scores))
        weighed = sum(weight[:, None] * x for weight, x in zip(exp / exp.sum(0), parts, strict=True))
        joined = linear(model.joined, weighed + linear(model.residual, rows[:, :F]))
    else:
        joined = linear(model.joined, np.concatenate(parts, axis=1))
    hidden = np.maximum(normalised(model.norm, joined), 0)
    with torch.no_grad():
        found, states = model.forward_hidden(torch.from_numpy(rows))
    np.testing.assert_allclose(found, linear(model.classes, hidden) / 0.7, rtol=1e-9)
    np.testing.assert_allclose(states, hidden, rtol=1e-9)


def test_sgc_is_linear_in_the_last_hop() -> None:
    model = seeded(0, lambda: Sgc(F, C)).double()
    rows = np.random.default_rng(0).normal(size=(6, F * (HOPS + 1)))
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.from_numpy(rows)), linear(model.classes, rows[:, -F:]), rtol=1e-9)


@pytest.mark.parametrize("kind", [Sign, Sagn])
def test_dropout_belongs_to_the_node(kind: type[Sign] | type[Sagn]) -> None:
    model = seeded(0, lambda: kind(F, H, C, HOPS, 0.5))
    rows, keys = torch.randn(6, F * (HOPS + 1)), torch.arange(6)
    order = torch.tensor([3, 1, 5])
    with torch.no_grad():
        torch.testing.assert_close(model(rows, keys)[order], model(rows[order], keys[order]))
        assert not torch.allclose(model(rows, keys), model(rows, keys + 6))
