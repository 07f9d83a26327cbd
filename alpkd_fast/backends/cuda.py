"""The CUDA backend: the fused C++ kernels of csrc/cuda for NVIDIA GPUs."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .. import ops
from ..problem import Problem
from .reference import check_values

NAME = "cuda"
MAX_LAYERS = 256  # LargeProblem of csrc/cuda/problem.h: what a kernel's parameters hold
MAX_GROUPS, MAX_INDICES = 128, 8320


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


def run(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, layer_losses, attention and entropy of the problem.

    Values on the device (row weights, scale, normalizer) are checked only with ALPKD_FAST_CHECK=1: that waits
    for the device.
    """
    if os.environ.get("ALPKD_FAST_CHECK") == "1" and not torch.compiler.is_compiling():
        tensors = (x if isinstance(x, Tensor) else None for x in (problem.scale, problem.normalizer))
        check_values(problem.row_weights, *tensors)
    return ops.fused_loss("cuda", problem)
