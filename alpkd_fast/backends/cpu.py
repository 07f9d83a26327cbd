"""The CPU backend: the fused C++ kernel of csrc/cpu."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..problem import Problem

NAME = "cpu"


def unavailable() -> str | None:
    return ops.binary_problem(NAME)


def cannot_run(problem: Problem) -> str | None:
    device = problem.student[0].device.type
    if device != "cpu":
        return f'it takes CPU tensors, the hidden states are on {device}; use backend="auto" or .to("cpu")'
    return None


def measured_slow(problem: Problem) -> bool:
    return False


def run(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, layer_losses, attention and entropy of the problem."""
    return ops.fused_loss("cpu", problem)
