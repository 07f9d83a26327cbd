"""Device functions that several kernels share: layers in a tuple, row weights, numbers given as floats."""

# ruff: noqa: SIM300 (dtypes are no constants on the wrong side)
import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def select(values, o_layer, LAYERS: tl.constexpr):
    """values[o_layer], for a vector of layer indices and a tuple of scalars or pointers; a tuple of one serves all."""
    chosen = values[0] + tl.zeros_like(o_layer)
    for k in tl.static_range(1, LAYERS):
        chosen = tl.where(o_layer == k, values[k], chosen)
    return chosen


@triton.jit
def layer_addresses(pointers, layer_stride, o_layer, LAYERS: tl.constexpr):
    """First elements of the layers: a tuple of pointers, or one pointer and a stride."""
    if LAYERS == 1:
        return pointers[0] + o_layer.to(tl.int64) * layer_stride
    else:
        return select(pointers, o_layer, LAYERS)


@triton.jit
def row_offset(row, inner, b_outer, b_inner, TWO_STRIDES: tl.constexpr):
    """Elements from a layer's first row to the given one, per layer."""
    if TWO_STRIDES:
        return (row // inner) * b_outer + (row % inner) * b_inner
    else:
        return row * b_inner


@triton.jit
def wanted(o_layer, MASK: tl.constexpr, LAYERS: tl.constexpr):
    """Whether bit o_layer of MASK is set; layers behind the last are not wanted."""
    m_layer = o_layer < LAYERS
    for k in tl.static_range(LAYERS):
        if (MASK >> k) & 1 == 0:
            m_layer = m_layer & (o_layer != k)
    return m_layer


@triton.jit
def number(high, low, DTYPE: tl.constexpr):
    """A double handed over as two floats, as a kernel's float argument is single."""
    return tl.cast(high, DTYPE) + tl.cast(low, DTYPE)


@triton.jit
def row_weight(p_weights, o_row, m_row, DTYPE: tl.constexpr):
    """Row weights at o_row: 1 where none are given, a negative one counts as 0, NaN stays NaN."""
    if p_weights is None:
        return tl.where(m_row, 1.0, 0.0).to(DTYPE)
    else:
        b_weight = tl.load(p_weights + o_row, mask=m_row, other=0).to(DTYPE)
        return tl.where(b_weight < 0, 0.0, b_weight)


@triton.jit
def weight_totals(p_weights, p_totals, rows, stride, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Sum and maximum of the pooled rows' weights: known, computed before, or (few rows) summed here and now."""
    if p_weights is None:
        return tl.cast(rows, DTYPE), tl.full((), 1.0, DTYPE)
    elif p_totals is not None:
        return tl.load(p_totals), tl.load(p_totals + 1)
    else:
        b_sum = tl.zeros((BLOCK,), DTYPE)
        b_max = tl.zeros((BLOCK,), DTYPE)
        for start in range(0, rows, BLOCK):
            o_row = start + tl.arange(0, BLOCK).to(tl.int64)
            b_weight = row_weight(p_weights, o_row * stride, o_row < rows, DTYPE)
            b_sum += b_weight
            b_max = tl.maximum(b_max, b_weight)
        return tl.sum(b_sum, 0), tl.max(b_max, 0)


@triton.jit
def divisor(total, normalizer, p_normalizer, m, D, MEAN: tl.constexpr, DTYPE: tl.constexpr):
    """N: m * D * (sum of row weights, or what replaces it) for the mean, 1 for the sum."""
    if not MEAN:
        return total * 0 + 1
    elif p_normalizer is not None:
        return tl.load(p_normalizer).to(DTYPE) * m * D
    else:
        return tl.where(normalizer > 0, normalizer, total) * m * D


@triton.jit
def narrowed(b_value, DTYPE: tl.constexpr):
    """b_value in the dtype it is stored in, rounded to nearest: the interpreter would cut bf16 off."""
    if INTERPRETED and DTYPE == tl.bfloat16:
        b_bits = b_value.to(tl.float32).to(tl.int32, bitcast=True)
        b_rounded = ((b_bits + 0x7FFF + ((b_bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
        b_value = tl.where(b_value == b_value, b_rounded, b_value.to(tl.float32))
    return b_value.to(DTYPE)
