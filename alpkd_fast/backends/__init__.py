"""The registry of backends: which can run here, which one a call takes, and why another cannot."""

from __future__ import annotations

import os
import warnings
from typing import Protocol

from torch import Tensor

from ..problem import Problem
from . import cpu, cuda, reference, triton


class Backend(Protocol):
    """What a backend module provides (its functions have no self: a module stands in for the object)."""

    NAME: str

    def unavailable(self) -> str | None:
        """Why the backend cannot run on this machine at all, with the remedy; None where it can."""

    def cannot_run(self, problem: Problem) -> str | None:
        """Why the backend cannot run this problem, with the remedy; None where it can."""

    def measured_slow(self, problem: Problem) -> bool:
        """Whether a backend behind this one measured faster on such a problem, on a device where both run."""

    def run(self, problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return loss, layer_losses, attention and entropy of the problem."""


# In the order in which "auto" tries them. A new backend is one module and one entry here.
REGISTRY: dict[str, Backend] = {
    cpu.NAME: cpu,
    cuda.NAME: cuda,
    triton.NAME: triton,
    reference.NAME: reference,
}


def backends() -> dict[str, str | None]:
    """Return every backend's name with None where it is usable here, else the reason why it is not."""
    return {name: backend.unavailable() for name, backend in REGISTRY.items()}


def choose(name: str, problem: Problem) -> Backend:
    """Return the backend module for a call: the named one, or for "auto" the fastest that can run."""
    if name == "auto":
        name = os.environ.get("ALPKD_FAST_BACKEND", "auto")
    if name == "auto":
        return _fastest_usable(problem)
    if name not in REGISTRY:
        raise ValueError(f"backend: got {name!r}; known backends are auto, {', '.join(REGISTRY)}")
    reason = REGISTRY[name].unavailable() or REGISTRY[name].cannot_run(problem)
    if reason is not None:
        raise RuntimeError(f"backend={name!r} cannot run: {reason}")
    return REGISTRY[name]


_warned: set[str] = set()


def _fastest_usable(problem: Problem) -> Backend:
    reasons: list[str] = []
    slow: Backend | None = None
    for name, backend in REGISTRY.items():
        if name == reference.NAME and slow is not None:
            return slow
        reason = backend.unavailable() or backend.cannot_run(problem)
        if reason is not None:
            reasons.append(f"{name}: {reason}")
        elif backend.measured_slow(problem):
            slow = slow or backend
        else:
            if name == reference.NAME and reasons:
                _warn_once("alpkd_fast runs its slow reference backend: " + "; ".join(reasons))
            return backend
    raise AssertionError("the reference backend runs everything")


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=4)
