"""The optimiser's state is carried over to the experts: with one expert, training goes on as before."""

import torch
from torch import Tensor

from rbm_dist.models.student import Student, make_mlp, mlp_to_rbm
from rbm_dist.train.student import carry_over


def steps(model: Student, adam: torch.optim.Adam, x: Tensor, count: int) -> Student:
    for _ in range(count):
        adam.zero_grad()
        model(x)[0].square().mean().backward()
        adam.step()
    return model


def adam_of(model: Student) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=0.05, weight_decay=0.01)


def test_one_expert_goes_on_as_the_plain_network() -> None:
    mlp = make_mlp(6, 8, 3, num_layers=3, norm="layer", dropout=0.0, seed=1).double()
    x = torch.randn(20, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = adam_of(mlp)
    steps(mlp, plain, x, 5)
    memories = [torch.ones(1, width, dtype=torch.float64) for width in (6, 8, 8)]
    rbm = mlp_to_rbm(mlp, memories, top_k=1)
    rbm.norms = make_mlp(6, 8, 3, 3, "layer", 0.0, seed=1).double().norms  # its own, so that both can go on
    rbm.norms.load_state_dict(mlp.norms.state_dict())
    for layer in rbm.routed_layers:
        layer.log_scale.requires_grad_(False)  # the plain network has none
    routed = adam_of(rbm)
    carry_over(mlp, plain, rbm, routed)
    steps(mlp, plain, x, 5)
    steps(rbm, routed, x, 5)
    for dense, layer in zip(mlp.layers, rbm.routed_layers, strict=True):
        torch.testing.assert_close(layer.experts.weight_LDO[0], dense.linear.weight.T)
        torch.testing.assert_close(layer.experts.bias_LO[0], dense.linear.bias)


def test_experts_have_moments_of_their_own() -> None:
    mlp = make_mlp(6, 8, 3, num_layers=2, norm="none", dropout=0.0, seed=1)
    plain = adam_of(mlp)
    steps(mlp, plain, torch.randn(20, 6), 2)
    rbm = mlp_to_rbm(mlp, [torch.randn(4, width) for width in (6, 8)], top_k=2)
    routed = adam_of(rbm)
    carry_over(mlp, plain, rbm, routed)
    moments = routed.state[rbm.routed_layers[0].experts.weight_LDO]
    expected = plain.state[mlp.layers[0].linear.weight]
    assert torch.equal(moments["exp_avg"], expected["exp_avg"].T.expand(4, 6, 8))
    moments["exp_avg"][0] += 1
    assert torch.equal(moments["exp_avg"][1], expected["exp_avg"].T), "not one tensor seen four times"
    assert moments["step"] == expected["step"] == 2
    assert moments["step"] is not expected["step"]
