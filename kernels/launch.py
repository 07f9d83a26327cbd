"""The host side: tensors in, launches of the kernels, tensors out. No value is read, so nothing waits for the GPU."""

from __future__ import annotations

import ctypes
import math
import os
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backends.reference import check_values
from ..problem import POOLINGS
from .alp import MAP_BITS, alp_kernel
from .common import INTERPRETED
from .finish import finish_kernel
from .heuristics import choose_config, padded
from .layers import as_rows
from .pool import mean_kernel, spread_kernel
from .scale import scale_kernel
from .weights import sequence_kernel, totals_kernel

_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
_WEIGHT_BLOCK = 1024
_FEW_ROWS = 4096  # up to here every program sums the row weights itself, which saves a launch
_PROGRAMS_PER_SM = 16


@dataclass(slots=True)
class Weights:
    """Row weights as alp_kernel reads them: row r counts weights[r * stride] and lies at positions[r]."""

    weights: Tensor | None
    stride: int
    row_stride: int
    positions: Tensor | None = None
    sums: Tensor | None = None  # of a sequence's weights, for "mean"
    totals: Tensor | None = None


def alp(
    student: list[Tensor],
    teacher: list[Tensor],
    row_weights: Tensor | None,
    pooling: int,
    map_counts: list[int],
    map_layers: list[int],
    scale_tensor: Tensor | None,
    scale: float,
    layer_weights: list[float],
    normalize: bool,
    detach_attention: bool,
    mean: bool,
    normalizer_tensor: Tensor | None,
    normalizer: float,
    details: bool,
    student_grad: list[bool],
    teacher_grad: list[bool],
    scale_grad: bool,
):
    """alpkd_fast::alp_triton; see the schema in alpkd_fast/ops.py."""
    first = student[0]
    if first.device.type == "cpu" or os.environ.get("ALPKD_FAST_CHECK") == "1":
        check_values(row_weights, scale_tensor, normalizer_tensor)
    m, n = len(student), len(teacher)
    acc = torch.promote_types(torch.promote_types(first.dtype, teacher[0].dtype), torch.float32)
    how = POOLINGS[pooling]
    rows_shape = first.shape[:-1] if how == "token" else first.shape[:-2]
    rows, length = math.prod(rows_shape), 1 if how == "token" else first.shape[-2]
    without_factor = (any(student_grad) and first.dtype == torch.float16) or (
        any(teacher_grad) and teacher[0].dtype == torch.float16
    )

    # Only student layers that count, and the teacher layers that they may attend to, are read.
    omega = layer_weights or [1.0] * m
    students = [i for i in range(m) if omega[i] != 0]
    allowed = _allowed(map_counts, map_layers, m, n)
    attended = {j for i in students for j in allowed[i]}
    teachers = [j for j in range(n) if j in attended]

    empty = rows == 0 or not students
    d_student = _gradients(student, student_grad, [] if empty else students, how)
    d_teacher = _gradients(teacher, teacher_grad, [] if empty else teachers, how)
    if empty:
        zero = first.new_zeros((), dtype=acc)
        shape = (m, *rows_shape, n) if details else (0,)
        return (
            zero, first.new_zeros(m, dtype=acc), first.new_zeros(shape, dtype=acc),
            first.new_zeros(m if details else 0, dtype=acc), zero.clone(), zero.clone(),
            _some(d_student), _some(d_teacher),
        )  # fmt: skip

    with _on(first.device):
        weights = _pool_weights(row_weights, how, rows, length, acc, first.device)
        s, t = [student[i] for i in students], [teacher[j] for j in teachers]
        ds, dt = [d_student[i] for i in students], [d_teacher[j] for j in teachers]
        if how == "mean":
            s, t = (_pool_mean(side, row_weights, weights.sums, rows, length, acc) for side in (s, t))
            pooled_ds, pooled_dt = (
                [None if d is None else h.new_empty(h.shape) for h, d in zip(*pair, strict=True)]
                for pair in ((s, ds), (t, dt))
            )
        else:
            pooled_ds, pooled_dt = ds, dt
        numbers = _Numbers(m, scale_tensor, scale, normalizer_tensor, normalizer, mean, [omega[i] for i in students])
        table = None
        if any(set(allowed[i]) != attended for i in students):
            table = [[teachers.index(j) for j in allowed[i]] for i in students]
        loss, losses, attention, entropy, factor, d_scale = _run(
            s, t, pooled_ds, pooled_dt, weights, rows, numbers, table, normalize, detach_attention, details,
            scale_grad, without_factor, acc,
        )  # fmt: skip
        if how == "mean":
            _spread(pooled_ds, ds, row_weights, weights.sums, rows, length, acc)
            _spread(pooled_dt, dt, row_weights, weights.sums, rows, length, acc)

    losses = _scatter(losses, students, m, 0)
    if details:
        entropy = _scatter(entropy, students, m, 0)
        attention = _scatter(_scatter(attention, teachers, n, 2), students, m, 0).view(m, *rows_shape, n)
    return loss, losses, attention, entropy, factor, d_scale, _some(d_student), _some(d_teacher)


