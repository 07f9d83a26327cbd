"""Everything that is timed: ours with each backend, and rivals written as well as we can write them.

A rival takes student (m) and teacher (n) lists of tensors (rows, D) and row weights (rows,) or None, and
returns the loss. Rivals compute in the dtype of their inputs, as a training loop would, and sum in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import linear, mse_loss, normalize, scaled_dot_product_attention

import alpkd_fast
from alpkd_fast import projection

from .cases import Case, Inputs

Loss = Callable[[Case, list[Tensor], list[Tensor], "Tensor | None"], Tensor]


@dataclass(frozen=True)
class Provider:
    name: str
    kind: str  # "ours", "eager", "public", "compiled"
    loss: Callable[[Inputs], Tensor]


def _scale(case: Case) -> float:
    return 1 / math.sqrt(case.D) if case.scale is None else case.scale


def _squares(e: Tensor, weights: Tensor | None) -> Tensor:
    """Sum of mu * e^2 for residuals e (rows, ..., D). By rows first: a compiler adds one long sum up term by term."""
    by_row = e.float().square().flatten(1).sum(-1)
    return (by_row if weights is None else by_row * weights).sum()


def _mean(case: Case, total: Tensor, weights: Tensor | None, rows: int) -> Tensor:
    return total / (case.m * case.D * (rows if weights is None else weights.sum()))


def bmm(case: Case, student: list[Tensor], teacher: list[Tensor], weights: Tensor | None) -> Tensor:
    """Two batched products per student layer over the teacher stacked once."""
    t = torch.stack(teacher, 1)  # (rows, n, D)
    total = t.new_zeros((), dtype=torch.float32)
    for s in student:
        a = torch.softmax(torch.bmm(t, s[:, :, None]).squeeze(-1) * _scale(case), -1)  # (rows, n)
        total = total + _squares(s - torch.bmm(a[:, None], t).squeeze(1), weights)
    return _mean(case, total, weights, len(t))


def einsum(case: Case, student: list[Tensor], teacher: list[Tensor], weights: Tensor | None) -> Tensor:
    """All student layers at once: two batched products with both sides stacked."""
    s, t = torch.stack(student, 1), torch.stack(teacher, 1)  # (rows, m, D), (rows, n, D)
    a = torch.softmax(torch.einsum("rmd,rnd->rmn", s, t) * _scale(case), -1)
    return _mean(case, _squares(s - torch.einsum("rmn,rnd->rmd", a, t), weights), weights, len(t))


def attention(case: Case, student: list[Tensor], teacher: list[Tensor], weights: Tensor | None) -> Tensor:
    """torch's own attention: a row is a batch element, student layers are queries, teacher layers keys and values."""
    s, t = torch.stack(student, 1), torch.stack(teacher, 1)
    combined = scaled_dot_product_attention(s[:, None], t[:, None], t[:, None], scale=_scale(case)).squeeze(1)
    return _mean(case, _squares(s - combined, weights), weights, len(t))


def broadcast(case: Case, student: list[Tensor], teacher: list[Tensor], weights: Tensor | None) -> Tensor:
    """Broadcast multiplications and sums over the teacher stacked once."""
    t = torch.stack(teacher, 1)
    total = t.new_zeros((), dtype=torch.float32)
    for s in student:
        a = torch.softmax((t * s[:, None]).sum(-1) * _scale(case), -1)
        total = total + _squares(s - (t * a[..., None]).sum(1), weights)
    return _mean(case, total, weights, len(t))


def pairs(case: Case, student: list[Tensor], teacher: list[Tensor], weights: Tensor | None) -> Tensor:
    """One product per pair of layers, nothing stacked: the slowest form in eager mode, easy to fuse for a compiler."""
    total = student[0].new_zeros((), dtype=torch.float32)
    for s in student:
        a = torch.softmax(torch.stack([(s * t).sum(-1) for t in teacher], -1) * _scale(case), -1)
        combined = a[:, :1] * teacher[0]
        for j, t in enumerate(teacher[1:], 1):
            combined = combined + a[:, j : j + 1] * t
        total = total + _squares(s - combined, weights)
    return _mean(case, total, weights, len(student[0]))


def gathered(form: Loss, case: Case, student: list[Tensor], teacher: list[Tensor], weights: Tensor | None) -> Tensor:
    """A form on the valid rows alone: it pays for copies, and saves the work on padding."""
    kept = weights.nonzero().squeeze(-1)
    return form(case, [s[kept] for s in student], [t[kept] for t in teacher], None)


def query_side(
    case: Case, student: list[Tensor], teacher: list[Tensor], weights: Tensor | None, projection: Tensor
) -> Tensor:
    """The einsum form with the projection W (D, D_t), or one to each student layer (m, D, D_t), on the student's side:
    <s, W t> = <W^T s, t>, and sum_j a_j W t_j = W sum_j a_j t_j. So m rows are projected and not n."""
    s, t = torch.stack(student, 1), torch.stack(teacher, 1)  # (rows, m, D), (rows, n, D_t)
    W = projection.expand(case.m, -1, -1)
    a = torch.softmax(torch.einsum("rme,rne->rmn", torch.einsum("rmd,mde->rme", s, W), t) * _scale(case), -1)
    combined = torch.einsum("rme,mde->rmd", torch.einsum("rmn,rne->rme", a, t), W)
    return _mean(case, _squares(s - combined, weights), weights, len(t))


