"""The losses on logits, as sums over the labelled targets: the trainer divides by their global count."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

IGNORED = -100  # the label that transformers leaves out


def target_mask(labels: Tensor) -> Tensor:
    """Which labels count; every value of a regression does."""
    return torch.ones_like(labels, dtype=torch.bool) if labels.is_floating_point() else labels != IGNORED


def hard_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Sum of the cross-entropy, or of the squared error where the labels are floating-point.

    Args:
        logits: (T, classes), or (T, 1) for regression. labels: (T,) integers, -100 for none; or floats.
        smoothing: of the labels, for the cross-entropy.
    """
    if labels.is_floating_point():
        return F.mse_loss(logits.float().flatten(), labels.float().flatten(), reduction="sum")
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing)


def soft_loss(student: Tensor, teacher: Tensor, counted: Tensor, temperature: float) -> Tensor:
    """Sum of temperature² × KL(teacher ‖ student) of softened logits; the squared error for one output.

    Args:
        student, teacher: (T, classes) logits. counted: (T,) bool, targets that count.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, section 2.
    """
    if student.shape[-1] == 1:
        return F.mse_loss(student.float(), teacher.float(), reduction="sum")
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)  # (T,)
    return temperature**2 * torch.where(counted, divergence, 0.0).sum()
