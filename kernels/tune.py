"""Opt-in autotuning, ALPKD_FAST_AUTOTUNE=1: the first call of a shape times a few launch parameters; the fastest
is kept on disk, in Triton's cache. Not within CUDA graph capture: call once before it."""

from __future__ import annotations

from functools import cache
from typing import Any

import triton

from .alp import alp_kernel
from .heuristics import Config

TUNED = ("SPLIT", "WIDTH", "UNROLL")
# Names and numbers alone: Triton writes them to disk as JSON, which has no dtypes. It adds ACC, that of p_partials.
_KEY = [
    "m", "n", "D", "STUDENTS", "TEACHERS", "OPERAND_NAME", "PRECISION", "STUDENT_POINTERS", "TEACHER_POINTERS",
    "STUDENT_ALIGNMENT", "TEACHER_ALIGNMENT", "GRADIENT_ALIGNMENT", "STUDENT_GRADS", "TEACHER_GRADS", "SCALE_GRAD",
    "NORMALIZE", "DETACH", "DETAILS", "MAP",
]  # fmt: skip


def candidates(heuristic: Config, D: int) -> list[Config]:
    """The heuristic's choice and its neighbours."""
    configs = [heuristic]
    for split in (2, 4, 8):
        for width in (32, 64, 128):
            blocks = -(-D // (split * width))
            if split * width <= max(D, 64) and heuristic.split > 1:
                configs += [Config(split, width, split, unroll) for unroll in {1, min(blocks, 4)}]
    return list(dict.fromkeys(configs))


@cache
def tuned_kernel(heuristic: Config, D: int) -> Any:
    """alp_kernel behind Triton's autotuner. Every output is written, none is added to: it may run many times."""
    configs = [
        triton.Config(
            {"SPLIT": c.split, "WIDTH": c.width, "UNROLL": c.unroll}, num_warps=c.warps, maxnreg=c.max_registers or None
        )
        for c in candidates(heuristic, D)
    ]
    return triton.autotune(configs, key=_KEY, cache_results=True)(alp_kernel)
