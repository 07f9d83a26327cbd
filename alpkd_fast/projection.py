"""The learned projection phi(t) = W t + b of teacher rows to the student's width, or of student rows to the teacher's.

The projected rows go through the same operator as plain teacher rows; its teacher gradients are what
autograd carries on into W and b. Products are taken in the problem's compute dtype: one rounding of
phi(t) to bf16 would be of the order of the residual itself once the student is close.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from .problem import HiddenStates, Problem, make_problem
from .reference import pool_layers

LossParts = tuple[Tensor, Tensor, Tensor, Tensor]


def project_teacher(
    problem: Problem, weight: Tensor | None, bias: Tensor | None, run: Callable[[Problem], LossParts]
) -> LossParts:
    """Run ``run`` on the problem with its teacher rows projected; return what it returns."""
    weight, bias = _check_projection(problem, weight, bias)
    dtype = problem.compute_dtype
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(weight.device.type, enabled=False):
        problem = _pooled(problem)
        if weight.dim() == 2:
            return run(replace(problem, teacher=[linear(t, weight, bias) for t in problem.teacher]))
        return _one_projection_per_layer(problem, weight, bias, run)


def project_student(
    student_hidden_states: HiddenStates,
    teacher_hidden_states: HiddenStates,
    attention_mask: Tensor | None,
    pooling: str,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Return projected student rows, teacher rows and row weights, all pooled, for alp_loss's default pooling."""
    problem = make_problem(
        student_hidden_states,
        teacher_hidden_states,
        attention_mask,
        pooling,
        layer_map="all",
        scale=None,
        normalize=False,
        detach_attention=False,
        layer_weights=None,
        reduction="mean",
        normalizer=None,
        details=False,
        projected=True,
    )
    _check_student_projection(problem, weight)
    dtype = problem.compute_dtype
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(weight.device.type, enabled=False):
        rows, weights = pool_layers(problem.student, problem.row_weights, pooling, dtype)  # (m, *rows, D_s)
        if weight.dim() == 2:
            student = list(linear(rows, weight, bias).unbind(0))
        else:
            biases = [None] * len(rows) if bias is None else list(bias.unbind(0))
            student = [linear(s, W, b) for s, W, b in zip(rows, weight, biases, strict=True)]
        teacher = problem.teacher
        if pooling != "token":
            teacher = list(pool_layers(teacher, problem.row_weights, pooling, dtype)[0].unbind(0))
    return student, teacher, weights


def _check_student_projection(problem: Problem, weight: Tensor) -> None:
    m, narrow, wide = len(problem.student), problem.student[0].shape[-1], problem.teacher[0].shape[-1]
    if tuple(weight.shape) not in ((wide, narrow), (m, wide, narrow)):
        raise ValueError(
            f"ALPLoss: its student projection has shape {tuple(weight.shape)}, but student width {narrow}, teacher "
            f"width {wide} and {m} student layers need ({wide}, {narrow}), or ({m}, {wide}, {narrow}) for one "
            "projection per layer; construct it with these student_dim, teacher_dim and projections"
        )


def _pooled(problem: Problem) -> Problem:
    """phi commutes with every pooling, so it is applied to the pooled rows, with rows of weight 0 zeroed:
    a NaN there must not reach the gradient of W through the product 0 * NaN."""
    arguments = problem.row_weights, problem.pooling, problem.compute_dtype
    teacher, weights = pool_layers(problem.teacher, *arguments)
    if problem.pooling == "token":
        return replace(problem, teacher=list(teacher.unbind(0)))
    student, _ = pool_layers(problem.student, *arguments)
    return replace(
        problem,
        student=list(student.unbind(0)),
        teacher=list(teacher.unbind(0)),
        row_weights=weights,
        pooling="token",
    )


def _one_projection_per_layer(
    problem: Problem, weight: Tensor, bias: Tensor | None, run: Callable[[Problem], LossParts]
) -> LossParts:
    m, n = len(problem.student), len(problem.teacher)
    parts: list[LossParts] = []
    for i in range(m):
        allowed = range(n) if problem.layer_map is None else problem.layer_map[i]
        single = replace(
            problem,
            student=[problem.student[i]],
            teacher=[linear(problem.teacher[j], weight[i], None if bias is None else bias[i]) for j in allowed],
            layer_map=None,
            layer_weights=None if problem.layer_weights is None else (problem.layer_weights[i],),
        )
        loss, layer_loss, attention, entropy = run(single)
        if problem.details:
            full = attention.new_zeros(*attention.shape[:-1], n)
            full[..., list(allowed)] = attention
            attention = full
        parts.append((loss, layer_loss, attention, entropy))
    losses, layer_losses, attentions, entropies = zip(*parts, strict=True)
    share = 1.0 if problem.reduction == "sum" else 1.0 / m  # N counts all m student layers
    loss, layer_loss = torch.stack(losses).sum() * share, torch.cat(layer_losses) * share
    return loss, layer_loss, torch.cat(attentions), torch.cat(entropies)


def _check_projection(problem: Problem, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if weight is None:
        raise ValueError("proj_bias was given without proj_weight; pass both, or neither")
    for name, tensor in (("proj_weight", weight), ("proj_bias", bias)):
        if not isinstance(tensor, Tensor | None):
            raise TypeError(f"{name}: got {type(tensor).__name__}; pass a floating-point tensor or None")
    m, wide, narrow = len(problem.student), problem.student[0].shape[-1], problem.teacher[0].shape[-1]
    if tuple(weight.shape) not in ((wide, narrow), (m, wide, narrow)):
        raise ValueError(
            f"proj_weight has shape {tuple(weight.shape)}, but student width {wide}, teacher width {narrow} and "
            f"{m} student layers need ({wide}, {narrow}), or ({m}, {wide}, {narrow}) for one projection per layer"
        )
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise ValueError(
            f"proj_bias has shape {tuple(bias.shape)}, but proj_weight of shape {tuple(weight.shape)} needs "
            f"{tuple(weight.shape[:-1])}"
        )
    for name, tensor in (("proj_weight", weight), ("proj_bias", bias)):
        if tensor is None:
            continue
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name}: got {tensor.dtype}; pass a floating-point tensor, for example {name}.float()")
        if tensor.device != problem.student[0].device:
            raise ValueError(
                f"{name} is on {tensor.device}, the hidden states on {problem.student[0].device}; "
                f'move it with .to("{problem.student[0].device}")'
            )
    return weight, bias
