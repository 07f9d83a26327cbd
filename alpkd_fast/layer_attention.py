"""Attention over the teacher's layers, row by row: u_i = sum_j softmax_j(scale <q_i, t_j>) t_j, and its gradients.

The teacher stays in its layers and its dtype. A block of rows of all layers is gathered where it is worked on, in the
forward and again in the backward, so that the loop reads it from the cache and nothing of the teacher's size is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .ops import forbid_second_derivative

BLOCK = 256  # rows gathered at a time on a CPU: 9 MB of 12 float32 layers of width 768


def layer_attention(
    queries: Sequence[Tensor],
    teacher: Sequence[Tensor],
    scale: float | Tensor,
    allowed: Tensor | None,
    counted: Tensor | None,
    detach_attention: bool,
) -> tuple[list[Tensor], Tensor]:
    """Return the m combinations u_i (R, D) and the attention (R, m, n), which is detached.

    queries: m tensors (R, D) in the compute dtype, zero where ``counted`` is False.
    teacher: n tensors (R, D) of any dtype; rows where ``counted`` (R,) is False are not read into any result.
    allowed: (m, n) bool, the layer map; None = all. What is not finite in a layer reaches only the layers that the
        map joins it with.
    detach_attention: no gradient through the attention; the scale's is 0.
    """
    if detach_attention:
        queries = [q.detach() for q in queries]
    if torch.compiler.is_compiling():  # which takes no tensor twice, but a layer may be given twice: aliases
        teacher = [t.view_as(t) for t in teacher]
    *combined, attention = _LayerAttention.apply(  # type: ignore[no-untyped-call]
        len(queries), allowed, counted, detach_attention, scale, *queries, *teacher
    )
    return combined, attention


class _LayerAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        m: int,
        allowed: Tensor | None,
        counted: Tensor | None,
        detach_attention: bool,
        scale: float | Tensor,
        *layers: Tensor,
    ) -> tuple[Tensor, ...]:
        queries, teacher = layers[:m], layers[m:]
        combined = [torch.empty_like(q) for q in queries]
        attention = queries[0].new_empty(len(queries[0]), m, len(teacher))
        for rows in _blocks(queries[0]):
            t = _gather(teacher, rows, attention.dtype, counted)  # (b, n, D)
            z = scale * torch.bmm(_gather(queries, rows, attention.dtype), t.mT)  # (b, m, n)
            if allowed is None:
                a = torch.softmax(z, -1)
            else:
                a, t = _masked_softmax(z, allowed), _finite(t)
            attention[rows] = a
            _scatter(torch.bmm(a, t), combined, rows)
        ctx.mark_non_differentiable(attention)
        ctx.m, ctx.detach_attention = m, detach_attention
        ctx.scale = None if isinstance(scale, Tensor) else scale
        ctx.save_for_backward(scale if isinstance(scale, Tensor) else None, allowed, counted, attention, *layers)
        return *combined, attention

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale, allowed, counted, attention, *layers = ctx.saved_tensors
        scale = ctx.scale if scale is None else scale
        queries, teacher = layers[: ctx.m], layers[ctx.m :]
        wants_scale, *wanted = ctx.needs_input_grad[4:]
        wants_queries, wants_teacher = any(wanted[: ctx.m]), any(wanted[ctx.m :])
        d_layers = [torch.empty_like(h) if wants else None for h, wants in zip(layers, wanted, strict=True)]
        d_scale = attention.new_zeros(()) if wants_scale else None
        for rows in _blocks(queries[0]):
            t, g = _gather(teacher, rows, attention.dtype, counted), _gather(grads[:-1], rows, attention.dtype)
            if allowed is not None:
                t, g = _finite(t), _finite(g)
            a = attention[rows]
            ap = a * torch.bmm(g, t.mT)
            dz = ap - a * ap.sum(-1, keepdim=True)  # (b, m, n), the gradient of the scores
            if allowed is not None:
                dz = dz.masked_fill(~allowed, 0.0)
            if wants_queries:
                _scatter(torch.bmm(scale * dz, t), d_layers[: ctx.m], rows)
            if wants_teacher:
                d_t = torch.bmm(a.mT, g)  # (b, n, D)
            if (wants_scale or wants_teacher) and not ctx.detach_attention:
                q = _gather(queries, rows, attention.dtype)
                if allowed is not None:
                    q = _finite(q)
                if d_scale is not None:
                    d_scale = d_scale + (dz * torch.bmm(q, t.mT)).sum()
                if wants_teacher:
                    d_t = d_t + torch.bmm(scale * dz.mT, q)
            if wants_teacher:
                _scatter(d_t, d_layers[ctx.m :], rows)
        gradients = [d for d in (d_scale, *d_layers) if d is not None]
        if torch.is_grad_enabled():  # create_graph=True
            gradients = forbid_second_derivative(gradients)
        remaining = iter(gradients)
        return None, None, None, None, *(next(remaining) if w else None for w in (wants_scale, *wanted))


def _blocks(q: Tensor) -> Iterator[slice]:
    """Blocks that stay in a cache on a CPU; elsewhere, and in a compiled graph (which would unroll the loop), one."""
    step = BLOCK if q.device.type == "cpu" and not torch.compiler.is_compiling() else max(1, len(q))
    for start in range(0, len(q), step):
        yield slice(start, start + step)


def _gather(layers: Sequence[Tensor], rows: slice, dtype: torch.dtype, counted: Tensor | None = None) -> Tensor:
    """(b, layers, D), with zeros in rows that do not count."""
    block = torch.stack([h[rows] for h in layers], 1).to(dtype)
    return block if counted is None else torch.where(counted[rows, None, None], block, 0.0)


def _masked_softmax(z: Tensor, allowed: Tensor) -> Tensor:
    """The attention (b, m, n) over the layers that the map allows: 0 elsewhere, NaN in a row whose scores are not all
    finite, as they are where a layer is not."""
    lost = (allowed & ~z.isfinite()).any(-1, keepdim=True)
    a = torch.softmax(z.masked_fill(~allowed, -torch.inf), -1)
    return torch.where(lost, torch.nan, a).masked_fill(~allowed, 0.0)


def _finite(block: Tensor) -> Tensor:
    """The block with zeros for what is not finite: 0 * NaN would carry it beyond the map. The attention, which is NaN
    for what such a layer may reach, tells of it."""
    return torch.where(block.isfinite(), block, 0.0)


def _scatter(block: Tensor, layers: Sequence[Tensor | None], rows: slice) -> None:
    for i, h in enumerate(layers):
        if h is not None:
            h[rows] = block[:, i]
