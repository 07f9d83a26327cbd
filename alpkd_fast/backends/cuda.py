"""The CUDA backend: the fused C++ kernels of csrc/cuda for NVIDIA GPUs."""

from __future__ import annotations

import math
import os
from collections import Counter
from functools import cache

import torch
from torch import Tensor

from .. import ops
from ..problem import Problem
from .reference import check_values

NAME = "cuda"
MAX_LAYERS = 256  # LargeProblem of csrc/cuda/problem.h: what a kernel's parameters hold
MAX_GROUPS, MAX_INDICES = 128, 8320
FEW_ROWS = 2048  # up to here Triton's launches cost more than the generic kernel's rows
OTHER_SHARED_BYTES = 8 << 10  # of shared memory, beside a row


def unavailable() -> str | None:
    reason = ops.binary_problem("cuda")
    if reason is not None:
        return reason
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "PyTorch sees no NVIDIA GPU here; check nvidia-smi, and install a CUDA build of PyTorch"
    return None


def cannot_run(problem: Problem) -> str | None:
    device = problem.student[0].device
    if device.type != "cuda":
        return f'it takes CUDA tensors, the hidden states are on {device}; use backend="auto" or .to("cuda")'
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f'it needs compute capability 8.0, {torch.cuda.get_device_name(device)} has less; use backend="triton"'
    layers = len(problem.student) + len(problem.teacher)
    groups = {tuple(g) for g in problem.layer_map or ()}
    if layers > MAX_LAYERS or len(groups) > MAX_GROUPS or sum(map(len, groups)) > MAX_INDICES:
        return f'it takes up to {MAX_LAYERS} layers, both sides together, got {layers}; use backend="reference"'
    return None


def measured_slow(problem: Problem) -> bool:
    """Its generic kernel takes several times as long as Triton's, but a single launch: few rows are quicker with it.
    Float64 was not measured."""
    few = _rows_read(problem) <= FEW_ROWS
    return not few and not has_kernel_for(problem) and problem.compute_dtype != torch.float64


def has_kernel_for(problem: Problem) -> bool:
    """Whether alp_matrix or alp_vector takes the problem: what plan_rows of csrc/cuda/alp_cuda.cu asks of it, but for
    the alignment of the tensors."""
    first, D = problem.student[0], problem.student[0].shape[-1]
    if first.dtype != problem.teacher[0].dtype or problem.normalize or problem.pooling == "mean":
        return False
    if torch.is_grad_enabled() and any(h.requires_grad for h in problem.teacher):
        return False
    if first.dtype == torch.float32:
        row = (len(problem.student) + len(problem.teacher)) * (4 * D + 16)
        return D % 4 == 0 and row <= _shared_bytes(first.device) - OTHER_SHARED_BYTES
    table = problem.layer_map or [range(len(problem.teacher))] * len(problem.student)
    groups = Counter(map(tuple, table))
    return (
        first.dtype in (torch.float16, torch.bfloat16)
        and D % 32 == 0
        and len(groups) <= 4
        and max(groups.values()) <= 16
        and max(map(len, groups)) <= 32
    )


def _rows_read(problem: Problem) -> int:
    """Of one layer: those of all tokens, or of one token to a sequence."""
    lead = problem.student[0].shape[:-1]
    return math.prod(lead if problem.pooling in ("token", "mean") else lead[:-1])


@cache
def _shared_bytes(device: torch.device) -> int:
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin"))  # noqa: B009


def run(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, layer_losses, attention and entropy of the problem.

    Values on the device (row weights, scale, normalizer) are checked only with ALPKD_FAST_CHECK=1: that waits
    for the device.
    """
    if os.environ.get("ALPKD_FAST_CHECK") == "1" and not torch.compiler.is_compiling():
        tensors = (x if isinstance(x, Tensor) else None for x in (problem.scale, problem.normalizer))
        check_values(problem.row_weights, *tensors)
    return ops.fused_loss("cuda", problem)
