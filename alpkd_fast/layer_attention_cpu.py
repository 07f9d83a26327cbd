"""The layer attention's operators on the CPU: csrc/cpu/layer_attention.cpp.

They read each of the teacher's rows where it lies, in its dtype, once in either direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .layer_maps import LayerTable, counts_and_layers
from .ops import LIBRARY, fake_gradients

_SHARED = "Tensor? counted, int[] map_counts, int[] map_layers, Tensor? scale_tensor, float scale"
LIBRARY.define(
    f"layer_attention_cpu(Tensor[] queries, Tensor[] teacher, {_SHARED}) -> (Tensor[] combined, Tensor attention)"
)
LIBRARY.define(
    f"layer_attention_backward_cpu(Tensor[] grads, Tensor[] queries, Tensor[] teacher, Tensor attention, {_SHARED},"
    " bool detach_attention, bool[] query_grad, bool[] teacher_grad, bool scale_grad)"
    " -> (Tensor[] d_queries, Tensor[] d_teacher, Tensor d_scale)"
)


def _fake(queries: list[Tensor], teacher: list[Tensor], *_: Any) -> tuple[list[Tensor], Tensor]:
    attention = queries[0].new_empty(len(queries), len(queries[0]), len(teacher))
    return fake_gradients(queries, [True] * len(queries)), attention


def _fake_backward(
    grads: list[Tensor], queries: list[Tensor], teacher: list[Tensor], attention: Tensor, *options: Any
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    *_, query_grad, teacher_grad, _ = options
    return fake_gradients(grads, query_grad), fake_gradients(teacher, teacher_grad), attention.new_empty(())


torch.library.register_fake("alpkd_fast::layer_attention_cpu", _fake, lib=LIBRARY)
torch.library.register_fake("alpkd_fast::layer_attention_backward_cpu", _fake_backward, lib=LIBRARY)


def attend(
    queries: Sequence[Tensor],
    teacher: Sequence[Tensor],
    counted: Tensor | None,
    table: LayerTable | None,
    scale: float | Tensor,
) -> tuple[list[Tensor], Tensor]:
    combined, attention = torch.ops.alpkd_fast.layer_attention_cpu.default(
        queries, teacher, counted, *counts_and_layers(table), *_tensor_or_value(scale)
    )
    return combined, attention


def attend_back(
    grads: Sequence[Tensor],
    queries: Sequence[Tensor],
    teacher: Sequence[Tensor],
    attention: Tensor,
    counted: Tensor | None,
    table: LayerTable | None,
    scale: float | Tensor,
    *options: Any,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    d_queries, d_teacher, d_scale = torch.ops.alpkd_fast.layer_attention_backward_cpu.default(
        grads, queries, teacher, attention, counted, *counts_and_layers(table), *_tensor_or_value(scale), *options
    )
    return d_queries, d_teacher, d_scale


def _tensor_or_value(scale: float | Tensor) -> tuple[Tensor | None, float]:
    return (scale, 0.0) if isinstance(scale, Tensor) else (None, scale)
