"""The loss in plain PyTorch: the readable specification, right on any device and dtype.

Symbols as in the paper (Passban et al. 2021, arXiv 2012.14022): m student and n teacher layers, rows
of width D, attention a (alpha), combined teacher C, residual e = s - C. Autograd differentiates it,
twice if asked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import Problem

EPS = 1e-12  # normalize=True divides by max(norm, EPS)


def reference_loss(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss (), layer_losses (m,), attention (m, *rows, n) and entropy (m,) in nats."""
    arguments = problem.row_weights, problem.pooling, problem.compute_dtype
    student, weights = pool_layers(problem.student, *arguments)
    teacher = torch.stack(pool_layers(problem.teacher, *arguments)[0])  # (n, *rows, D)
    scale = problem.scale.to(teacher.dtype) if isinstance(problem.scale, Tensor) else problem.scale
    combined, attention = zip(*(_combine(problem, i, s, teacher, scale) for i, s in enumerate(student)), strict=True)
    total = weights.sum()
    N: Tensor | float = 1.0
    if problem.reduction == "mean":
        D = student[0].shape[-1]
        N = len(student) * D * (_or_one(total) if problem.normalizer is None else problem.normalizer)
    layer_losses = []
    for i, (s, C) in enumerate(zip(student, combined, strict=True)):
        omega = 1.0 if problem.layer_weights is None else problem.layer_weights[i]
        if omega == 0:  # not read: C is a sum of zeros
            layer_losses.append(C.sum())
            continue
        residual = unit(s) - unit(C) if problem.normalize else s - C
        layer_losses.append(omega * (weights * residual.square().sum(-1)).sum() / N)
    losses = torch.stack(layer_losses)
    return losses.sum(), losses.detach(), *masked_attention(torch.stack(attention), weights)


def _combine(
    problem: Problem, i: int, student: Tensor, teacher: Tensor, scale: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Student layer i's combined teacher layer (*rows, D) and its attention (*rows, n), detached."""
    n = len(teacher)
    attention = student.new_zeros(*student.shape[:-1], n)
    if problem.layer_weights is not None and problem.layer_weights[i] == 0:  # not read
        # 0, and a gradient of 0 for everything that may require one
        nothing = scale * (student[..., :0].sum() + teacher[..., :0].sum())
        return nothing.expand(student.shape), attention
    allowed = list(range(n)) if problem.layer_map is None else list(problem.layer_map[i])
    t = teacher[allowed]  # (n_i, *rows, D)
    scores = scale * torch.einsum("...d,j...d->...j", student, t)  # (*rows, n_i)
    a = torch.softmax(scores, dim=-1)
    if problem.detach_attention:
        a = a.detach()
    attention[..., allowed] = a.detach()
    return torch.einsum("...j,j...d->...d", a, t), attention


def masked_attention(attention: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The attention (m, *rows, n) with zeros in rows that do not count, and its mean entropy (m,) in nats."""
    attention = torch.where((weights != 0)[..., None], attention, 0.0)
    entropy = weights * torch.special.entr(attention).sum(-1)  # (m, *rows)
    return attention, entropy.reshape(len(attention), -1).sum(-1) / _or_one(weights.sum())


def _or_one(total: Tensor) -> Tensor:
    return torch.where(total > 0, total, 1.0)


def unit(x: Tensor) -> Tensor:
    """x / max(|x|, EPS); chosen before the root, whose second derivative at a row of zeros would be NaN."""
    square = x.square().sum(-1, keepdim=True)
    return x / torch.where(square > EPS**2, square, EPS**2).sqrt()


def pool_layers(
    layers: list[Tensor], row_weights: Tensor | None, pooling: str, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Pool every layer (*lead, D) to its rows; return them in ``dtype``, and the rows' weights.

    Rows of weight 0 are replaced by zeros, so that nothing they hold reaches a value or a gradient.
    """
    lead = layers[0].shape[:-1]
    # A negative weight (refused where values are checked) counts as 0; NaN stays NaN.
    weights = layers[0].new_ones(lead, dtype=dtype) if row_weights is None else row_weights.to(dtype).clamp_min(0)
    valid = weights != 0
    if pooling == "cls":
        layers, weights = [h[..., 0, :] for h in layers], weights[..., 0]
    elif pooling == "last":
        last = last_position(valid)[..., None, None]  # (..., 1, 1)
        layers = [h.take_along_dim(last, dim=-2).squeeze(-2) for h in layers]
        weights = valid.any(-1).to(dtype)
    elif pooling == "mean":
        total = weights.sum(-1)  # (...)
        share = weights / torch.where(total != 0, total, 1.0)[..., None]
        masked = [torch.where(valid[..., None], h.to(dtype), 0.0) for h in layers]
        layers, weights = [torch.einsum("...s,...sd->...d", share, h) for h in masked], (total != 0).to(dtype)
    if row_weights is None:
        return [h.to(dtype) for h in layers], weights
    counted = (weights != 0)[..., None]
    return [torch.where(counted, h.to(dtype), 0.0) for h in layers], weights


def last_position(counted: Tensor) -> Tensor:
    """The last True of each sequence (..., S): indices (...), 0 where there is none."""
    return torch.where(counted, torch.arange(counted.shape[-1], device=counted.device), 0).amax(-1)


def row_index(positions: Tensor) -> tuple[Tensor, ...]:
    """Index of the rows at the positions (...) of hidden states (..., S, D).

    It moves whole rows; gather and scatter_add move elements, which is many times slower on a CPU.
    """
    dims = positions.dim()
    leading = [
        torch.arange(size, device=positions.device).view(-1, *[1] * (dims - 1 - k))
        for k, size in enumerate(positions.shape)
    ]
    return (*leading, positions)
