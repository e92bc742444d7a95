"""Knowledge distillation (Hinton et al., 2015; GLNN, Zhang et al., 2022): soft labels, and true ones where known."""

import torch
import torch.nn.functional as F
from torch import Tensor


def kd_loss(
    logits_BC: Tensor,
    soft_BC: Tensor,
    label_B: Tensor,
    global_rows: int,
    global_labelled: int,
    temperature: float = 1.0,
    label_weight: float = 0.0,
) -> Tensor:
    """This rank's share of `λ·NLL(y_i) + (1 − λ)·τ²·KL(teacher_i ‖ student_i)`, each a mean over the global batch.

    soft_BC: the teacher's probabilities. label_B: true classes, -1 where unknown (no part in the NLL).
    Both sides are softened as `log_softmax(logits / τ)`.
    """
    teacher_BC = F.log_softmax(soft_BC.clamp_min(torch.finfo(soft_BC.dtype).tiny).log() / temperature, dim=1)
    student_BC = F.log_softmax(logits_BC / temperature, dim=1)
    loss = F.kl_div(student_BC, teacher_BC, reduction="sum", log_target=True) * (temperature**2 / global_rows)
    if label_weight == 0:
        return loss
    nll = F.cross_entropy(logits_BC, label_B, ignore_index=-1, reduction="sum") / max(global_labelled, 1)
    return label_weight * nll + (1 - label_weight) * loss
