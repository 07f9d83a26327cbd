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
    student, weights = pool_layers(problem.student, problem.row_weights, problem.pooling, problem.compute_dtype)
    teacher, _ = pool_layers(problem.teacher, problem.row_weights, problem.pooling, problem.compute_dtype)
    m, n, D = len(student), len(teacher), student.shape[-1]
    scale = problem.scale.to(student.dtype) if isinstance(problem.scale, Tensor) else problem.scale
    total = weights.sum()
    safe_total = torch.where(total > 0, total, 1.0)
    N: Tensor | float = 1.0
    if problem.reduction == "mean":
        N = m * D * (safe_total if problem.normalizer is None else problem.normalizer)

    attention = student.new_zeros(m, *weights.shape, n)
    layer_losses, entropy = [], []
    for i in range(m):
        omega = 1.0 if problem.layer_weights is None else problem.layer_weights[i]
        if omega == 0:  # a layer of weight 0 is not read
            # 0, and a gradient of 0 for everything that may require one
            layer_losses.append(scale * (student[i, ..., :0].sum() + teacher[..., :0].sum()))
            entropy.append(total.new_zeros(()))
            continue
        allowed = list(range(n)) if problem.layer_map is None else list(problem.layer_map[i])
        s, t = student[i], teacher[allowed]  # (*rows, D), (n_i, *rows, D)
        scores = scale * torch.einsum("...d,j...d->...j", s, t)  # (*rows, n_i)
        a = torch.softmax(scores, dim=-1)
        if problem.detach_attention:
            a = a.detach()
        combined = torch.einsum("...j,j...d->...d", a, t)  # (*rows, D)
        residual = unit(s) - unit(combined) if problem.normalize else s - combined
        layer_losses.append(omega * (weights * residual.square().sum(-1)).sum() / N)
        a = torch.where((weights != 0)[..., None], a.detach(), 0.0)
        attention[i, ..., allowed] = a
        entropy.append((weights * torch.special.entr(a).sum(-1)).sum() / safe_total)
    losses = torch.stack(layer_losses)
    return losses.sum(), losses.detach(), attention, torch.stack(entropy)


def unit(x: Tensor) -> Tensor:
    """x / max(|x|, EPS); chosen before the root, whose second derivative at a row of zeros would be NaN."""
    square = x.square().sum(-1, keepdim=True)
    return x / torch.where(square > EPS**2, square, EPS**2).sqrt()


def pool_layers(
    layers: list[Tensor], row_weights: Tensor | None, pooling: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Pool every layer (*lead, D) to its rows; return them stacked in ``dtype``, and the rows' weights.

    Rows of weight 0 are replaced by zeros, so that nothing they hold reaches a value or a gradient.
    """
    lead = layers[0].shape[:-1]
    # A negative weight (refused where values are checked) counts as 0; NaN stays NaN.
    weights = layers[0].new_ones(lead, dtype=dtype) if row_weights is None else row_weights.to(dtype).clamp_min(0)
    valid = weights != 0
    if pooling == "cls":
        layers, weights = [h[..., 0, :] for h in layers], weights[..., 0]
    elif pooling == "last":
        position = torch.arange(lead[-1], device=weights.device)
        last = torch.where(valid, position, 0).amax(-1)[..., None, None]  # (..., 1, 1)
        layers = [h.take_along_dim(last, dim=-2).squeeze(-2) for h in layers]
        weights = valid.any(-1).to(dtype)
    elif pooling == "mean":
        total = weights.sum(-1)  # (...)
        share = weights / torch.where(total != 0, total, 1.0)[..., None]
        masked = [torch.where(valid[..., None], h.to(dtype), 0.0) for h in layers]
        layers, weights = [torch.einsum("...s,...sd->...d", share, h) for h in masked], (total != 0).to(dtype)
    counted = (weights != 0)[..., None]
    return torch.stack([torch.where(counted, h.to(dtype), 0.0) for h in layers]), weights
