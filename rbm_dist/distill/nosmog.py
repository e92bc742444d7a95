"""What NOSMOG adds to distillation (Tian et al., 2023): similarity of hidden states, and adversarial features.

Its third part, positional encodings, is an input of the student (`student.inputs`).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from rbm_dist.moe.collectives import Group, all_reduce_sum
from rbm_dist.randomness.rows import derive_keys, keyed_uniform


def similarity_loss(student_BH: Tensor, teacher_BT: Tensor, global_rows: int, group: Group) -> Tensor:
    """`mean over pairs of rows of (cos(s_i, s_j) − cos(t_i, t_j))²` over the global batch; the same on every rank.

    `‖S·Sᵀ − T·Tᵀ‖² = ‖Sᵀ·S‖² − 2‖Sᵀ·T‖² + ‖Tᵀ·T‖²`: products over rows, which ranks can add up.
    """
    s_BH, t_BT = F.normalize(student_BH, dim=1), F.normalize(teacher_BT, dim=1)
    products = [all_reduce_sum(a.T @ b, group).square().sum() for a, b in ((s_BH, s_BH), (s_BH, t_BT), (t_BT, t_BT))]
    return (products[0] - 2 * products[1] + products[2]) / global_rows**2


def adversarial_noise(
    loss_at: Callable[[Tensor], Tensor], x_BD: Tensor, key_B: Tensor, epsilon: float, steps: int
) -> Tensor:
    """Feature noise `[B, D]` within ±ε that raises the loss, by projected gradient ascent (Madry et al., 2018).

    Starts uniform, drawn per row; each step moves ε·2.5/steps along the gradient's sign.
    """
    noise_BD = (keyed_uniform(derive_keys(key_B, 3), x_BD.shape[1], x_BD.dtype) * 2 - 1) * epsilon
    for _ in range(steps):
        noise_BD.requires_grad_()
        (gradient_BD,) = torch.autograd.grad(loss_at(x_BD + noise_BD), noise_BD)
        noise_BD = (noise_BD.detach() + 2.5 * epsilon / steps * gradient_BD.sign()).clamp(-epsilon, epsilon)
    return noise_BD
