"""The second step of the reduction: the programs' partial sums become the operator's small outputs."""

import triton
import triton.language as tl

from .common import divisor, number, select, weight_totals


@triton.jit(do_not_specialize=["rows", "programs"])
def finish_kernel(
    p_partials, p_loss, p_layer_losses, p_entropy, p_grad_factor, p_d_scale,
    programs, p_weights, p_totals, weight_stride, rows,
    normalizer_high, normalizer_low, p_normalizer, students_in_mean, D, layer_weights,
    m: tl.constexpr, STUDENTS: tl.constexpr, WEIGHTED_LAYERS: tl.constexpr, LARGEST_LAYER_WEIGHT: tl.constexpr,
    MEAN: tl.constexpr, DETAILS: tl.constexpr, WITHOUT_FACTOR: tl.constexpr,
    ACC: tl.constexpr, WEIGHT_BLOCK: tl.constexpr, PARTIAL_BLOCK: tl.constexpr,
):  # fmt: skip
    o_i = tl.arange(0, STUDENTS)
    m_i = o_i < m
    b_squares = tl.zeros((PARTIAL_BLOCK, STUDENTS), ACC)
    b_entropy = tl.zeros((PARTIAL_BLOCK, STUDENTS), ACC)
    b_d_scale = tl.zeros((PARTIAL_BLOCK, STUDENTS), ACC)
    for start in range(0, programs, PARTIAL_BLOCK):
        o_program = start + tl.arange(0, PARTIAL_BLOCK)
        p_partial = p_partials + o_program[:, None] * (3 * STUDENTS) + o_i[None, :]
        m_partial = (o_program < programs)[:, None] & m_i[None, :]
        b_squares += tl.load(p_partial, mask=m_partial, other=0.0)
        b_entropy += tl.load(p_partial + STUDENTS, mask=m_partial, other=0.0)
        b_d_scale += tl.load(p_partial + 2 * STUDENTS, mask=m_partial, other=0.0)

    b_total, b_largest = weight_totals(p_weights, p_totals, rows, weight_stride, WEIGHT_BLOCK, ACC)
    N = divisor(b_total, number(normalizer_high, normalizer_low, ACC), p_normalizer, students_in_mean, D, MEAN, ACC)
    empty = b_total == 0
    N = tl.where(empty, 1.0, N)
    b_omega = m_i.to(ACC)
    if WEIGHTED_LAYERS:
        b_omega = select(layer_weights[0], o_i, m).to(ACC) + select(layer_weights[1], o_i, m).to(ACC)
    factor = tl.full((), 1.0, ACC)
    if WITHOUT_FACTOR:
        factor = tl.where(empty, 0.0, 2 * LARGEST_LAYER_WEIGHT * b_largest / N)
    b_losses = b_omega * tl.sum(b_squares, 0) / N  # ω_i ℓ_i / N
    tl.store(p_layer_losses + o_i, b_losses, mask=m_i)
    tl.store(p_loss, tl.sum(tl.where(m_i, b_losses, 0.0), 0))
    tl.store(p_grad_factor, factor)
    tl.store(p_d_scale, tl.sum(tl.sum(b_d_scale, 0), 0) * factor)
    if DETAILS:
        tl.store(p_entropy + o_i, tl.sum(b_entropy, 0) / tl.where(empty, 1.0, b_total), mask=m_i)
