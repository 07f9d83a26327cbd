"""Pooling "mean": weighted means over a sequence's positions, and their gradients spread back over them."""

import triton
import triton.language as tl

from .common import layer_addresses, narrowed, row_offset, row_weight, select


@triton.jit
def sequence_total(p_sums, sequence, length, DTYPE: tl.constexpr):
    """Sum of a sequence's weights; 1 where all are 0."""
    if p_sums is None:
        return tl.cast(length, DTYPE)
    else:
        total = tl.load(p_sums + sequence)
        return tl.where(total == 0, 1.0, total)


@triton.jit
def mean_kernel(
    layers, layer_stride, p_pooled, p_weights, p_sums, sequences, length, inner, outers, inners,
    D: tl.constexpr, POINTERS: tl.constexpr, STRIDES: tl.constexpr, TWO_STRIDES: tl.constexpr,
    POSITIONS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """p_pooled (layers, sequences, D): Σ_k μ_k h_k / Σ_k μ_k. Positions of weight 0 are not read."""
    sequence = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    m_d = o_d < D
    o_layer = tl.zeros((POSITIONS,), tl.int32) + tl.program_id(1)
    p_layer = layer_addresses(layers, layer_stride, o_layer, POINTERS)
    o_outer = select(outers, o_layer.to(tl.int64), STRIDES)
    o_inner = select(inners, o_layer.to(tl.int64), STRIDES)
    total = sequence_total(p_sums, sequence, length, ACC)
    b_sum = tl.zeros((POSITIONS, COLUMNS), ACC)
    for start in range(0, length, POSITIONS):
        o_position = start + tl.arange(0, POSITIONS).to(tl.int64)
        m_position = o_position < length
        b_weight = row_weight(p_weights, sequence * length + o_position, m_position, ACC)
        p_row = p_layer + row_offset(sequence * length + o_position, inner, o_outer, o_inner, TWO_STRIDES)
        m_block = (m_position & (b_weight != 0))[:, None] & m_d[None, :]
        b_rows = tl.load(p_row[:, None] + o_d[None, :], mask=m_block, other=0.0).to(ACC)
        b_sum += b_rows * (b_weight / total)[:, None]
    p_out = p_pooled + (tl.program_id(1).to(tl.int64) * sequences + sequence) * D + o_d
    tl.store(p_out, tl.sum(b_sum, 0), mask=m_d)


@triton.jit
def spread_kernel(
    d_pooled, d_layers, p_weights, p_sums, length,
    D: tl.constexpr, LAYERS: tl.constexpr, POSITIONS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """d_layers, contiguous: dh_k = μ_k / Σ_k μ_k times the pooled row's gradient."""
    sequence = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    m_d = o_d < D
    o_layer = tl.zeros((1,), tl.int32) + tl.program_id(1)
    b_pooled = tl.load(select(d_pooled, o_layer, LAYERS)[:, None] + sequence * D + o_d[None, :], mask=m_d[None, :],
                       other=0.0)  # fmt: skip
    p_layer = select(d_layers, o_layer, LAYERS)[:, None]
    total = sequence_total(p_sums, sequence, length, ACC)
    for start in range(0, length, POSITIONS):
        o_position = start + tl.arange(0, POSITIONS).to(tl.int64)
        m_position = o_position < length
        b_weight = row_weight(p_weights, sequence * length + o_position, m_position, ACC)
        b_rows = tl.where((b_weight != 0)[:, None], b_pooled * (b_weight / total)[:, None], 0.0)
        p_rows = p_layer + ((sequence * length + o_position) * D)[:, None] + o_d[None, :]
        tl.store(p_rows, narrowed(b_rows, p_rows.dtype.element_ty), mask=m_position[:, None] & m_d[None, :])