def public_a(case: Case, student: list[Tensor], teacher: list[Tensor], weights: Tensor | None) -> Tensor:
    """Form of implementation A: mse_loss and a stacked teacher per student layer, averaged; padding counts."""
    losses = []
    for s in student:
        t = torch.stack(teacher, 1)
        a = torch.softmax((s[:, None] @ t.transpose(1, 2)) * _scale(case), -1)  # (rows, 1, n)
        losses.append(mse_loss(s.float(), (a @ t).squeeze(1).float()))
    return sum(losses) / case.m


def public_b(case: Case, student: list[Tensor], teacher: list[Tensor], weights: Tensor | None) -> Tensor:
    """Form of implementation B: plain dot products; its sum over student layers is divided by m to compare."""
    t = torch.stack(teacher, 1)
    total = t.new_zeros((), dtype=torch.float32)
    for s in student:
        a = torch.softmax((s[:, None] * t).sum(-1, keepdim=True), 1)  # (rows, n, 1)
        total = total + mse_loss(s.float(), (a * t).sum(1).float())
    return total / case.m


def public_pkd(case: Case, student: list[Tensor], teacher: list[Tensor], weights: Tensor | None) -> Tensor:
    """Form of PKD: picked layers, both sides L2-normalised, one mse_loss over all."""
    picks = [layers[0] for layers in alpkd_fast.make_layer_map(case.layer_map, case.m, case.n)]
    s = normalize(torch.stack(student, 1).float(), dim=-1)
    t = normalize(torch.stack([teacher[j] for j in picks], 1).float(), dim=-1)
    return mse_loss(s, t)


def rival_forms(case: Case) -> dict[str, tuple[str, Loss]]:
    """The rivals of a case by name, each with its kind."""
    if case.normalize:
        return {"PKD": ("public", public_pkd)}
    forms: dict[str, tuple[str, Loss]] = {
        form.__name__: ("eager", form) for form in (bmm, einsum, attention, broadcast, pairs)
    }
    if case.padding and case.pooling == "token":
        forms |= {f"gathered {form.__name__}": ("eager", partial(gathered, form)) for form in (einsum, pairs)}
    forms["public A"] = ("public", public_a)
    if case.scale == 1.0:
        forms["public B"] = ("public", public_b)
    if case.teacher_dim:
        forms["query side"] = ("eager", query_side)
    return forms


def _pool(case: Case, h: Tensor, weights: Tensor | None) -> Tensor:
    """(batch, seq, D) or a view (batch, D) to the rows of the loss."""
    if case.pooling == "cls":
        return h[:, 0]
    if case.pooling == "last":
        return h[torch.arange(len(h), device=h.device), weights.sum(1) - 1]
    if case.pooling == "mean":
        share = weights / weights.sum(1, keepdim=True)  # (batch, seq)
        return torch.bmm(share[:, None].to(h.dtype), h).squeeze(1)
    return h.flatten(0, -2)


def _call(case: Case, form: Loss, inputs: Inputs) -> Tensor:
    student = [_pool(case, h, inputs.weights) for h in inputs.student]
    teacher = [_pool(case, h, inputs.weights) for h in inputs.teacher]
    by_row = case.pooling == "token" and inputs.weights is not None
    weights = inputs.weights.flatten() if by_row else None
    if form is query_side:
        return query_side(case, student, teacher, weights, inputs.projection)
    if case.projections > 1:  # the mean of the student layers' losses
        parts = zip(student, inputs.projection, strict=True)
        return sum(form(replace(case, m=1), [s], [linear(t, W) for t in teacher], weights) for s, W in parts) / case.m
    if inputs.projection is not None:
        teacher = [linear(t, inputs.projection) for t in teacher]
    return form(case, student, teacher, weights)


def rivals(case: Case) -> list[Provider]:
    return [Provider(name, kind, partial(_call, case, form)) for name, (kind, form) in rival_forms(case).items()]


def compiled(case: Case, name: str, mode: str | None = None) -> Provider:
    """A rival under torch.compile; the first call compiles."""
    call = torch.compile(partial(_call, case, rival_forms(case)[name][1]), fullgraph=True, dynamic=False, mode=mode)
    return Provider(f"{name} + {mode or 'compile'}", "compiled", call)


def ours(case: Case, device: torch.device) -> tuple[list[Provider], dict[str, str]]:
    """Our providers, one per usable backend, and the reasons why the others are not. A projection is also timed in
    both of its forms, whichever the backend takes by itself."""

    def loss(backend: str, inputs: Inputs) -> Tensor:
        return alpkd_fast.alp_loss(
            inputs.student,
            inputs.teacher,
            inputs.weights,
            pooling=case.pooling,
            layer_map=case.layer_map,
            scale=case.scale,
            normalize=case.normalize,
            proj_weight=inputs.projection,
            backend=backend,
        )

    def loss_of_form(backend: str, query_side: bool, inputs: Inputs) -> Tensor:
        with patch.object(projection, "query_side_pays", lambda *_: query_side):
            return loss(backend, inputs)

    reasons = {name: reason for name, reason in alpkd_fast.backends().items() if reason is not None}
    usable = [name for name, reason in alpkd_fast.backends().items() if reason is None and name != "reference"]
    if device.type == "cpu" and "triton" in usable:
        usable.remove("triton")
        reasons["triton"] = "on the CPU Triton runs its interpreter, which is for tests"
    if device.type == "cuda" and "cpu" in usable:
        usable.remove("cpu")
        reasons["cpu"] = "it takes CPU tensors"
    usable = usable or ["reference"]
    mine = [Provider(name, "ours", partial(loss, name)) for name in usable]
    if case.teacher_dim:
        forms = {"teacher side": False, "query side": True}
        mine += [
            Provider(f"{name}, {form}", "ours", partial(loss_of_form, name, query_side))
            for name in usable for form, query_side in forms.items()
        ]  # fmt: skip
    return mine, reasons
