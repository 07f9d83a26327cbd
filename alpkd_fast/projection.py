"""The learned projection phi(t) = W t + b of teacher rows to the student's width, or of student rows to the teacher's.

phi of the teacher has two exact forms. Teacher side: the projected rows go through the same operator as plain
teacher rows; its teacher gradients are what autograd carries on into W and b. Query side: <s, W t + b> is <W^T s, t>
but for a constant, and the attention adds up to 1, so W^T s attends over the teacher as it is, and W is applied to
what comes out. ``query_side_pays`` chooses.

Products are taken in the problem's compute dtype: one rounding of phi(t) to bf16 would be of the order of the
residual itself once the student is close.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import linear

from .backends import choose
from .backends.reference import check_problem
from .layer_attention import layer_attention
from .problem import Layers, Problem, make_problem
from .reference import masked_attention, pool_layers

LossParts = tuple[Tensor, Tensor, Tensor, Tensor]
Run = Callable[[Problem], LossParts]


def project_teacher(problem: Problem, weight: Tensor | None, bias: Tensor | None, backend: str) -> LossParts:
    """Return what the backend of that name returns for the problem with its teacher rows projected.

    The problem as it is given decides the form. The name is resolved anew for what then runs: its teacher has the
    compute dtype and may need a gradient, which another of a GPU's backends may compute faster.
    """
    form = choose(backend, problem).NAME
    weight, bias = _check_projection(problem, weight, bias)
    dtype = problem.compute_dtype
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    n, read = len(problem.teacher), sorted(set().union(*_allowed(problem)))
    if len(read) < n:
        problem = _with_teacher_layers(problem, read)

    def run(projected: Problem) -> LossParts:
        return choose(backend, projected).run(projected)

    with torch.autocast(weight.device.type, enabled=False):
        if has_query_side(problem, form) and query_side_pays(problem, weight, form):
            parts = _query_side(problem, weight, bias, form, run)
        else:
            parts = _teacher_side(problem, weight, bias, run)
    loss, layer_losses, attention, entropy = parts
    if problem.details and len(read) < n:
        attention = _in_columns(attention, read, n)
    return loss, layer_losses, attention, entropy


def _with_teacher_layers(problem: Problem, read: list[int]) -> Problem:
    """The problem without the teacher layers that no student layer may attend to: they must not be read."""
    assert problem.layer_map is not None
    table = tuple(tuple(read.index(j) for j in layers) for layers in problem.layer_map)
    return replace(problem, teacher=[problem.teacher[j] for j in read], layer_map=table)


def _in_columns(attention: Tensor, layers: Sequence[int], n: int) -> Tensor:
    """The attention to some teacher layers among zeros for the others of n."""
    columns = dict(zip(layers, attention.unbind(-1), strict=True))
    zeros = torch.zeros_like(attention[..., 0])
    return torch.stack([columns.get(j, zeros) for j in range(n)], -1)


def _teacher_side(problem: Problem, weight: Tensor, bias: Tensor | None, run: Run) -> LossParts:
    teacher, student, weights = _pooled(problem, problem.teacher, problem.student)
    if problem.pooling != "token":
        problem = replace(problem, student=student, row_weights=weights, pooling="token")
    problem = replace(problem, teacher=teacher)
    if weight.dim() == 2:
        return run(replace(problem, teacher=[linear(t, weight, bias) for t in problem.teacher]))
    return _one_projection_per_layer(problem, weight, bias, run)


def has_query_side(problem: Problem, backend: str) -> bool:
    """The reference stays what it is, differentiable twice; and only the operator leaves out student layers of
    weight 0."""
    return backend != "reference" and (problem.layer_weights is None or 0 not in problem.layer_weights)


def query_side_pays(problem: Problem, weight: Tensor, backend: str) -> bool:
    """Whether the query side is the quicker form, by its count of products of all rows with a (D_s, D_t) matrix.

    A step takes 2 for each projected teacher layer, or 6 for each student layer; the rows of W's other width that these
    make and read again take a CPU the time of about 250 / D_s products each (measured for D_s from 64 to 1024). On a
    GPU neither was measured: there the query side needs a third of the products at most.
    """
    m, n, D_s = len(problem.student), len(problem.teacher), weight.shape[-2]
    projected = n if weight.dim() == 2 else sum(len(allowed) for allowed in _allowed(problem))
    if backend == "cpu":
        return (2 * projected - 6 * m) * D_s > 250 * m
    return 2 * projected >= 3 * 6 * m


def project_student(
    student_hidden_states: Layers,
    teacher_hidden_states: Layers,
    attention_mask: Tensor | None,
    pooling: str,
    weight: Tensor,
    bias: Tensor | None,
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Return projected student rows, teacher rows and row weights, all pooled, for alp_loss's default pooling."""
    problem = make_problem(
        student_hidden_states, teacher_hidden_states, attention_mask, pooling=pooling, projected=True
    )
    _check_student_projection(problem, weight)
    dtype = problem.compute_dtype
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(weight.device.type, enabled=False):
        rows, teacher, weights = _pooled(problem, problem.student, problem.teacher)
        student = [linear(s, W, b) for s, (W, b) in zip(rows, _by_layer(weight, bias, len(rows)), strict=True)]
    return student, teacher, weights


