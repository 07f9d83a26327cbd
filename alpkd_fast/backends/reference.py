"""The reference backend: plain PyTorch on any device, differentiated by autograd, twice if asked."""

from __future__ import annotations

import torch
from torch import Tensor

from ..problem import Problem
from ..reference import reference_loss

NAME = "reference"


def unavailable() -> str | None:
    return None


def cannot_run(problem: Problem) -> str | None:
    return None


def measured_slow(problem: Problem) -> bool:
    return False


def run(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, layer_losses, attention and entropy of the problem."""
    check_problem(problem)
    with torch.autocast(problem.student[0].device.type, enabled=False):
        return reference_loss(problem)


def check_problem(problem: Problem) -> None:
    """``check_values`` where it costs no wait for a device and no break of a compiled graph."""
    if not torch.compiler.is_compiling() and problem.student[0].device.type == "cpu":
        tensors = (x if isinstance(x, Tensor) else None for x in (problem.scale, problem.normalizer))
        check_values(problem.row_weights, *tensors)


def check_values(weights: Tensor | None, scale: Tensor | None, normalizer: Tensor | None) -> None:
    """Raise ValueError for row weights, a scale or a normalizer whose values are not allowed."""
    if weights is not None and not bool(((weights >= 0) & (weights < torch.inf)).all()):
        bad = weights[~((weights >= 0) & (weights < torch.inf))][0].item()
        raise ValueError(mask_message(bad))
    if scale is not None and not 0 <= scale.item() < torch.inf:
        raise ValueError(f"scale must be finite and >= 0, got {scale.item()}; clamp it, or learn its logarithm")
    if normalizer is not None and not 0 < normalizer.item() < torch.inf:
        raise ValueError(
            f"normalizer must be finite and > 0, got {normalizer.item()}; pass the number of rows that "
            "count over all accumulation steps and ranks"
        )


def mask_message(bad: float) -> str:
    return (
        f"attention_mask holds {bad}, but weights must be finite and >= 0; an additive mask (0 for kept, -inf or a "
        "large negative number for masked tokens) becomes a weight with (mask == 0)"
    )
