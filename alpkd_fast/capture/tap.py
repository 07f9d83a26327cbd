"""The tap: pooled rows for the loss, taken beside the hidden state that flows on.

Plain autograd makes a dense zero gradient of shape (B, S, D) for each h[:, 0] and adds it to the gradient
from above. The tap adds the rows' gradient straight into the latter: in place where nobody else can see
that tensor, else into a copy.
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reference import row_index


@dataclass(frozen=True, slots=True)
class Pooling:
    """How hidden states (..., S, D) of one forward become rows (..., D).

    kind "cls" takes position 0, "last" the positions (...) in ``where``, "mean" the sum weighted by the
    shares (..., S) in ``where``.
    """

    kind: str
    where: Tensor | None = None

    def on(self, device: torch.device) -> Pooling:
        """The same pooling for hidden states on the device."""
        if self.where is None or self.where.device == device:
            return self
        return Pooling(self.kind, self.where.to(device))

    def rows(self, h: Tensor) -> Tensor:
        """Return new rows (..., D): of h's dtype, or of the shares' (at least float32) for "mean"."""
        if self.kind == "cls":
            return h.select(-2, 0).clone()
        assert self.where is not None
        if self.kind == "last":
            return h[row_index(self.where)]
        # A token of weight 0 is not read: 0 * NaN would be NaN.
        counted = torch.where((self.where != 0)[..., None], h, 0.0).to(self.where.dtype)
        with torch.autocast(h.device.type, enabled=False):
            return torch.matmul(self.where[..., None, :], counted).squeeze(-2)

    def add_gradient(self, dense: Tensor, grad: Tensor) -> Tensor:
        """Add the gradient (..., D) of the rows into ``dense`` (..., S, D), in place."""
        if self.kind == "cls":
            dense.select(-2, 0).add_(grad)
            return dense
        assert self.where is not None
        if self.kind == "last":
            dense[row_index(self.where)] += grad
            return dense
        return dense.add_(self.where[..., None] * grad[..., None, :])


def tap(h: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor]:
    """Return h (..., S, D), to be used in its place, and its pooled rows (..., D)."""
    return _Tap.apply(h, pooling)  # type: ignore[no-untyped-call, no-any-return]


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, pooling: Pooling) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        # ``where`` is no saved tensor: so a checkpoint's recomputation can do without the tap.
        ctx.pooling, ctx.shape, ctx.dtype = pooling, h.shape, h.dtype
        return h.detach(), pooling.rows(h)

    @staticmethod
    def backward(ctx: Any, grad_flow: Tensor | None, grad_rows: Tensor | None) -> Any:
        if grad_rows is None:
            return grad_flow, None
        if grad_flow is None:
            dense = grad_rows.new_zeros(ctx.shape, dtype=ctx.dtype)  # nothing comes from above
        elif (
            not torch.compiler.is_compiling()
            and _is_dense(grad_flow)
            and _counts(grad_flow, sys.getrefcount(grad_flow)) in sole_owner_counts()
        ):
            dense = grad_flow
        else:
            dense = grad_flow.clone(memory_format=torch.contiguous_format)
        return ctx.pooling.add_gradient(dense, grad_rows), None


def _is_dense(grad: Tensor) -> bool:
    return type(grad) is Tensor and grad.is_contiguous() and not torch.is_grad_enabled()


def _counts(grad: Tensor, references: int) -> tuple[int, ...]:
    """C++ and Python holders of the gradient, of the tensor it is a view of, and of their storage.

    The caller counts the ``references`` to the gradient: how many a call of this function adds depends on whether
    Python runs it inline, which it does not while a compiled function runs.
    """
    base, storage = grad._base, grad.untyped_storage()
    return (
        grad._use_count(),  # type: ignore[attr-defined]
        references,
        0 if base is None else base._use_count(),  # type: ignore[attr-defined]
        sys.getrefcount(base) if base is not None else 0,
        torch._C._storage_Use_Count(storage._cdata),
        sys.getrefcount(storage),
    )


class _Probe(torch.autograd.Function):
    """Counts as _Tap.backward does, from a frame of the same shape."""

    seen: list[tuple[int, ...]]

    @staticmethod
    def forward(ctx: Any, h: Tensor, pooling: None) -> tuple[Tensor, Tensor]:
        return h.detach(), h.sum()

    @staticmethod
    def backward(ctx: Any, grad_flow: Tensor, grad_rows: Tensor) -> Any:
        _Probe.seen.append(_counts(grad_flow, sys.getrefcount(grad_flow)))
        return grad_flow, None


@functools.cache
def sole_owner_counts() -> frozenset[tuple[int, ...]]:
    """The counts that prove that the engine's backward call is a gradient's only holder.

    They depend on the versions of torch and Python, so they are counted on gradients whose holders are
    known: a fresh one and a view of a fresh one. A second holder raises one of the counts. The result is
    empty, and the tap always copies, where the counts cannot be had or do not tell the two cases apart.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
            sole = {_count_once(shared=False, view=view) for view in (False, True)}
            shared = {_count_once(shared=True, view=view) for view in (False, True)}
    except (AttributeError, RuntimeError):
        return frozenset()
    return frozenset(sole) if sole.isdisjoint(shared) else frozenset()


def _count_once(shared: bool, view: bool) -> tuple[int, ...]:
    _Probe.seen = []
    h = torch.ones(2, 2, requires_grad=True)
    flow, rows = _Probe.apply(h * 1.0, None)  # type: ignore[no-untyped-call]
    held: list[Tensor] = []
    flow = flow.view(4) if view else flow
    if shared:
        flow.register_hook(held.append)
    ((flow * torch.full_like(flow, 2.0)).sum() + rows).backward()
    return _Probe.seen[0]


sole_owner_counts()  # now: in a forward, a checkpoint or a compiler would take these small graphs for the model's