def scale_gradients(
    gradients: list[Tensor],
    factor: Tensor,
    grad_factor: Tensor | None = None,
    pooling: int = 0,
    row_weights: Tensor | None = None,
) -> None:
    """alpkd_fast::scale_gradients_triton, of contiguous gradients; where the factor is 1 the launch ends at once."""
    one_row = POOLINGS[pooling] in ("cls", "last")
    kinds: dict[tuple[torch.dtype, torch.Size], list[Tensor]] = {}
    for g in gradients:
        if g.numel() > 0:
            kinds.setdefault((g.dtype, g.shape), []).append(g)
    for (dtype, shape), group in kinds.items():
        length, width = shape[-2:] if one_row else (1, shape.numel())
        rows = shape.numel() // (length * width)
        alignment = math.gcd(16, width * dtype.itemsize, *(g.data_ptr() for g in group))
        block = min(4096, triton.next_power_of_2(width))
        with _on(factor.device):
            scale_kernel[(min(rows * triton.cdiv(width, block), _programs(factor.device)), len(group))](
                tuple(group), rows, width * dtype.itemsize // alignment, length,
                length - 1 if POOLINGS[pooling] == "last" else 0, _flat(row_weights), factor, grad_factor,
                TENSORS=len(group), BLOCK=block, ALIGNMENT=alignment, WEIGHT_BLOCK=_WEIGHT_BLOCK,
            )  # fmt: skip


class _Numbers:
    """The scalar arguments as the kernels take them: doubles as two floats, or tensors."""

    def __init__(self, m, scale_tensor, scale, normalizer_tensor, normalizer, mean, omega):
        self.m, self.mean = m, mean
        self.scale = (*_two_floats(scale), scale_tensor)
        self.normalizer = (*_two_floats(normalizer), normalizer_tensor)
        self.weighted = any(w != 1 for w in omega)
        self.largest = max(omega)
        self.omega = tuple(zip(*map(_two_floats, omega), strict=True)) if self.weighted else None


