"""The fused kernel: the loss and its gradients in one pass over the rows.

A program takes one row after the other. A row's m student and n teacher vectors of D columns are cut into blocks
of COLUMNS; within a block each of SPLIT warps has its own columns, so that the products below are batched matrix
products over warps on the matrix units and the only sums across warps are the (n, n) and (n, m) Gram matrices.

    pass 1   Z = T Sᵀ (n, m) and G = T Tᵀ (n, n), from the operands as stored: exact products, fp32 sums
    between  the attention a, p, c and with them all coefficients, on (n, m) matrices
    pass 2   e = β s − Tᵀ A₁,  ds = 2w (α s − Tᵀ A₂),  dt = Sᵀ P + Tᵀ Q, block by block

Pass 2 reads the row again: its few KiB are in the first-level cache, whose lines pass 1 asks to keep. ‖e‖² comes
from e itself, never from the Gram matrix; only p does. 16-bit coefficients go in as a high and a low part.

Teacher layers lie along the M side of every product and student layers along N, which may be as short as 8.
Names: b_ block values, p_ pointers, o_ offsets, m_ masks; j counts teacher layers (n, padded to TEACHERS), i
student layers (m, padded to STUDENTS), d columns.
"""

# ruff: noqa: SIM108, SIM300 (compile-time branches stay ifs; dtypes are no constants on the wrong side)
import triton
import triton.language as tl

from .common import (
    divisor,
    layer_addresses,
    narrowed,
    number,
    row_offset,
    row_weight,
    select,
    wanted,
    weight_totals,
)

MAP_BITS = tl.constexpr(60)  # teacher layers per word of the layer map


@triton.jit
def block_pointers(p_layer, o_column, ALIGNMENT: tl.constexpr, WIDTH: tl.constexpr):
    """(SPLIT, layers, WIDTH) pointers; the compiler sees runs of WIDTH elements at the promised alignment."""
    p_block = p_layer[None, :, None] + o_column
    return tl.max_contiguous(tl.multiple_of(p_block, (1, 1, ALIGNMENT)), (1, 1, WIDTH))


@triton.jit
def load_block(p_block, m_layer, o_column, start, D: tl.constexpr, COLUMNS: tl.constexpr, DTYPE: tl.constexpr,
               EVICTION: tl.constexpr):  # fmt: skip
    m_block = m_layer[None, :, None]
    if D % COLUMNS != 0:
        m_block = m_block & (start + o_column < D)
    return tl.load(p_block + start, mask=m_block, other=0.0, eviction_policy=EVICTION).to(DTYPE)


@triton.jit
def store_block(p_block, b_block, m_layer, o_column, start, D: tl.constexpr, COLUMNS: tl.constexpr):
    """Store a (SPLIT, WIDTH, layers) block as (SPLIT, layers, WIDTH)."""
    m_block = m_layer[None, :, None]
    if D % COLUMNS != 0:
        m_block = m_block & (start + o_column < D)
    b_block = tl.permute(narrowed(b_block, p_block.dtype.element_ty), (0, 2, 1))
    tl.store(p_block + start, b_block, mask=m_block)


@triton.jit
def coefficients(b_value, SPLIT: tl.constexpr, DTYPE: tl.constexpr):
    """A (K, N) coefficient matrix as operands of combine(): high and low part, factor per column.

    One rounding of the attention to 16 bits would put an error of the order of e into e, so the rest goes in
    too. fp16 has not the range for every coefficient: each column is divided by its largest.
    """
    K: tl.constexpr = b_value.shape[0]
    N: tl.constexpr = b_value.shape[1]
    b_factor = tl.full((N,), 1.0, b_value.dtype)
    if DTYPE == tl.float16:
        b_largest = tl.max(tl.abs(b_value), 0)
        b_factor = tl.where(b_largest > 0, b_largest, 1.0)
        b_value = b_value / b_factor[None, :]
    b_high = b_value.to(DTYPE)
    b_low = (b_value - b_high.to(b_value.dtype)).to(DTYPE)
    return tl.broadcast_to(b_high[None], (SPLIT, K, N)), tl.broadcast_to(b_low[None], (SPLIT, K, N)), b_factor


