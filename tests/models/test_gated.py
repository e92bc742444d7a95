"""The vanilla mixture of experts: its gate against the dense formula, its noise, its gradients, and its shards."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rbm_dist.models.student import GatedLayer, Student, make_mlp, make_moe
from rbm_dist.moe.experts import StackedExperts
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.reduce import sum_gradients
from rbm_dist.randomness.rows import derive_keys
from tests.gloo import run_ranks

E, D, P, OUT = 5, 6, 4, 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(top_k: int = 2, dropout: float = 0.0) -> GatedLayer:
    experts = StackedExperts(draw(E, D, OUT, seed=1), draw(E, OUT, seed=2))
    return GatedLayer(draw(D, P, seed=3), draw(E, P, seed=4), experts, top_k, dropout)


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_formula(top_k: int) -> None:
    gated, x = layer(top_k), draw(9, D, seed=5)
    gated.log_inverse_temperature.data.fill_(1.1)
    projection, gate = gated.projection_DP.detach().numpy(), gated.gate_EP.detach().numpy()
    weight, bias = gated.experts.weight_LDO.detach().numpy(), gated.experts.bias_LO.detach().numpy()
    out, trace = gated(x, None)
    for row, found in enumerate(out.detach().numpy()):
        projected = x[row].numpy() @ projection
        cosines = gate @ projected / np.linalg.norm(gate, axis=1) / np.linalg.norm(projected)
        share = np.exp(cosines * np.exp(1.1))
        share /= share.sum()  # over all experts: the chosen ones' shares do not sum to 1
        chosen = np.argsort(-cosines)[:top_k]
        assert trace.routing.experts_Bk[row].tolist() == chosen.tolist()
        np.testing.assert_allclose(found, sum(share[e] * (x[row].numpy() @ weight[e] + bias[e]) for e in chosen))
    before = gated(x, None)[0]
    assert torch.equal(out, before), "evaluation has no noise"


def test_noise_of_training() -> None:
    gated, x, keys = layer(top_k=E), draw(4000, D, seed=5), derive_keys(1, torch.arange(4000))

    def scores(key_B: Tensor | None) -> Tensor:
        routing = gated(x, key_B)[1].routing
        return torch.zeros(len(x), E, dtype=x.dtype).scatter(1, routing.experts_Bk, routing.cosines_Bk.detach())

    noise = (scores(keys) - scores(None)) * E
    assert noise.mean().item() == pytest.approx(0, abs=5 / noise.numel() ** 0.5)
    assert noise.std().item() == pytest.approx(1, abs=5 / (2 * noise.numel()) ** 0.5)
    out, some = gated(x, keys)[0], torch.tensor([7, 3, 999])
    torch.testing.assert_close(gated(x[some], keys[some])[0], out[some], msg="noise belongs to its row")
    assert not torch.allclose(gated(x, derive_keys(2, torch.arange(4000)))[0], out)


def test_gradients_reach_the_gate() -> None:
    gated, x = layer(), draw(7, D, seed=5)
    names = list(dict(gated.named_parameters()))
    assert {"projection_DP", "gate_EP", "log_inverse_temperature"} < set(names)

    def out(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(gated, dict(zip(names, parameters, strict=True)), (x, None))[0]

    assert torch.autograd.gradcheck(out, [p.detach().clone().requires_grad_() for p in gated.parameters()])
    gated(x, None)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in gated.parameters())


def test_seeded_weights_of_its_own() -> None:
    mlp = make_mlp(200, 8, 3, num_layers=2, norm="batch", dropout=0.0, seed=1)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = make_moe(mlp, E, 2, seed=3), make_moe(mlp, E, 2, seed=3)
    assert torch.rand(1) == expected, "the global generator is left alone"
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    experts = first.layers[0].experts.weight_LDO
    assert not torch.allclose(experts[0], experts[1]), "experts begin apart"
    assert first.layers[0].projection_DP.shape == (200, 128), "no wider than it needs to be"
    assert first.layers[1].projection_DP.shape == (8, 8)
    assert first.norms[0] is mlp.norms[0]


SHARES = [slice(0, 11), slice(11, 30)]


def moe(mesh: Mesh) -> Student:
    mlp = make_mlp(D, 8, OUT, num_layers=2, norm="layer", dropout=0.3, seed=1)
    return make_moe(mlp, E, 2, 7, [mesh.dispatcher(E) for _ in range(2)], mesh.local_experts(E)).double()


def step(mesh: Mesh, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
    student, keys = moe(mesh), derive_keys(1, torch.arange(30))
    out = student(draw(30, D, seed=5)[rows], keys[rows])[0]
    F.cross_entropy(out, torch.arange(30)[rows] % OUT, reduction="sum").backward()
    sum_gradients(student, mesh)
    return out.detach(), {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def sharded(rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    return step(Mesh.init(2, torch.device("cpu")), SHARES[rank])


def test_sharded_experts_are_the_local_ones() -> None:
    out, gradients = step(Mesh.single(), slice(0, 30))
    ranks = run_ranks(sharded, 2)
    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks]), out)
    for name, gradient in gradients.items():
        if "experts" in name:
            torch.testing.assert_close(torch.cat([rank[1][name] for rank in ranks]), gradient)
        else:
            for rank in ranks:
                torch.testing.assert_close(rank[1][name], gradient)
