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
# Layers, groups and indices: what the parameters hold of any kernel, and of those that take whole rows (LargeProblem
# and SmallProblem of csrc/cuda/problem.h).
MAX_LAYERS, MAX_GROUPS, MAX_INDICES = 256, 128, 8320
ROWS_MAX_LAYERS, ROWS_MAX_GROUPS, ROWS_MAX_INDICES = 48, 12, 160
FEW_ROWS = 2048  # up to here Triton's launches cost more than the generic kernel's rows


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
    groups = _groups(problem)
    if layers > MAX_LAYERS or len(groups) > MAX_GROUPS or sum(map(len, groups)) > MAX_INDICES:
        return f'it takes up to {MAX_LAYERS} layers, both sides together, got {layers}; use backend="reference"'
    return None


def measured_slow(problem: Problem) -> bool:
    """Its generic kernel takes several times as long as Triton's, but a single launch: few rows are quicker with it.
    Float64 was not measured."""
    few = _rows_read(problem) <= FEW_ROWS
    return not few and not has_kernel_for(problem) and problem.compute_dtype != torch.float64


def has_kernel_for(problem: Problem) -> bool:
    """Whether alp_matrix or alp_vector takes the problem, of more than FEW_ROWS rows: what plan_rows of
    csrc/cuda/alp_cuda.cu asks of it, but for the alignment of the tensors."""
    first, D = problem.student[0], problem.student[0].shape[-1]
    if first.dtype != problem.teacher[0].dtype or problem.normalize or problem.pooling == "mean":
        return False
    if torch.is_grad_enabled() and any(h.requires_grad for h in problem.teacher):
        return False
    groups = _groups(problem)
    layers, indices = len(problem.student) + len(problem.teacher), sum(map(len, groups))
    if not groups or layers > ROWS_MAX_LAYERS or len(groups) > ROWS_MAX_GROUPS or indices > ROWS_MAX_INDICES:
        return False
    active = sum(groups.values()), len(set().union(*groups))
    m, n = max(groups.values()), max(map(len, groups))  # of the largest groups
    if first.dtype == torch.float32:
        scratch = 12 * _up(m, 4) * _up(n, 4)  # vector_scratch, at most
        return D % 4 == 0 and _row_bytes(*active, 4 * D, 1, scratch) <= _shared_bytes(first.device)
    if first.dtype not in (torch.float16, torch.bfloat16) or D % 32 != 0 or len(groups) > 4 or m > 16 or n > 32:
        return False
    M, N = _up(m, 8), _up(n, 16)
    scratch = 4 * (2 * M + N) * (N + 4) + (4 * M * (2 * N + 4) if M > 8 else 0)  # matrix_scratch, of teams of one warp
    # Rows of which shared memory does not hold two are taken in parts, but not those of several groups.
    return len(groups) <= 1 or _row_bytes(*active, 2 * D, 2, scratch) <= _shared_bytes(first.device)


def _groups(problem: Problem) -> Counter[tuple[int, ...]]:
    """LayerMap of csrc/cuda/layer_map.h: sets of teacher layers, and how many student layers attend to each; without
    those of weight 0."""
    table = problem.layer_map or [tuple(range(len(problem.teacher)))] * len(problem.student)
    weights = problem.layer_weights or [1.0] * len(problem.student)
    return Counter(tuple(layers) for layers, weight in zip(table, weights, strict=True) if weight != 0)


def _row_bytes(ms: int, ns: int, layer: int, teams: int, scratch: int) -> int:
    """RowLayout of csrc/cuda/row_pipeline.cuh: the shared memory of teams of one warp that hold a row each."""
    before = _up(40 + 16 * teams * (2 * ms + 1) + 4 * ms, 128) + _up(40 * (ms + ns), 128) + teams * (4 * 24 + 8)
    return _up(before, 128) + teams * (_up(scratch, 128) + (ms + ns) * (layer + 16))


def _up(count: int, unit: int) -> int:
    return -(-count // unit) * unit


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
