"""Knowledge distillation (Hinton et al., 2015; GLNN, Zhang et al., 2022): soft labels, and true ones where known."""

import torch
import torch.nn.functional as F
from torch import Tensor


def soften(soft_BC: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of the teacher at a temperature: `log_softmax(log(p) / τ)`."""
    return F.log_softmax(soft_BC.clamp_min(torch.finfo(soft_BC.dtype).tiny).log() / temperature, dim=1)


def kd_loss(logits_BC: Tensor, soft_BC: Tensor, global_rows: int, temperature: float = 1.0) -> Tensor:
    """This rank's share of the mean over the global batch of `τ²·KL(teacher_i ‖ student_i)`.

    soft_BC: the teacher's probabilities. Both sides are softened as `log_softmax(logits / τ)`.
    """
    student_BC = F.log_softmax(logits_BC / temperature, dim=1)
    loss = F.kl_div(student_BC, soften(soft_BC, temperature), reduction="sum", log_target=True)
    return loss * (temperature**2 / global_rows)


def label_loss(logits_BC: Tensor, label_B: Tensor, global_labelled: Tensor) -> Tensor:
    """This rank's share of the mean NLL over the global batch's labelled rows; a label of -1 is none."""
    return F.cross_entropy(logits_BC, label_B, ignore_index=-1, reduction="sum") / global_labelled.clamp_min(1)
