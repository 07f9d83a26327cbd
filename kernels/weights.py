"""Row weights: what a sequence counts and which of its positions is read, and the sum over all rows."""

import triton
import triton.language as tl

from .common import row_weight, weight_totals


@triton.jit
def scan_sequence(p_weights, sequence, length, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Of one sequence of ``length`` positions: whether any weight is not 0, the last such position, and the sum."""
    b_last = tl.zeros((BLOCK,), tl.int64)
    b_counted = tl.zeros((BLOCK,), tl.int32)
    b_sum = tl.zeros((BLOCK,), DTYPE)
    for start in range(0, length, BLOCK):
        o_position = start + tl.arange(0, BLOCK).to(tl.int64)
        b_weight = row_weight(p_weights, sequence * length + o_position, o_position < length, DTYPE)
        b_counted = tl.maximum(b_counted, (b_weight != 0).to(tl.int32))
        b_last = tl.maximum(b_last, tl.where(b_weight != 0, o_position, 0))
        b_sum += b_weight
    return tl.max(b_counted, 0), tl.max(b_last, 0), tl.sum(b_sum, 0)


@triton.jit
def sequence_kernel(
    p_weights, p_pooled, p_positions, p_sums, length,
    LAST: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """One sequence of ``length`` positions: its pooled weight (1, or 0 where all weights are 0), and its last
    position of non-zero weight, or the sum of its weights."""
    sequence = tl.program_id(0).to(tl.int64)
    counted, last, total = scan_sequence(p_weights, sequence, length, BLOCK, DTYPE)
    if LAST:
        tl.store(p_pooled + sequence, counted.to(DTYPE))
        tl.store(p_positions + sequence, sequence * length + last)
    else:
        tl.store(p_pooled + sequence, (total != 0).to(DTYPE))
        tl.store(p_sums + sequence, total)


@triton.jit
def totals_kernel(p_weights, p_totals, rows, stride, BLOCK: tl.constexpr, DTYPE: tl.constexpr):
    """Sum and maximum of the rows' weights, by one program: the order of the sum is fixed."""
    total, largest = weight_totals(p_weights, None, rows, stride, BLOCK, DTYPE)
    tl.store(p_totals, total)
    tl.store(p_totals + 1, largest)
