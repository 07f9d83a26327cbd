"""Attention over the teacher's layers, row by row: u_i = sum_j softmax_j(scale <q_i, t_j>) t_j, and its gradients.

The CPU backend has operators for it (``layer_attention_cpu.py``); beside the others it runs in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import layer_attention_cpu
from .layer_maps import LayerTable, allowed_on_device
from .ops import forbid_second_derivative, is_batched


def layer_attention(
    queries: Sequence[Tensor],
    teacher: Sequence[Tensor],
    counted: Tensor | None,
    table: LayerTable | None,
    scale: float | Tensor,
    detach_attention: bool,
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    """Return the m combinations u_i (R, D) and the attention (m, R, n), which is detached.

    queries: m tensors (R, D) in the compute dtype, zero where ``counted`` is False.
    teacher: n tensors (R, D) of any dtype; rows where ``counted`` (R,) is False are not read into any result.
    table: the layer map; None = all. What is not finite in a layer reaches only the layers that it joins it with.
    detach_attention: no gradient through the attention; the scale's is 0.
    """
    if detach_attention:
        queries = [q.detach() for q in queries]
    if torch.compiler.is_compiling():  # which takes no tensor twice, but a layer may be given twice: aliases
        teacher = [t.view_as(t) for t in teacher]
    *combined, attention = _LayerAttention.apply(  # type: ignore[no-untyped-call]
        backend == "cpu", len(queries), counted, table, detach_attention, scale, *queries, *teacher
    )
    return combined, attention


class _LayerAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        has_operators: bool,
        m: int,
        counted: Tensor | None,
        table: LayerTable | None,
        detach_attention: bool,
        scale: float | Tensor,
        *layers: Tensor,
    ) -> tuple[Tensor, ...]:
        attend = layer_attention_cpu.attend if has_operators else _attend
        combined, attention = attend(layers[:m], layers[m:], counted, table, scale)
        ctx.mark_non_differentiable(attention)
        ctx.has_operators, ctx.m, ctx.table, ctx.detach_attention = has_operators, m, table, detach_attention
        ctx.scale = None if isinstance(scale, Tensor) else scale
        ctx.save_for_backward(scale if isinstance(scale, Tensor) else None, counted, attention, *layers)
        return *combined, attention

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale, counted, attention = ctx.saved_tensors[:3]
        layers = ctx.saved_tensors[3:]
        wants_scale, *wanted = ctx.needs_input_grad[5:]
        in_operator = ctx.has_operators and (torch.compiler.is_compiling() or not any(map(is_batched, grads)))
        attend_back = layer_attention_cpu.attend_back if in_operator else _attend_back
        d_queries, d_teacher, d_scale = attend_back(
            grads[:-1], layers[: ctx.m], layers[ctx.m :], attention, counted, ctx.table,
            ctx.scale if scale is None else scale, ctx.detach_attention, wanted[: ctx.m], wanted[ctx.m :], wants_scale,
        )  # fmt: skip
        gradients = [*([d_scale] if wants_scale else []), *d_queries, *d_teacher]
        if torch.is_grad_enabled():  # create_graph=True
            gradients = forbid_second_derivative(gradients)
        remaining = iter(gradients)
        return None, None, None, None, None, *(next(remaining) if w else None for w in (wants_scale, *wanted))


def _attend(
    queries: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    counted: Tensor | None,
    table: LayerTable | None,
    scale: float | Tensor,
) -> tuple[list[Tensor], Tensor]:
    t = _stack(teacher, queries[0].dtype, counted)  # (R, n, D)
    z = scale * torch.bmm(torch.stack(queries, 1), t.mT)  # (R, m, n)
    if table is None:
        a = torch.softmax(z, -1)
    else:
        a, t = _masked_softmax(z, allowed_on_device(table, len(teacher), z.device)), _finite(t)
    return list(torch.bmm(a, t).unbind(1)), a.transpose(0, 1)


def _attend_back(
    grads: tuple[Tensor, ...],
    queries: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    attention: Tensor,
    counted: Tensor | None,
    table: LayerTable | None,
    scale: float | Tensor,
    detach_attention: bool,
    query_grad: Sequence[bool],
    teacher_grad: Sequence[bool],
    scale_grad: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """The gradients that are wanted, and the scale's, from those of the combinations."""
    t, g = _stack(teacher, attention.dtype, counted), torch.stack(grads, 1)  # (R, n, D), (R, m, D)
    if table is not None:
        t, g = _finite(t), _finite(g)
    a = attention.transpose(0, 1)  # (R, m, n)
    ap = a * torch.bmm(g, t.mT)
    dz = ap - a * ap.sum(-1, keepdim=True)  # the gradient of the scores
    if table is not None:
        dz = dz.masked_fill(~allowed_on_device(table, len(teacher), dz.device), 0.0)
    d_queries = torch.bmm(scale * dz, t) if any(query_grad) else None  # (R, m, D)
    d_teacher = torch.bmm(a.mT, g) if any(teacher_grad) else None  # (R, n, D)
    d_scale = attention.new_zeros(())
    if (scale_grad or d_teacher is not None) and not detach_attention:
        q = torch.stack(queries, 1)
        if table is not None:
            q = _finite(q)
        if scale_grad:
            d_scale = (dz * torch.bmm(q, t.mT)).sum()
        if d_teacher is not None:
            d_teacher = d_teacher + torch.bmm(scale * dz.mT, q)
    return _wanted(d_queries, queries, query_grad), _wanted(d_teacher, teacher, teacher_grad), d_scale


def _stack(layers: tuple[Tensor, ...], dtype: torch.dtype, counted: Tensor | None) -> Tensor:
    """(R, layers, D), with zeros in rows that do not count."""
    block = torch.stack(layers, 1).to(dtype)
    return block if counted is None else torch.where(counted[:, None, None], block, 0.0)


def _masked_softmax(z: Tensor, allowed: Tensor) -> Tensor:
    """The attention (R, m, n) over the layers that the map allows: 0 elsewhere, NaN in a row whose scores are not all
    finite, as they are where a layer is not."""
    lost = (allowed & ~z.isfinite()).any(-1, keepdim=True)
    a = torch.softmax(z.masked_fill(~allowed, -torch.inf), -1)
    return torch.where(lost, torch.nan, a).masked_fill(~allowed, 0.0)


def _finite(block: Tensor) -> Tensor:
    """The block with zeros for what is not finite: 0 * NaN would carry it beyond the map. The attention, which is NaN
    for what such a layer may reach, tells of it."""
    return torch.where(block.isfinite(), block, 0.0)


def _wanted(gradients: Tensor | None, layers: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    """Those of the gradients (R, layers, D) that are wanted, in their layers' dtype."""
    if gradients is None:
        return []
    return [g.to(h.dtype) for g, h, w in zip(gradients.unbind(1), layers, wanted, strict=True) if w]
