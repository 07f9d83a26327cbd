"""Layers as the kernels take them: pointers and row strides, found on the host without reading a value."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import gcd

from torch import Tensor


@dataclass(slots=True)
class Rows:
    """One side's layers seen as rows of D contiguous elements at one or two strides (in elements)."""

    tensors: tuple[Tensor, ...]  # one per layer, or the first where all lie at one stride in one tensor
    layer_stride: int  # elements from one layer to the next; 0 with a tensor per layer
    outer: tuple[int, ...]  # per layer, or one value for all
    inner: tuple[int, ...]
    two_strides: bool
    alignment: int  # bytes: of every row's start


def as_rows(*sides: list[Tensor]) -> tuple[list[Rows], int]:
    """Each side's rows, and the number of rows per outer stride, which is one for all layers.

    A layer is copied where its last dimension is not contiguous or that number does not fit it.
    """
    inner_rows = 0
    strides = [[_strides(h) for h in side] for side in sides]
    for found in (f for side in strides for f in side if f is not None and f[0]):
        inner_rows = found[0]
        break
    result = []
    for side, found in zip(sides, strides, strict=True):
        layers = []
        for h, f in zip(side, found, strict=True):
            if f is None or f[0] not in (0, inner_rows):
                h = h.contiguous()
                f = _strides(h)
            rows, outer, inner = f
            layers.append((h, outer if rows else inner_rows * inner, inner))
        result.append(_side(layers, inner_rows > 0))
    return result, max(inner_rows, 1)


def _strides(h: Tensor) -> tuple[int, int, int] | None:
    """(rows per outer stride or 0, outer stride, inner stride), or None where the layer must be copied."""
    if h.shape[-1] > 1 and h.stride(-1) != 1:
        return None
    merged: list[list[int]] = []  # [size, stride], innermost first
    for size, stride in zip(reversed(h.shape[:-1]), reversed(h.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1][0] *= size
        else:
            merged.append([size, stride])
    if len(merged) > 2:
        return None
    if len(merged) == 2:
        return merged[0][0], merged[1][1], merged[0][1]
    return 0, 0, merged[0][1] if merged else 0


def _side(layers: list[tuple[Tensor, int, int]], two_strides: bool) -> Rows:
    tensors = tuple(h for h, _, _ in layers)
    outer, inner = tuple(o for _, o, _ in layers), tuple(i for _, _, i in layers)
    itemsize = tensors[0].element_size()
    addresses = [h.data_ptr() for h in tensors]
    alignment = gcd(16, *addresses, *(itemsize * stride for stride in (*outer, *inner)))
    if len(set(outer)) == len(set(inner)) == 1:
        outer, inner = outer[:1], inner[:1]
        step = _one_step(tensors, addresses)
        if step is not None:
            return Rows(tensors[:1], step // itemsize, outer, inner, two_strides, alignment)
    return Rows(tensors, 0, outer, inner, two_strides, alignment)


def _one_step(tensors: tuple[Tensor, ...], addresses: list[int]) -> int | None:
    """Bytes from one layer to the next where they are slices of one tensor at a constant step."""
    steps = {b - a for a, b in pairwise(addresses)}
    storages = {h.untyped_storage().data_ptr() for h in tensors}
    return steps.pop() if len(steps) == 1 and len(storages) == 1 else None