def _check_student_projection(problem: Problem, weight: Tensor) -> None:
    m, narrow, wide = len(problem.student), problem.student[0].shape[-1], problem.teacher[0].shape[-1]
    if tuple(weight.shape) not in ((wide, narrow), (m, wide, narrow)):
        raise ValueError(
            f"ALPLoss: its student projection has shape {tuple(weight.shape)}, but student width {narrow}, teacher "
            f"width {wide} and {m} student layers need ({wide}, {narrow}), or ({m}, {wide}, {narrow}) for one "
            "projection per layer; construct it with these student_dim, teacher_dim and projections"
        )


def _pooled(
    problem: Problem, multiplied: list[Tensor], other: list[Tensor]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Return the side that meets W, the other side and the rows' weights, all pooled: phi commutes with every pooling.

    The side that meets W comes in the compute dtype, with rows of weight 0 zeroed: a NaN there must not reach the
    gradient of W through the product 0 * NaN.
    """
    arguments = problem.row_weights, problem.pooling, problem.compute_dtype
    if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
        # What was made under inference mode cannot be saved for a backward.
        multiplied, other = ([h.clone() if h.is_inference() else h for h in side] for side in (multiplied, other))
    multiplied, weights = pool_layers(multiplied, *arguments)  # of (*rows, D)
    if problem.pooling != "token":
        other, _ = pool_layers(other, *arguments)
    return multiplied, other, weights


def _allowed(problem: Problem) -> Sequence[Sequence[int]]:
    """The teacher layers that each student layer may attend to."""
    return problem.layer_map or [range(len(problem.teacher))] * len(problem.student)


def _by_layer(weight: Tensor, bias: Tensor | None, m: int) -> list[tuple[Tensor, Tensor | None]]:
    """W and b of each student layer."""
    if weight.dim() == 2:
        return [(weight, bias)] * m
    return list(zip(weight, [None] * m if bias is None else bias, strict=True))


def _query_side(problem: Problem, weight: Tensor, bias: Tensor | None, form: str, run: Run) -> LossParts:
    """A backend's layer attention over the teacher as it is, and its loss of each combination as the one teacher layer
    of its student layer."""
    check_problem(problem)
    dtype, m, n = problem.compute_dtype, len(problem.student), len(problem.teacher)
    student, teacher, weights = _pooled(problem, problem.student, problem.teacher)
    every_row_counts = problem.pooling != "token" or problem.row_weights is None
    counted = None if every_row_counts else (weights != 0).flatten()
    phi = _by_layer(weight, bias, m)
    queries = [s.reshape(-1, s.shape[-1]) @ W for s, (W, _) in zip(student, phi, strict=True)]  # m of (R, D_t)
    scale = problem.scale.to(dtype) if isinstance(problem.scale, Tensor) else problem.scale
    flat = [t.reshape(-1, t.shape[-1]) for t in teacher]  # n of (R, D_t)
    u, attention = layer_attention(
        queries, flat, counted, problem.layer_map, scale, problem.detach_attention, form
    )  # m of (R, D_t), (m, R, n)
    combined = [linear(x, W, b).view_as(s) for x, s, (W, b) in zip(u, student, phi, strict=True)]
    each = replace(
        problem,
        student=student,
        teacher=combined,
        row_weights=weights,
        pooling="token",
        layer_map=tuple((i,) for i in range(m)),
        scale=0.0,
        details=False,
    )
    loss, layer_losses, *_ = run(each)
    return loss, layer_losses, *masked_attention(attention.reshape(m, *weights.shape, n), weights)


def _one_projection_per_layer(problem: Problem, weight: Tensor, bias: Tensor | None, run: Run) -> LossParts:
    m, n = len(problem.student), len(problem.teacher)
    parts: list[LossParts] = []
    for i, allowed in enumerate(_allowed(problem)):
        single = replace(
            problem,
            student=[problem.student[i]],
            teacher=[linear(problem.teacher[j], weight[i], None if bias is None else bias[i]) for j in allowed],
            layer_map=None,
            layer_weights=None if problem.layer_weights is None else (problem.layer_weights[i],),
        )
        loss, layer_loss, attention, entropy = run(single)
        if problem.details:
            attention = _in_columns(attention, allowed, n)
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
