"""ALPLoss: the loss as an nn.Module that holds its options and, where asked, the projection."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .api import ALPOutput, alp_loss
from .problem import HiddenStates

_OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(alp_loss).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not name.startswith("proj_")
}


class ALPLoss(nn.Module):
    """The loss of :func:`alp_loss` with its options, and the projection phi where one is held.

    Args:
        student_dim, teacher_dim: widths D_s and D_t. Where both are given and differ, phi is held.
        projection: hold phi also for equal widths (True), or not at all (False); None decides by the widths.
        bias: whether phi has a bias.
        projections: number of projections, m for one per student layer; None for one shared by all.
        **options: the keyword options of :func:`alp_loss`, with its defaults. ``normalizer`` may also be
            passed to each call.

    phi starts as the identity where it is square and with orthonormal rows or columns else; its bias
    starts at 0.

    Attributes:
        proj_weight: (D_s, D_t), (projections, D_s, D_t) or None.
        proj_bias: (D_s,), (projections, D_s) or None.

    Raises:
        TypeError: an unknown option. ValueError: a projection without both widths.
    """

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        *,
        projection: bool | None = None,
        bias: bool = True,
        projections: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise TypeError(f"ALPLoss: unknown option {unknown[0]!r}; known options are {', '.join(_OPTIONS)}")
        self.options = options
        if projection is None:
            projection = projections is not None or student_dim != teacher_dim
        self.proj_weight: nn.Parameter | None = None
        self.proj_bias: nn.Parameter | None = None
        if not projection:
            return
        if student_dim is None or teacher_dim is None:
            raise ValueError(
                f"ALPLoss: a projection needs student_dim and teacher_dim, got {student_dim} and {teacher_dim}"
            )
        leading = () if projections is None else (projections,)
        self.proj_weight = nn.Parameter(torch.empty(*leading, student_dim, teacher_dim))
        if bias:
            self.proj_bias = nn.Parameter(torch.empty(*leading, student_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set phi to its starting value."""
        if self.proj_weight is None:
            return
        for matrix in self.proj_weight.view(-1, *self.proj_weight.shape[-2:]).unbind(0):
            if matrix.shape[0] == matrix.shape[1]:
                nn.init.eye_(matrix)
            else:
                nn.init.orthogonal_(matrix)
        if self.proj_bias is not None:
            nn.init.zeros_(self.proj_bias)

    def forward(
        self,
        student_hidden_states: HiddenStates,
        teacher_hidden_states: HiddenStates,
        attention_mask: Tensor | None = None,
        *,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | ALPOutput:
        """Return what :func:`alp_loss` returns for these hidden states and the module's options."""
        options = self.options if normalizer is None else {**self.options, "normalizer": normalizer}
        output: Tensor | ALPOutput = alp_loss(
            student_hidden_states,
            teacher_hidden_states,
            attention_mask,
            proj_weight=self.proj_weight,
            proj_bias=self.proj_bias,
            **options,
        )
        return output

    def extra_repr(self) -> str:
        parts = [f"{name}={value!r}" for name, value in self.options.items()]
        if self.proj_weight is not None:
            parts.append(f"proj_weight={tuple(self.proj_weight.shape)}, bias={self.proj_bias is not None}")
        return ", ".join(parts)
