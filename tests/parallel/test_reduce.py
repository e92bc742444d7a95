"""Clipping gradients, against torch's on one process, with experts on one rank and on two."""

import pytest
import torch

from rbm_dist.models.student import Student, make_mlp, mlp_to_rbm
from rbm_dist.parallel.mesh import Mesh
from rbm_dist.parallel.reduce import clip_gradients
from tests.gloo import run_ranks

EXPERTS = 4


def model(local: range) -> Student:
    """An RbM with some of its experts, and gradients that are the same wherever they are."""
    rbm = mlp_to_rbm(make_mlp(5, 6, 3, 2, "layer", 0.0, 0), [torch.eye(EXPERTS, 5)], 2, num_local=len(local))
    for index, parameter in enumerate(rbm.parameters()):
        whole = parameter.shape if len(parameter.shape) < 2 else (EXPERTS, *parameter.shape[1:])
        rng = torch.Generator().manual_seed(index)
        gradient = torch.randn(whole, generator=rng)
        parameter.grad = gradient if len(parameter.shape) < 2 else gradient[local.start : local.stop].clone()
    return rbm


def clipped(rank: int, most: float) -> list[torch.Tensor]:
    mesh = Mesh.init(2, torch.device("cpu"))
    student = model(mesh.local_experts(EXPERTS))
    clip_gradients(student, mesh, most)
    return [parameter.grad for parameter in student.parameters()]


@pytest.mark.parametrize("most", [0.7, 1e6])
def test_as_torch_does(most: float) -> None:
    found, expected = model(range(EXPERTS)), model(range(EXPERTS))
    clip_gradients(found, Mesh.single(), most)
    torch.nn.utils.clip_grad_norm_(expected.parameters(), most)
    for each, reference in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(each.grad, reference.grad)
    shares = run_ranks(clipped, 2, most)
    for index, reference in enumerate(expected.parameters()):
        here = [share[index] for share in shares]
        whole = here[0] if len(reference.shape) < 2 else torch.cat(here)
        torch.testing.assert_close(whole, reference.grad)
