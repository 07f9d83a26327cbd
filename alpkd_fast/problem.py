"""The Problem: a call's arguments, checked and normalised once, before any work is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .layer_maps import LayerTable, parse_layer_map

POOLINGS = ("token", "cls", "last", "mean")
REDUCTIONS = ("mean", "sum")

# What every backend reads: hidden states and scale; row weights and normalizer.
_FLOATS = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_NUMBERS = _FLOATS | {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}

Layers = Tensor | Sequence[Tensor | None]  # one side of a call, as the caller gives it


@dataclass(slots=True)
class Problem:
    """One call of the loss. Every backend computes exactly this; nothing in it needs a further check.

    student, teacher: m and n tensors (*lead, D), one dtype per side. lead is (..., S) for every
    pooling but "token", which takes any leading shape.
    """

    student: list[Tensor]
    teacher: list[Tensor]
    row_weights: Tensor | None  # (*lead); None = 1 everywhere
    pooling: str
    layer_map: LayerTable | None  # None = every student layer may attend to every teacher layer
    scale: float | Tensor  # the spec's tau; a 0-dim tensor may receive a gradient
    layer_weights: tuple[float, ...] | None  # (m,); None = 1 everywhere
    normalize: bool
    detach_attention: bool
    reduction: str
    normalizer: float | Tensor | None  # replaces the sum of row weights in N
    details: bool

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the loss and of every intermediate value."""
        return torch.promote_types(torch.promote_types(self.student[0].dtype, self.teacher[0].dtype), torch.float32)


def make_problem(
    student_hidden_states: Layers,
    teacher_hidden_states: Layers,
    attention_mask: Tensor | None = None,
    pooling: str = "token",
    layer_map: str | Tensor | Sequence[Sequence[int]] = "all",
    scale: float | Tensor | None = None,
    normalize: bool = False,
    detach_attention: bool = False,
    layer_weights: Sequence[float] | Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    details: bool = False,
    projected: bool = False,
) -> Problem:
    """Check every argument of alp_loss but the projection (``projected``: widths may differ)."""
    student = _layers("student_hidden_states", student_hidden_states)
    teacher = _layers("teacher_hidden_states", teacher_hidden_states)
    _check_sides(student, teacher, projected)
    if pooling not in POOLINGS:
        raise ValueError(f"pooling: got {pooling!r}; known poolings are {', '.join(POOLINGS)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: got {reduction!r}; known reductions are {', '.join(REDUCTIONS)}")
    lead = student[0].shape[:-1]
    if pooling != "token" and (len(lead) == 0 or lead[-1] == 0):
        raise ValueError(
            f"pooling={pooling!r} needs hidden states (..., S, D) with S >= 1, got {tuple(student[0].shape)}; "
            'rows that are pooled already go with pooling="token"'
        )
    if attention_mask is not None:
        _check_mask(attention_mask, lead, student[0].device)
    every = isinstance(layer_map, str) and layer_map == "all"  # an array would compare its elements
    return Problem(
        student=student,
        teacher=teacher,
        row_weights=attention_mask,
        pooling=pooling,
        layer_map=None if every else parse_layer_map(layer_map, len(student), len(teacher)),
        scale=_scale(scale, student[0]),
        layer_weights=None if layer_weights is None else constant_layer_weights(layer_weights, len(student)),
        normalize=bool(normalize),
        detach_attention=bool(detach_attention),
        reduction=reduction,
        normalizer=None if normalizer is None else _normalizer(normalizer, reduction, student[0].device),
        details=details,
    )


def _layers(name: str, hidden_states: Layers) -> list[Tensor]:
    if isinstance(hidden_states, Tensor):
        if hidden_states.dim() < 2:
            raise ValueError(
                f"{name}: a stacked tensor must be (layers, ..., D), got shape {tuple(hidden_states.shape)}; "
                "pass [h] for a single layer h"
            )
        layers: list[Any] = list(hidden_states.unbind(0))
    else:
        try:
            layers = [h for h in hidden_states if h is not None]
        except TypeError:
            raise TypeError(
                f"{name}: got {type(hidden_states).__name__}; pass a sequence of tensors (..., D) such as "
                "model_output.hidden_states[1:], or one stacked tensor (layers, ..., D)"
            ) from None
    if not layers:
        raise ValueError(f"{name} holds no layer; pass at least one tensor (..., D), for example hidden_states[1:]")
    for index, h in enumerate(layers):
        if not isinstance(h, Tensor):
            raise TypeError(f"{name}[{index}]: got {type(h).__name__}; pass tensors (..., D) or None entries only")
    first = layers[0]
    if first.dtype not in _FLOATS:
        raise TypeError(
            f"{name}[0]: got {first.dtype}; allowed are float16, bfloat16, float32 and float64; convert with .float()"
        )
    if first.dim() == 0 or first.shape[-1] == 0:
        raise ValueError(f"{name}[0]: got shape {tuple(first.shape)}; a layer is (..., D) with D >= 1")
    shape, dtype, device = first.shape, first.dtype, first.device
    for index, h in enumerate(layers):
        if h.shape != shape:
            raise ValueError(
                f"{name}[{index}] has shape {tuple(h.shape)}, {name}[0] has {tuple(shape)}; all layers of one side "
                "share one shape: align rows with torch.gather or indexing before the call"
            )
        if h.dtype != dtype:
            raise TypeError(
                f"{name}[{index}] is {h.dtype}, {name}[0] is {dtype}; all layers of one side share one dtype "
                f"(the two sides may differ): convert with .to({dtype})"
            )
        if h.device != device:
            raise ValueError(
                f"{name}[{index}] is on {h.device}, {name}[0] on {device}; all layers must be on one device: "
                f'move it with .to("{device}")'
            )
    return layers


