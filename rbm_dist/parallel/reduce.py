"""Sums over ranks: gradients after a backward, and plain figures."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rbm_dist.moe.collectives import Group, summed
from rbm_dist.moe.experts import StackedExperts
from rbm_dist.parallel.mesh import Mesh


def sum_gradients(model: nn.Module, mesh: Mesh) -> None:
    """Sum gradients in place: an expert's over the ranks that hold it, all others over all ranks.

    Losses are this rank's share of a mean over the *global* batch, so a sum is the global gradient.
    """
    shared, experts = _parameters(model)
    _sum_flat(shared, mesh.world_group)
    _sum_flat(experts, mesh.replica_group)


def clip_gradients(model: nn.Module, mesh: Mesh, most: float) -> None:
    """Scale summed gradients so that their norm over all parameters, experts elsewhere included, is at most `most`."""
    shared, experts = _parameters(model)
    squares = [sum(_square(p) for p in each) + torch.zeros((), device=mesh.device) for each in (shared, experts)]
    if mesh.expert_group is not None:
        dist.all_reduce(squares[1], group=mesh.expert_group)
    factor = (most / (squares[0] + squares[1]).sqrt().clamp_min(1e-12)).clamp_max(1)
    for parameter in (*shared, *experts):
        if parameter.grad is not None:
            parameter.grad.mul_(factor)


def sum_figures(figures: list[float], mesh: Mesh) -> list[float]:
    """Sum some figures over all ranks, in float64."""
    if mesh.world_group is None:
        return figures
    dtype = torch.float64
    total = torch.tensor(figures, dtype=dtype, device=mesh.device)
    dist.all_reduce(total, group=mesh.world_group)
    return total.tolist()


def sum_tensor(here: Tensor, mesh: Mesh) -> Tensor:
    """Sum a tensor without a gradient over all ranks, where it is: nothing waits for a GPU."""
    total = here.detach().clone()
    if mesh.world_group is not None:
        summed(total, mesh.world_group)
    return total


def _parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Those that all ranks have, and those of the experts here."""
    expert_ids = {
        id(p) for module in model.modules() if isinstance(module, StackedExperts) for p in module.parameters()
    }
    parameters = list(model.parameters())
    return [p for p in parameters if id(p) not in expert_ids], [p for p in parameters if id(p) in expert_ids]


def _square(parameter: nn.Parameter) -> Tensor:
    return parameter.new_zeros(()) if parameter.grad is None else parameter.grad.square().sum()


def _sum_flat(parameters: list[nn.Parameter], group: Group) -> None:
    for parameter in parameters:
        if parameter.grad is None:  # no row of this rank reached it
            parameter.grad = torch.zeros_like(parameter)
    if group is None or not parameters:
        return
    flat: Tensor = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
    summed(flat, group)
    for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        assert parameter.grad is not None
        parameter.grad.copy_(total.view_as(parameter))