def _run(s, t, ds, dt, weights, rows, numbers, table, normalize, detach, details, scale_grad, without_factor, acc):
    m, n, D = len(s), len(t), s[0].shape[-1]
    device = s[0].device
    (student, teacher), inner_rows = as_rows(s, t)
    operand = s[0].dtype if s[0].dtype == t[0].dtype else acc
    if INTERPRETED.value and operand == torch.bfloat16:
        operand = acc  # the interpreter has no bf16 arithmetic
    student_bits, teacher_bits = _bits(ds), _bits(dt)
    config = choose_config(m, n, D, operand.itemsize, teacher_bits != 0, _target())
    students, teachers = padded(m, n, teacher_bits != 0)
    programs = min(rows, _programs(device))
    empty = s[0].new_empty
    attention = empty((m, rows, n) if details else (0,), dtype=acc)
    partials = empty((programs, 3 * students), dtype=acc)
    grads = [d for d in (*ds, *dt) if d is not None]
    alignment = math.gcd(16, *(d.data_ptr() for d in grads), *(D * d.element_size() for d in grads))
    map_words = None if table is None else _map_words(table, n)
    kernel, launch_parameters = alp_kernel, config.arguments()
    if os.environ.get("ALPKD_FAST_AUTOTUNE") == "1" and not INTERPRETED.value:
        from .tune import tuned_kernel

        kernel, launch_parameters = tuned_kernel(config, D), {}
    kernel[(programs,)](
        student.tensors, teacher.tensors, _filled(ds), _filled(dt),
        student.layer_stride, teacher.layer_stride,
        student.outer, student.inner, teacher.outer, teacher.inner, inner_rows,
        weights.weights, weights.positions, weights.totals, weights.stride,
        attention if details else None, partials, rows, weights.row_stride,
        *numbers.scale, *numbers.normalizer, numbers.m, numbers.omega, map_words,
        m=m, n=n, D=D, STUDENTS=students, TEACHERS=teachers,
        STUDENT_POINTERS=len(student.tensors), TEACHER_POINTERS=len(teacher.tensors),
        STUDENT_STRIDES=len(student.inner), TEACHER_STRIDES=len(teacher.inner), TWO_STRIDES=student.two_strides,
        STUDENT_ALIGNMENT=student.alignment, TEACHER_ALIGNMENT=teacher.alignment, GRADIENT_ALIGNMENT=alignment,
        STUDENT_GRADS=student_bits, TEACHER_GRADS=teacher_bits, SCALE_GRAD=scale_grad,
        MAP=map_words is not None, WEIGHTED_LAYERS=numbers.weighted, LARGEST_LAYER_WEIGHT=numbers.largest,
        MEAN=numbers.mean, NORMALIZE=normalize, DETACH=detach, DETAILS=details, WITHOUT_FACTOR=without_factor,
        OPERAND=_TYPES[operand], ACC=_TYPES[acc], PRECISION=_precision(operand), WEIGHT_BLOCK=256 * config.warps,
        OPERAND_NAME=_TYPES[operand].name,
        **launch_parameters,
    )  # fmt: skip
    loss, losses, entropy = empty((), dtype=acc), empty((m,), dtype=acc), empty((m if details else 0,), dtype=acc)
    factor, d_scale = empty((), dtype=acc), empty((), dtype=acc)
    finish_kernel[(1,)](
        partials, loss, losses, entropy, factor, d_scale,
        programs, weights.weights, weights.totals, weights.stride, rows,
        *numbers.normalizer, numbers.m, D, numbers.omega,
        m=m, STUDENTS=students, WEIGHTED_LAYERS=numbers.weighted, LARGEST_LAYER_WEIGHT=numbers.largest,
        MEAN=numbers.mean, DETAILS=details, WITHOUT_FACTOR=without_factor,
        ACC=_TYPES[acc], WEIGHT_BLOCK=_WEIGHT_BLOCK, PARTIAL_BLOCK=max(1, 1024 // students), num_warps=8,
    )  # fmt: skip
    return loss, losses, attention, entropy, factor, d_scale


def _pool_weights(row_weights: Tensor | None, how: str, rows: int, length: int, acc: torch.dtype, device) -> Weights:
    if row_weights is None:
        if how == "last":
            return Weights(None, 1, 1, positions=torch.arange(length - 1, rows * length, length, device=device))
        return Weights(None, 1, length if how == "cls" else 1)
    flat = _flat(row_weights)
    if how in ("last", "mean"):
        pooled = flat.new_empty(rows, dtype=acc)
        extra = flat.new_empty(rows, dtype=torch.int64 if how == "last" else acc)
        sequence_kernel[(rows,)](
            flat, pooled, extra, extra, length, LAST=how == "last", BLOCK=_WEIGHT_BLOCK, DTYPE=_TYPES[acc]
        )
        weights = Weights(pooled, 1, 1)
        if how == "last":
            weights.positions = extra
        else:
            weights.sums = extra
    else:
        weights = Weights(flat, length, length)
    if rows > _FEW_ROWS:
        weights.totals = flat.new_empty(2, dtype=acc)
        totals_kernel[(1,)](
            weights.weights, weights.totals, rows, weights.stride, BLOCK=8 * _WEIGHT_BLOCK, DTYPE=_TYPES[acc],
            num_warps=16,
        )  # fmt: skip
    return weights


def _pool_mean(layers, row_weights, sums, rows, length, acc) -> list[Tensor]:
    (side,), inner_rows = as_rows(layers)
    D = layers[0].shape[-1]
    pooled = layers[0].new_empty((len(layers), rows, D), dtype=acc)
    columns = min(256, triton.next_power_of_2(D))
    mean_kernel[(rows, len(layers), triton.cdiv(D, columns))](
        side.tensors, side.layer_stride, pooled, _flat(row_weights), sums, rows, length, inner_rows,
        side.outer, side.inner,
        D=D, POINTERS=len(side.tensors), STRIDES=len(side.inner), TWO_STRIDES=side.two_strides,
        POSITIONS=16, COLUMNS=columns, ACC=_TYPES[acc],
    )  # fmt: skip
    return list(pooled.unbind(0))


def _spread(pooled, layers, row_weights, sums, rows, length, acc) -> None:
    pairs = [(p, d) for p, d in zip(pooled, layers, strict=True) if d is not None]
    if not pairs:
        return
    D = pairs[0][0].shape[-1]
    columns = min(256, triton.next_power_of_2(D))
    spread_kernel[(rows, len(pairs), triton.cdiv(D, columns))](
        tuple(p for p, _ in pairs), tuple(d for _, d in pairs), _flat(row_weights), sums, length,
        D=D, LAYERS=len(pairs), POSITIONS=16, COLUMNS=columns, ACC=_TYPES[acc],
    )  # fmt: skip


def _flat(row_weights: Tensor | None) -> Tensor | None:
    if row_weights is None:
        return None
    flat = row_weights.contiguous()
    return flat.view(torch.uint8) if flat.dtype == torch.bool else flat


def _gradients(layers: list[Tensor], wanted: list[bool], active: list[int], how: str) -> list[Tensor | None]:
    """Contiguous gradients; zeros where no kernel writes every element."""
    gradients = [h.new_empty(h.shape) if w else None for h, w in zip(layers, wanted, strict=True)]
    keep = set(active) if how in ("token", "mean") else set()
    zeros = [g for k, g in enumerate(gradients) if g is not None and k not in keep]
    if zeros:
        torch._foreach_zero_(zeros)
    return gradients


def _allowed(counts: list[int], layers: list[int], m: int, n: int) -> list[list[int]]:
    if not counts:
        return [list(range(n))] * m
    table, start = [], 0
    for count in counts:
        table.append(layers[start : start + count])
        start += count
    return table


def _map_words(table: list[list[int]], n: int) -> tuple[tuple[int, ...], ...]:
    bits = MAP_BITS.value
    frame = 1 | 1 << 62
    return tuple(
        tuple(frame | sum(1 << (j - start + 1) for j in layers if start <= j < start + bits) for layers in table)
        for start in range(0, n, bits)
    )


def _scatter(compact: Tensor, active: list[int], total: int, dim: int) -> Tensor:
    """Spread compact's slices over ``total`` places of dimension dim, zeros between."""
    if len(active) == total:
        return compact
    slices = dict(zip(active, compact.unbind(dim), strict=True))
    zeros = torch.zeros_like(next(iter(slices.values())))
    return torch.stack([slices.get(k, zeros) for k in range(total)], dim)


def _some(gradients: list[Tensor | None]) -> list[Tensor]:
    return [g for g in gradients if g is not None]


def _filled(gradients: list[Tensor | None]) -> tuple[Tensor, ...] | None:
    """A pointer for every layer; what stands for an unwanted one is never written."""
    some = _some(gradients)
    return tuple(some[0] if g is None else g for g in gradients) if some else None


def _bits(gradients: list[Tensor | None]) -> int:
    return sum(1 << k for k, g in enumerate(gradients) if g is not None)


def _two_floats(x: float) -> tuple[float, float]:
    high = ctypes.c_float(x).value
    return high, x - high if math.isfinite(high) else 0.0


def _precision(operand: torch.dtype) -> str:
    """Of products of fp32 matrices: three tf32 products are as good as one in fp32."""
    if INTERPRETED.value or operand == torch.float64 or _target().startswith("gfx"):
        return "ieee"
    return "tf32" if operand == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


def _target() -> str:
    """An NVIDIA architecture such as "90", or an AMD one such as "gfx942"; the interpreter stands in for "90"."""
    return "90" if INTERPRETED.value else str(triton.runtime.driver.active.get_current_target().arch)


def _programs(device: torch.device) -> int:
    if device.type == "cpu":
        return 4
    return _PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