def _check_sides(student: list[Tensor], teacher: list[Tensor], projected: bool) -> None:
    s, t = student[0], teacher[0]
    if s.device != t.device:
        raise ValueError(
            f"teacher_hidden_states are on {t.device}, student_hidden_states on {s.device}; all layers must be on "
            f'one device: move the teacher\'s with .to("{s.device}")'
        )
    if s.shape[:-1] != t.shape[:-1]:
        raise ValueError(
            f"student_hidden_states have leading shape {tuple(s.shape[:-1])}, teacher_hidden_states "
            f"{tuple(t.shape[:-1])}; both sides must hold the same rows: where the sequence lengths differ, align the "
            "positions with torch.gather first"
        )
    if s.shape[-1] != t.shape[-1] and not projected:
        raise ValueError(
            f"student width {s.shape[-1]} and teacher width {t.shape[-1]} differ; pass proj_weight of shape "
            f"({s.shape[-1]}, {t.shape[-1]}), or use ALPLoss(student_dim={s.shape[-1]}, teacher_dim={t.shape[-1]})"
        )


def _check_mask(mask: Tensor, lead: torch.Size, device: torch.device) -> None:
    if not isinstance(mask, Tensor):
        raise TypeError(f"attention_mask: got {type(mask).__name__}; pass a tensor of shape {tuple(lead)} or None")
    if mask.shape != lead:
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}, the hidden states' leading shape is {tuple(lead)}; both "
            "must be equal (no broadcasting): pass the tokenizer's (batch, sequence) mask, expanded or indexed like "
            "the hidden states"
        )
    if mask.dtype not in _NUMBERS:
        raise TypeError(
            f"attention_mask: got {mask.dtype}; allowed are bool, uint8, int8 to int64 and float16 to float64; convert "
            "with .float()"
        )
    if mask.device != device:
        raise ValueError(
            f"attention_mask is on {mask.device}, the hidden states on {device}; "
            f'move it with attention_mask.to("{device}")'
        )
    if mask.requires_grad:
        raise ValueError("attention_mask requires grad, but row weights are constants; pass attention_mask.detach()")


def _scale(scale: float | Tensor | None, student: Tensor) -> float | Tensor:
    if scale is None:
        return 1.0 / math.sqrt(student.shape[-1])
    if isinstance(scale, Tensor):
        if scale.dtype not in _FLOATS:
            raise TypeError(
                f"scale: got a tensor of {scale.dtype}; allowed are float16, bfloat16, float32 and float64; convert "
                "with .float()"
            )
        if scale.dim() != 0:
            raise ValueError(
                f"scale: a tensor must have 0 dimensions, got shape {tuple(scale.shape)}; use scale.reshape(()) or a "
                "Python float"
            )
        if scale.device != student.device:
            raise ValueError(
                f'scale is on {scale.device}, the hidden states on {student.device}; use scale.to("{student.device}")'
            )
        return scale
    try:
        value = float(scale)
    except (TypeError, ValueError):
        raise TypeError(f"scale: got {scale!r}; pass a float >= 0, a 0-dim tensor, or None for 1/sqrt(D)") from None
    if not 0.0 <= value < math.inf:
        raise ValueError(f"scale must be finite and >= 0, got {value}; None stands for 1/sqrt(D), 0 for the average")
    return value


def constant_layer_weights(layer_weights: Sequence[float] | Tensor, m: int | None = None) -> tuple[float, ...]:
    """Check layer weights and return them as numbers; ``m`` where the number of student layers is known."""
    if isinstance(layer_weights, Tensor):
        if layer_weights.requires_grad:
            raise ValueError("layer_weights require grad, but they are constants; pass layer_weights.detach()")
        layer_weights = layer_weights.tolist()
    try:
        values = tuple(float(w) for w in layer_weights)
    except (TypeError, ValueError):
        raise TypeError(
            f"layer_weights: got {layer_weights!r}; pass {m or 'm'} floats >= 0, one per student layer"
        ) from None
    if m is not None and len(values) != m:
        raise ValueError(f"layer_weights: got {len(values)} values for {m} student layers; pass one per layer")
    for i, w in enumerate(values):
        if not 0.0 <= w < math.inf:
            raise ValueError(f"layer_weights[{i}] must be finite and >= 0, got {w}; 0 leaves the layer out")
    return values


def _normalizer(normalizer: float | Tensor, reduction: str, device: torch.device) -> float | Tensor:
    if reduction == "sum":
        raise ValueError('normalizer replaces the sum of row weights of reduction="mean"; drop it with reduction="sum"')
    if isinstance(normalizer, Tensor):
        if normalizer.dtype not in _NUMBERS:
            raise TypeError(
                f"normalizer: got a tensor of {normalizer.dtype}; allowed are bool, uint8, int8 to int64 and float16 "
                "to float64; convert with .float()"
            )
        if normalizer.dim() != 0:
            raise ValueError(
                f"normalizer: a tensor must have 0 dimensions, got shape {tuple(normalizer.shape)}; use "
                "normalizer.sum() or a Python float"
            )
        if normalizer.requires_grad:
            raise ValueError("normalizer requires grad, but it is a constant; pass normalizer.detach()")
        return normalizer if normalizer.device == device else normalizer.to(device)
    try:
        value = float(normalizer)
    except (TypeError, ValueError):
        raise TypeError(f"normalizer: got {normalizer!r}; pass a float > 0 or a 0-dim tensor") from None
    if not 0.0 < value < math.inf:
        raise ValueError(
            f"normalizer must be finite and > 0, got {value}; pass the number of rows that count over all "
            "accumulation steps and ranks"
        )
    return value
