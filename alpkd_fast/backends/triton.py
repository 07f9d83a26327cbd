"""The Triton backend: the kernels of alpkd_fast.kernels, on CUDA and ROCm devices."""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..problem import Problem

NAME = "triton"
OLDEST = (3, 6)


def unavailable() -> str | None:
    problem = _installation_problem()
    if problem is not None:
        return problem
    if not torch.cuda.is_available() and not _interpreted():
        return (
            "it needs a CUDA or ROCm device, and torch sees none; for tests on the CPU set TRITON_INTERPRET=1 before "
            "Python starts (slow)"
        )
    return None


def cannot_run(problem: Problem) -> str | None:
    device = problem.student[0].device.type
    if device != "cuda" and not (device == "cpu" and _interpreted()):
        return f'it takes CUDA tensors, the hidden states are on {device}; use backend="auto" or .to("cuda")'
    m, n = len(problem.student), len(problem.teacher)
    most_m, most_n = most_layers(_shared_bytes(problem.student[0].device))
    if m > most_m or n > most_n:
        return (
            f"it takes at most {most_m} student and {most_n} teacher layers on this device, got {m} and {n}; "
            'use backend="auto"'
        )
    return None


def most_layers(shared_bytes: int) -> tuple[int, int]:
    """Student and teacher layers that fit the registers and the shared memory of a program."""
    return (64, 128) if shared_bytes >= 200 * 1024 else (32, 64)


def measured_slow(problem: Problem) -> bool:
    return False


def run(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, layer_losses, attention and entropy of the problem."""
    return ops.fused_loss("triton", problem)


@cache
def _shared_bytes(device: torch.device) -> int:
    """Shared memory that a program can have; the interpreter, on the CPU, sets no limit."""
    if device.type == "cpu":
        return sys.maxsize
    # ROCm's properties lack the number; it is 64 KiB there.
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 64 * 1024))


@cache
def _installation_problem() -> str | None:
    """From the package's metadata alone: importing Triton takes too long for a question."""
    for name in ("triton", "pytorch-triton-rocm", "triton-rocm", "triton-windows"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
            return f"it needs Triton >= 3.6, found {found}; pip install --upgrade {name}"
        return None
    return "Triton is not installed; pip install triton"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


# Triton is imported, and the kernels with it, on the first call.
def _alp(*arguments: Any) -> Any:
    from ..kernels.launch import alp  # type: ignore[import-not-found]

    return alp(*arguments)


def _scale_gradients(*arguments: Any) -> None:
    from ..kernels.launch import scale_gradients

    scale_gradients(*arguments)


torch.library.impl("alpkd_fast::alp_triton", ("cpu", "cuda"), _alp)
torch.library.impl("alpkd_fast::scale_gradients_triton", ("cpu", "cuda"), _scale_gradients)
