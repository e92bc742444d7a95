"""Students against their formulas; an RbM begins as the MLP it was."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rbm_dist.models.student import Ensemble, RoutedLayer, Student, make_mlp, mlp_to_rbm, rbm_to_mlp
from rbm_dist.moe.experts import StackedExperts
from rbm_dist.randomness.rows import derive_keys


def mlp(norm: str = "layer", dropout: float = 0.0) -> Student:
    return make_mlp(7, 16, 5, num_layers=3, norm=norm, dropout=dropout, seed=1)


def rbm(num_experts: int = 6, top_k: int = 2, memories: int = 3, **options: Any) -> Student:
    """An RbM whose experts have gone their own ways; with one memory, that of the input routes for all layers."""
    torch.manual_seed(0)
    widths = (7, 16, 16)[:memories]
    student = mlp_to_rbm(mlp(), [torch.randn(num_experts, width) for width in widths], top_k, **options)
    for parameter in student.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return student


def test_seeded_weights_leave_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = mlp(), mlp()
    assert torch.rand(1) == expected
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
@pytest.mark.parametrize("options", [{}, {"input_attention": True}, {"temperature": 0.2}])
def test_the_switch_to_routing_is_continuous(norm: str, options: dict[str, Any]) -> None:
    dense, x = mlp(norm).eval(), torch.randn(40, 7)
    routed = mlp_to_rbm(dense, [torch.randn(6, width) for width in (7, 16, 16)], 3, **options).eval()
    torch.testing.assert_close(routed(x)[0], dense(x)[0])
    assert [trace.x_BD.shape[1] for trace in routed(x)[1]] == [7, 16, 16]


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_a_routed_layer_is_its_formula(temperature: float) -> None:
    torch.manual_seed(0)
    experts = StackedExperts(torch.randn(5, 4, 3), torch.randn(5, 3))
    layer = RoutedLayer(torch.randn(5, 4), experts, top_k=2, dropout=0.0, temperature=temperature)
    layer.log_scale.data.fill_(0.7)
    x = torch.randn(9, 4)
    y, _ = layer(x, None)
    for row, found in zip(x, y, strict=True):
        cosines = F.cosine_similarity(row[None], layer.memory_ED)
        top = cosines.topk(2)
        a = (top.values / temperature).softmax(0)
        expected = sum(
            w * (row @ experts.weight_LDO[e] + experts.bias_LO[e]) for w, e in zip(a, top.indices, strict=True)
        )
        torch.testing.assert_close(found, math.exp(0.7) * expected)
    layer.log_scale.data.fill_(10.0)
    torch.testing.assert_close(layer(x, None)[0], y * 100 / math.exp(0.7), msg="the scale stops at 100")


def test_weights_of_experts_carry_no_gradient_to_the_input_of_a_lone_layer() -> None:
    student = rbm()
    layer = student.routed_layers[0]
    x = torch.randn(5, 7, requires_grad=True)
    layer(x, None)[0].sum().backward()
    cosines, experts = F.normalize(x) @ F.normalize(layer.memory_ED).T, layer.experts
    chosen = cosines.topk(2)
    a = chosen.values.softmax(1).detach()
    expected = torch.einsum("bk,bkd->bd", a, experts.weight_LDO[chosen.indices].sum(3)) * layer.scale
    torch.testing.assert_close(x.grad, expected)


def test_one_memory_routes_all_layers() -> None:
    student, x = rbm(5, 2, memories=1).eval(), torch.randn(9, 7)
    found, traces = student(x)
    [trace] = traces
    cosines_BE = F.normalize(x) @ F.normalize(student.memories[0]).T
    top = cosines_BE.topk(2)
    torch.testing.assert_close(trace.routing.experts_Bk, top.indices)
    weights_Bk, hidden_BD = top.values.softmax(1), x
    for index, layer in enumerate(student.routed_layers):
        if index:
            hidden_BD = F.relu(student.norms[index - 1](hidden_BD))
        weight_BkDO, bias_BkO = layer.experts.weight_LDO[top.indices], layer.experts.bias_LO[top.indices]
        outputs_BkO = torch.einsum("bd,bkdo->bko", hidden_BD, weight_BkDO) + bias_BkO
        hidden_BD = layer.scale * (weights_Bk[:, :, None] * outputs_BkO).sum(1)
    torch.testing.assert_close(found, hidden_BD)


@pytest.mark.parametrize("memories", [1, 3])
@pytest.mark.parametrize("options", [{}, {"input_attention": True}])
def test_averaged_experts_make_an_mlp(memories: int, options: dict[str, Any]) -> None:
    student, x = rbm(memories=memories, **options).eval(), torch.randn(9, 7)
    dense, hidden_BD = rbm_to_mlp(student).eval(), x
    for index, layer in enumerate(student.routed_layers):
        if index:
            hidden_BD = F.relu(student.norms[index - 1](hidden_BD))
        attention = layer.experts.log_attention_LD
        weight_EDO = layer.experts.weight_LDO * (1 if attention is None else attention.exp()[:, :, None])
        hidden_BD = layer.scale * (hidden_BD @ weight_EDO.mean(0) + layer.experts.bias_LO.mean(0))
    torch.testing.assert_close(dense(x)[0], hidden_BD)
    assert not torch.allclose(dense(x)[0], student(x)[0]), "its experts differ"
    for layer in student.routed_layers:
        for parameter in layer.experts.parameters():
            parameter.data.copy_(parameter.data[:1].expand_as(parameter))
    torch.testing.assert_close(rbm_to_mlp(student).eval()(x)[0], student(x)[0], msg="nothing is lost of copies")


def test_dropout_belongs_to_rows_and_experts() -> None:
    student = mlp_to_rbm(mlp(dropout=0.5), [torch.randn(6, width) for width in (7, 16, 16)], 2)
    x, keys = torch.randn(30, 7), derive_keys(1, torch.arange(30))
    whole = student(x, keys)[0]
    torch.testing.assert_close(student(x[10:20], keys[10:20])[0], whole[10:20])
    assert not torch.allclose(student(x, None)[0], whole)


def test_layer_inputs() -> None:
    student, x = mlp().eval(), torch.randn(8, 7)
    inputs = student.layer_inputs(x)
    assert inputs[0] is x
    torch.testing.assert_close(student.layers[-1](inputs[-1], None)[0], student(x)[0])


def test_hidden_states_are_the_input_of_the_last_layer() -> None:
    student, x, keys = mlp(dropout=0.3), torch.randn(8, 7), derive_keys(1, torch.arange(8))
    logits, hidden, _ = student.forward_hidden(x, keys)
    torch.testing.assert_close(logits, student(x, keys)[0])
    last = derive_keys(keys, len(student.layers) - 1)
    torch.testing.assert_close(student.layers[-1](hidden, last)[0], logits)


def test_an_ensemble_is_the_mean_of_its_members_probabilities() -> None:
    members = [make_mlp(7, 16, 5, num_layers=2, norm="layer", dropout=0.0, seed=seed) for seed in range(3)]
    for number, member in enumerate(members):
        for parameter in member.parameters():
            parameter.data *= number + 1
    x = torch.randn(20, 7)
    logits, traces = Ensemble(members)(x)
    expected = sum(member(x)[0].softmax(1) for member in members) / 3
    torch.testing.assert_close(logits.softmax(1), expected)
    torch.testing.assert_close(logits.exp(), expected, msg="its logits are log-probabilities")
    assert traces == []
