"""The losses on logits, as sums over the labelled targets: the trainer divides by their global count."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

IGNORED = -100  # the label that transformers leaves out

OTHER_TASKS = (
    "For another task, such as multi-label classification or regression of several values, set ce_weight=0 and "
    "kd_weight=0 for the loss on hidden states alone, or write the loop of docs/usage.md with your own losses"
)


def target_mask(labels: Tensor) -> Tensor:
    """Which labels count; every value of a regression does."""
    return torch.ones_like(labels, dtype=torch.bool) if labels.is_floating_point() else labels != IGNORED


def check_labels(logits: Tensor, labels: Tensor, smoothing: float) -> None:
    """Refuse labels that the losses would take for those of another task."""
    regression = labels.is_floating_point()
    fits = labels.numel() == logits.numel() if regression else labels.shape == logits.shape[:-1]
    if not fits or regression != (logits.shape[-1] == 1):
        dtype = str(labels.dtype).removeprefix("torch.")
        raise ValueError(
            f"labels: got {dtype} {tuple(labels.shape)} for logits {tuple(logits.shape)}; allowed are an integer class "
            f"per row or token, or a float per row for a model of one output. {OTHER_TASKS}"
        )
    if regression and smoothing:
        raise ValueError(
            f"label_smoothing_factor: got {smoothing}, but floating-point labels are a regression; set it to 0"
        )


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
