"""ALPLoss: the loss as an nn.Module that holds its options and, where asked, learns a projection or the scale."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .api import ALPOutput, alp_loss
from .problem import Layers, constant_layer_weights
from .projection import project_student

_OPTIONS = {
    name: parameter.default
    for name, parameter in inspect.signature(alp_loss).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not name.startswith("proj_")
}

PROJECTIONS = ("teacher", "student")


class ALPLoss(nn.Module):
    """The loss of :func:`alp_loss` with its options, and the projection and the scale where they are learned.

    Args:
        student_dim, teacher_dim: widths D_s and D_t. Where both are given and differ, a projection is held.
        projection: which side is projected to the width of the other: "teacher" (phi; also True) or "student", then
            D in the default scale and in the normalizer is D_t. False: neither. None: the teacher where the
            widths differ.
        bias: whether the projection has a bias.
        projections: number of projections, m for one per student layer; None for one shared by all.
        learn_scale: learn the scale, starting at the option ``scale``. Its logarithm is the parameter: it stays
            positive without a bound at which its gradient would vanish, and steps are relative to its size.
        **options: the keyword options of :func:`alp_loss`, with its defaults. ``normalizer`` may also be
            passed to each call.

    The projection starts as the identity where it is square and with orthonormal rows or columns else; its bias
    starts at 0.

    Attributes:
        proj_weight: (D_out, D_in), (projections, D_out, D_in) or None; (D_s, D_t) for "teacher", (D_t, D_s) for
            "student".
        proj_bias: (D_out,), (projections, D_out) or None.
        log_scale: (1,) or None.
        layer_weights: (m,) or None; a float32 buffer, so that ``state_dict`` holds the option. The loss takes it as
            numbers, which need no transfer from the device and are constants to torch.compile: to change them,
            load a state_dict. Casts of the module leave it float32.

    Raises:
        TypeError: an unknown option. ValueError: a projection without both widths, a scale that cannot be learned or
            is a tensor that requires a gradient, layer weights that are negative or not finite.
    """

    def __init__(
        self,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
        *,
        projection: bool | str | None = None,
        bias: bool = True,
        projections: int | None = None,
        learn_scale: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise TypeError(f"ALPLoss: unknown option {unknown[0]!r}; known options are {', '.join(_OPTIONS)}")
        if not isinstance(projection, bool) and projection not in (None, *PROJECTIONS):
            raise ValueError(f"projection: got {projection!r}; pass {', '.join(PROJECTIONS)}, True, False or None")
        scale = options.get("scale")
        if isinstance(scale, Tensor) and scale.requires_grad:  # as an option it would be no parameter of the module
            raise ValueError(
                "scale: got a tensor that requires a gradient, which no optimizer of this module would get; pass "
                "learn_scale=True and scale as the float to start at, or a tensor to alp_loss(scale=...) in each call"
            )
        self.options = options
        self.layer_weights: Tensor | None
        self.register_buffer("layer_weights", None)
        if options.get("layer_weights") is not None:
            self._set_layer_weights(constant_layer_weights(options["layer_weights"]))
        if projection is None:
            widths = (student_dim, teacher_dim)
            projection = projections is not None or (None not in widths and student_dim != teacher_dim)
        self.projection = "teacher" if projection is True else projection or None
        self.proj_weight: nn.Parameter | None = None
        self.proj_bias: nn.Parameter | None = None
        # One dimension, though it is a scalar: FSDP shards no 0-dim parameters.
        self.log_scale = nn.Parameter(torch.empty(1)) if learn_scale else None
        self._width = teacher_dim if self.projection == "student" else student_dim
        if self.projection is not None:
            if student_dim is None or teacher_dim is None:
                raise ValueError(
                    f"ALPLoss: a projection needs student_dim and teacher_dim, got {student_dim} and {teacher_dim}"
                )
            wide, narrow = (teacher_dim, student_dim) if self.projection == "student" else (student_dim, teacher_dim)
            leading = () if projections is None else (projections,)
            self.proj_weight = nn.Parameter(torch.empty(*leading, wide, narrow))
            if bias:
                self.proj_bias = nn.Parameter(torch.empty(*leading, wide))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the projection and the scale to their starting values."""
        if self.proj_weight is not None:
            for matrix in self.proj_weight.view(-1, *self.proj_weight.shape[-2:]).unbind(0):
                if matrix.shape[0] == matrix.shape[1]:
                    nn.init.eye_(matrix)
                else:
                    nn.init.orthogonal_(matrix)
        if self.proj_bias is not None:
            nn.init.zeros_(self.proj_bias)
        if self.log_scale is not None:
            nn.init.constant_(self.log_scale, math.log(self._starting_scale()))

    def _set_layer_weights(self, weights: Sequence[float], device: torch.device | None = None) -> None:
        """Hold the weights twice: as a buffer, and as the numbers that it holds."""
        self.options["layer_weights"] = torch.tensor(weights, dtype=torch.float32, device="cpu").tolist()
        self.layer_weights = torch.tensor(weights, dtype=torch.float32, device=device)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ALPLoss:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.layer_weights is not None:  # a cast has rounded it, to_empty() left it undefined
            self._set_layer_weights(self.options["layer_weights"], self.layer_weights.device)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self.layer_weights is not None and not self.layer_weights.is_meta:
            self._set_layer_weights(constant_layer_weights(self.layer_weights), self.layer_weights.device)

    def _starting_scale(self) -> float:
        scale = self.options.get("scale")
        if scale is None:
            if self._width is None:
                raise ValueError("learn_scale: starting at 1/sqrt(D) needs student_dim; or pass scale, a float > 0")
            return 1.0 / math.sqrt(self._width)
        if not 0.0 < float(scale) < math.inf:
            raise ValueError(f"learn_scale: scale must start finite and > 0, got {float(scale)}")
        return float(scale)

    def forward(
        self,
        student_hidden_states: Layers,
        teacher_hidden_states: Layers,
        attention_mask: Tensor | None = None,
        *,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | ALPOutput:
        """Return what :func:`alp_loss` returns for these hidden states and the module's options."""
        options = dict(self.options)
        if normalizer is not None:
            options["normalizer"] = normalizer
        if self.log_scale is not None:
            options["scale"] = self.log_scale.exp().squeeze(0)
        if self.projection == "student":
            assert self.proj_weight is not None
            student_hidden_states, teacher_hidden_states, attention_mask = project_student(
                student_hidden_states,
                teacher_hidden_states,
                attention_mask,
                options.pop("pooling", "token"),
                self.proj_weight,
                self.proj_bias,
            )
        elif self.projection == "teacher":
            options.update(proj_weight=self.proj_weight, proj_bias=self.proj_bias)
        result: Tensor | ALPOutput = alp_loss(student_hidden_states, teacher_hidden_states, attention_mask, **options)
        return result

    def extra_repr(self) -> str:
        parts = [f"{name}={value!r}" for name, value in self.options.items()]
        if self.proj_weight is not None:
            parts.append(f"projection={self.projection!r}, proj_weight={tuple(self.proj_weight.shape)}")
            parts.append(f"bias={self.proj_bias is not None}")
        if self.log_scale is not None:
            parts.append("learn_scale=True")
        return ", ".join(parts)