@triton.jit
def combine(b_rows, b_high, b_low, b_factor, ACC: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """Σ_k rows[k] coefficient[k]: (SPLIT, WIDTH, K) times (K, N)."""
    b_sum = tl.dot(b_rows, b_high, input_precision=PRECISION, out_dtype=ACC)
    if DTYPE == tl.float16 or DTYPE == tl.bfloat16:
        b_sum = tl.dot(b_rows, b_low, b_sum, input_precision=PRECISION, out_dtype=ACC)
    if DTYPE == tl.float16:
        b_sum = b_sum * b_factor[None, None, :]
    return b_sum


# The number of rows changes from batch to batch: one compilation serves all.
@triton.jit(do_not_specialize=["rows"])
def alp_kernel(
    student, teacher, d_student, d_teacher,  # tuples of pointers
    student_layer_stride, teacher_layer_stride,  # where the tuple holds one pointer for all layers
    student_outer, student_inner, teacher_outer, teacher_inner,  # tuples of row strides: one, or one per layer
    inner,  # rows per outer stride
    p_weights, p_positions, p_totals, weight_stride,
    p_attention, p_partials,
    rows, row_stride,  # pooled rows, and positions from one to the next
    scale_high, scale_low, p_scale, normalizer_high, normalizer_low, p_normalizer, students_in_mean,
    layer_weights, map_words,  # tuples of tuples, per student layer: high and low parts; words of MAP_BITS layers
    m: tl.constexpr, n: tl.constexpr, D: tl.constexpr,
    STUDENTS: tl.constexpr, TEACHERS: tl.constexpr, SPLIT: tl.constexpr, WIDTH: tl.constexpr,
    STUDENT_POINTERS: tl.constexpr, TEACHER_POINTERS: tl.constexpr,
    STUDENT_STRIDES: tl.constexpr, TEACHER_STRIDES: tl.constexpr, TWO_STRIDES: tl.constexpr,
    STUDENT_ALIGNMENT: tl.constexpr, TEACHER_ALIGNMENT: tl.constexpr, GRADIENT_ALIGNMENT: tl.constexpr,
    STUDENT_GRADS: tl.constexpr, TEACHER_GRADS: tl.constexpr, SCALE_GRAD: tl.constexpr,  # bit k: layer k's is wanted
    MAP: tl.constexpr, WEIGHTED_LAYERS: tl.constexpr, LARGEST_LAYER_WEIGHT: tl.constexpr,
    MEAN: tl.constexpr, NORMALIZE: tl.constexpr, DETACH: tl.constexpr, DETAILS: tl.constexpr,
    WITHOUT_FACTOR: tl.constexpr,  # fp16: gradients are stored without the factor that holds 1/N
    OPERAND: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, WEIGHT_BLOCK: tl.constexpr,
    OPERAND_NAME: tl.constexpr,  # for tune.py
    UNROLL: tl.constexpr,
):  # fmt: skip
    COLUMNS: tl.constexpr = SPLIT * WIDTH
    GRADS: tl.constexpr = STUDENT_GRADS != 0 or TEACHER_GRADS != 0 or SCALE_GRAD
    THROUGH: tl.constexpr = GRADS and not DETACH  # the gradient flows through the attention
    GRAM: tl.constexpr = THROUGH or NORMALIZE
    EPS: tl.constexpr = 1e-12

    o_i = tl.arange(0, STUDENTS)
    o_j = tl.arange(0, TEACHERS)
    m_i = o_i < m
    m_j = o_j < n
    m_ds = wanted(o_i, STUDENT_GRADS, m)
    m_dt = wanted(o_j, TEACHER_GRADS, n)
    o_column = tl.arange(0, SPLIT)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    p_s = layer_addresses(student, student_layer_stride, o_i, STUDENT_POINTERS)
    p_t = layer_addresses(teacher, teacher_layer_stride, o_j, TEACHER_POINTERS)
    o_s_outer = select(student_outer, o_i.to(tl.int64), STUDENT_STRIDES)
    o_s_inner = select(student_inner, o_i.to(tl.int64), STUDENT_STRIDES)
    o_t_outer = select(teacher_outer, o_j.to(tl.int64), TEACHER_STRIDES)
    o_t_inner = select(teacher_inner, o_j.to(tl.int64), TEACHER_STRIDES)
    if STUDENT_GRADS:
        p_ds = select(d_student, o_i, m)
    if TEACHER_GRADS:
        p_dt = select(d_teacher, o_j, n)

    m_allowed = m_j[:, None] & m_i[None, :]
    if MAP:
        b_allowed = tl.zeros((TEACHERS, STUDENTS), tl.int32)
        for chunk in tl.static_range((n + MAP_BITS - 1) // MAP_BITS):
            # Bit 0 and bit 62 of every word are set, whatever the map: one compilation serves all maps.
            b_word = select(map_words[chunk], o_i.to(tl.int64), m)
            o_bit = o_j - chunk * MAP_BITS
            m_bit = (o_bit >= 0) & (o_bit < MAP_BITS)
            b_bit = (b_word[None, :] >> tl.where(m_bit, o_bit + 1, 0).to(tl.int64)[:, None]) & 1
            b_allowed = tl.where(m_bit[:, None], b_bit.to(tl.int32), b_allowed)
        m_allowed = m_allowed & (b_allowed != 0)

    if p_scale is not None:
        scale = tl.load(p_scale).to(ACC)
    else:
        scale = number(scale_high, scale_low, ACC)
    b_total, b_largest = weight_totals(p_weights, p_totals, rows, weight_stride, WEIGHT_BLOCK, ACC)
    N = divisor(b_total, number(normalizer_high, normalizer_low, ACC), p_normalizer, students_in_mean, D, MEAN, ACC)
    # 2 ω_i / N; without a factor 2 max ω max μ / N for fp16, so that w is at most 1
    b_omega = m_i.to(ACC)
    if WEIGHTED_LAYERS:
        b_omega = select(layer_weights[0], o_i, m).to(ACC) + select(layer_weights[1], o_i, m).to(ACC)
    if WITHOUT_FACTOR:
        share = tl.where(b_total == 0, 0.0, 1 / (b_largest * LARGEST_LAYER_WEIGHT))
    else:
        share = tl.where(b_total == 0, 0.0, 2 / N)
    b_share = b_omega * share

    b_squares = tl.zeros((SPLIT, WIDTH, STUDENTS), ACC)
    b_entropy = tl.zeros((STUDENTS,), ACC)
    b_d_scale = tl.zeros((STUDENTS,), ACC)
    for row in tl.range(tl.program_id(0), rows, tl.num_programs(0), num_stages=1):
        r = tl.cast(row, tl.int64)
        position = r * row_stride
        if p_positions is not None:
            position = tl.load(p_positions + r)
        mu = row_weight(p_weights, r * weight_stride, r < rows, ACC)
        # A row of weight 0 is not read: zeros take its place, and all that follows stays 0.
        m_s = m_i & (tl.broadcast_to(mu, (STUDENTS,)) != 0)
        m_t = m_j & (tl.broadcast_to(mu, (TEACHERS,)) != 0)
        p_s_row = p_s + row_offset(position, inner, o_s_outer, o_s_inner, TWO_STRIDES)
        p_t_row = p_t + row_offset(position, inner, o_t_outer, o_t_inner, TWO_STRIDES)
        p_s_block = block_pointers(p_s_row, o_column, STUDENT_ALIGNMENT, WIDTH)
        p_t_block = block_pointers(p_t_row, o_column, TEACHER_ALIGNMENT, WIDTH)

        # ---- pass 1: Z = T Sᵀ, G = T Tᵀ, ‖s‖²
        b_z = tl.zeros((SPLIT, TEACHERS, STUDENTS), ACC)
        b_g = tl.zeros((SPLIT, TEACHERS, TEACHERS), ACC)
        b_ss = tl.zeros((SPLIT, STUDENTS), ACC)
        for start in tl.range(0, D, COLUMNS, loop_unroll_factor=UNROLL, num_stages=1):
            b_t = load_block(p_t_block, m_t, o_column, start, D, COLUMNS, OPERAND, "evict_last")
            b_s = load_block(p_s_block, m_s, o_column, start, D, COLUMNS, OPERAND, "evict_last")
            b_z = tl.dot(b_t, tl.permute(b_s, (0, 2, 1)), b_z, input_precision=PRECISION, out_dtype=ACC)
            if GRAM:
                b_g = tl.dot(b_t, tl.permute(b_t, (0, 2, 1)), b_g, input_precision=PRECISION, out_dtype=ACC)
            if NORMALIZE:
                b_wide = b_s.to(ACC)
                b_ss += tl.sum(b_wide * b_wide, 2)
        b_z = tl.sum(b_z, 0)  # (n, m) ⟨t_j, s_i⟩

        # ---- the attention: a_ij = softmax_j(τ z_ij) over the layers that the map allows
        b_score = tl.where(m_allowed, scale * b_z, float("-inf"))
        b_top = tl.max(b_score, 0)
        b_a = tl.where(m_allowed, tl.exp(b_score - tl.where(m_i, b_top, 0.0)[None, :]), 0.0)
        b_a = b_a / tl.where(m_i, tl.sum(b_a, 0), 1.0)[None, :]
        if DETAILS:
            b_shown = tl.where(mu != 0, b_a, 0.0)
            if MAP:
                b_shown = tl.where(m_allowed, b_shown, 0.0)
            b_entropy -= mu * tl.sum(b_shown * tl.log(tl.where(b_shown == 0, 1.0, b_shown)), 0)
            p_shown = p_attention + (o_i.to(tl.int64)[None, :] * rows + r) * n + o_j[:, None]
            tl.store(p_shown, b_shown, mask=m_j[:, None] & m_i[None, :])

        if MAP:
            # In the products below 0 * NaN would carry a layer that is not finite beyond the layers that the map
            # joins it with. No z of such a layer is finite: the layer counts as zeros from here on. Lost is a student
            # layer that is one or may attend to one, and every teacher layer that it may attend to: a lost student
            # layer has no attention, and what is lost is set to NaN before pass 2.
            m_finite = tl.abs(b_z) < float("inf")
            m_s = m_s & (tl.max((m_finite & m_j[:, None]).to(tl.int32), 0) > 0)
            m_t_finite = tl.max((m_finite & m_i[None, :]).to(tl.int32), 1) > 0
            m_t = m_t & m_t_finite
            m_s_lost = tl.max((m_allowed & ~m_finite).to(tl.int32), 0) > 0
            m_t_lost = tl.max((m_allowed & m_s_lost[None, :]).to(tl.int32), 1) > 0
            b_a = tl.where(m_s_lost[None, :], 0.0, b_a)
            b_z = tl.where(m_finite, b_z, 0.0)

        # ---- the coefficients of e = β s − Σ_j A₁ t, ds = 2w (α s − Σ_j A₂ t), dt = Σ_i P s + Σ_k Q t
        b_inverse_s = tl.full((STUDENTS,), 1.0, ACC)
        b_inverse_c = tl.full((STUDENTS,), 1.0, ACC)
        b_alpha = tl.full((STUDENTS,), 1.0, ACC)
        b_kappa = tl.full((STUDENTS,), 1.0, ACC)
        b_p = b_z
        if GRAM:
            b_g = tl.sum(b_g, 0)
            if MAP:
                b_g = tl.where(m_t_finite[:, None] & m_t_finite[None, :], b_g, 0.0)
            b_ga = tl.dot(b_g, b_a, input_precision=PRECISION, out_dtype=ACC)  # (n, m) ⟨t_j, C_i⟩
            b_p = b_z - b_ga  # p_ij = ⟨e_i, t_j⟩
        if NORMALIZE:
            # With x̂ = x/‖x‖, cos = ⟨ŝ, Ĉ⟩: e = ŝ − Ĉ,  h_s = (cos ŝ − Ĉ)/‖s‖,  h_C = (ŝ − cos Ĉ)/‖C‖
            # (without the projection, e/ε, where a norm is below ε).
            b_cc = tl.sum(b_a * b_ga, 0)
            b_length_s = tl.sqrt(tl.sum(b_ss, 0))
            if MAP:
                b_length_s = tl.where(m_s_lost, 1.0, b_length_s)
            b_length_c = tl.sqrt(tl.where(b_cc < 0, 0.0, b_cc))
            b_inverse_s = 1 / tl.where(b_length_s < EPS, EPS, b_length_s)
            b_inverse_c = 1 / tl.where(b_length_c < EPS, EPS, b_length_c)
            b_off = 1 - tl.sum(b_a * b_z, 0) * b_inverse_s * b_inverse_c  # 1 − cos
            b_alpha = b_inverse_s * b_inverse_s * (1 - tl.where(b_length_s < EPS, 0.0, b_off))
            b_kappa = 1 - tl.where(b_length_c < EPS, 0.0, b_off)
            # p_ij = ⟨h_C, t_j⟩
            b_p = b_inverse_c[None, :] * (b_inverse_s[None, :] * b_z - (b_kappa * b_inverse_c)[None, :] * b_ga)
        b_w = b_share * mu  # 2 w
        b_a1 = b_a * b_inverse_c[None, :]
        b_a2 = b_a1 * b_inverse_s[None, :]
        b_c = tl.zeros((TEACHERS, STUDENTS), ACC)
        if THROUGH:
            # c_ij = a_ij (p_ij − Σ_j a_ij p_ij)
            b_c = b_a * (b_p - tl.sum(b_a * b_p, 0)[None, :])
            if SCALE_GRAD:
                b_d_scale -= b_w * tl.sum(b_c * b_z, 0)
            b_a2 = b_a2 + scale * b_c
        b_e_high, b_e_low, b_e_factor = coefficients(b_a1, SPLIT, OPERAND)
        if STUDENT_GRADS:
            p_ds_block = block_pointers(p_ds + position * D, o_column, GRADIENT_ALIGNMENT, WIDTH)
            b_ds_high, b_ds_low, b_ds_factor = coefficients(b_a2, SPLIT, OPERAND)
        if TEACHER_GRADS:
            p_dt_block = block_pointers(p_dt + position * D, o_column, GRADIENT_ALIGNMENT, WIDTH)
            # h = e, or h_C = ‖s‖⁻¹ ‖C‖⁻¹ s − cos ‖C‖⁻² C, so that dt_j = −Σ_i 2w (a_ij h_i + τ c_ij s_i) gives
            # P_ij = −2w (a_ij ‖s‖⁻¹ ‖C‖⁻¹ + τ c_ij) and Q_kj = Σ_i 2w cos ‖C‖⁻² a_ik a_ij
            b_weighted = b_a * (b_w * b_kappa * b_inverse_c * b_inverse_c)[None, :]
            b_q = tl.dot(b_weighted, tl.trans(b_a), input_precision=PRECISION, out_dtype=ACC)
            b_p_high, b_p_low, b_p_factor = coefficients(tl.trans(-b_a2 * b_w[None, :]), SPLIT, OPERAND)
            if MAP:
                b_q = tl.where(m_t_lost[None, :], float("nan"), b_q)
            b_q_high, b_q_low, b_q_factor = coefficients(b_q, SPLIT, OPERAND)

        if MAP:
            b_w = tl.where(m_s_lost, float("nan"), b_w)
            b_squares = tl.where(m_s_lost[None, None, :], float("nan"), b_squares)
            b_d_scale = tl.where(m_s_lost, float("nan"), b_d_scale)

        # ---- pass 2: e and the gradients
        for start in tl.range(0, D, COLUMNS, loop_unroll_factor=UNROLL, num_stages=1):
            b_t = load_block(p_t_block, m_t, o_column, start, D, COLUMNS, OPERAND, "evict_first")
            b_s = load_block(p_s_block, m_s, o_column, start, D, COLUMNS, OPERAND, "evict_first")
            b_t = tl.permute(b_t, (0, 2, 1))
            b_s = tl.permute(b_s, (0, 2, 1))
            b_wide = b_s.to(ACC)
            b_e = b_wide * b_inverse_s[None, None, :]
            b_e -= combine(b_t, b_e_high, b_e_low, b_e_factor, ACC, OPERAND, PRECISION)
            b_squares += b_e * b_e * mu
            if STUDENT_GRADS:
                b_ds = b_e
                if THROUGH or NORMALIZE:
                    b_ds = b_wide * b_alpha[None, None, :]
                    b_ds -= combine(b_t, b_ds_high, b_ds_low, b_ds_factor, ACC, OPERAND, PRECISION)
                store_block(p_ds_block, b_ds * b_w[None, None, :], m_ds, o_column, start, D, COLUMNS)
            if TEACHER_GRADS:
                b_dt = combine(b_s, b_p_high, b_p_low, b_p_factor, ACC, OPERAND, PRECISION)
                b_dt += combine(b_t, b_q_high, b_q_low, b_q_factor, ACC, OPERAND, PRECISION)
                store_block(p_dt_block, b_dt, m_dt, o_column, start, D, COLUMNS)

    # What the programs add up to is summed by finish_kernel, in a fixed order.
    p_partial = p_partials + tl.program_id(0) * (3 * STUDENTS)
    tl.store(p_partial + o_i, tl.sum(tl.sum(b_squares, 1), 0))
    tl.store(p_partial + STUDENTS + o_i, b_entropy)
    tl.store(p_partial + 2 * STUDENTS + o_i, b_d_scale)
