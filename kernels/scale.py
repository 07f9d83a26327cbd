"""Multiplication of stored gradients by the incoming gradient, which is read on the device."""

import triton
import triton.language as tl

from .common import narrowed, select
from .weights import scan_sequence


@triton.jit(do_not_specialize=["rows", "vectors", "length", "position"])
def scale_kernel(
    gradients, rows, vectors, length, position, p_weights, p_factor, p_grad_factor,
    TENSORS: tl.constexpr, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr, WEIGHT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Multiply in place one row of every ``length``, of TENSORS contiguous tensors of one dtype and shape: the one at
    the position, or the last one of non-zero weight where weights are given. A factor of 1 ends at once.

    A row is ``vectors`` vectors of ALIGNMENT bytes, so that the compiler knows that the mask cuts none of them.
    """
    factor = tl.load(p_factor)
    if p_grad_factor is not None:
        factor = factor * tl.load(p_grad_factor)
    if factor != 1:
        o_tensor = tl.zeros((BLOCK,), tl.int32) + tl.program_id(1)
        p_tensor = select(gradients, o_tensor, TENSORS)
        width = tl.cast(vectors, tl.int64) * (ALIGNMENT * 8 // p_tensor.dtype.element_ty.primitive_bitwidth)
        blocks = tl.cdiv(width, BLOCK).to(tl.int32)
        for block in range(tl.program_id(0), rows * blocks, tl.num_programs(0)):
            row = tl.cast(block // blocks, tl.int64)
            if p_weights is None:
                first = row * length + position
            else:
                _, last, _ = scan_sequence(p_weights, row, length, WEIGHT_BLOCK, factor.dtype)
                first = row * length + last
            o_element = tl.cast(block % blocks, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            p_row = p_tensor + first * width
            p_block = tl.max_contiguous(tl.multiple_of(p_row + o_element, ALIGNMENT), BLOCK)
            m_block = o_element < width
            b_gradient = tl.load(p_block, mask=m_block, other=0.0).to(factor.dtype) * factor
            tl.store(p_block, narrowed(b_gradient, p_block.dtype.element_ty), mask=m_block)
