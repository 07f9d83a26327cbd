"""Multiplication of stored gradients by the incoming gradient, which is read on the device."""

import triton
import triton.language as tl

from .common import narrowed, select


@triton.jit(do_not_specialize=["size"])
def scale_kernel(
    gradients, size, p_factor, p_grad_factor,
    TENSORS: tl.constexpr, BLOCK: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Multiply TENSORS contiguous tensors of one dtype and size in place; a factor of 1 ends at once."""
    factor = tl.load(p_factor)
    if p_grad_factor is not None:
        factor = factor * tl.load(p_grad_factor)
    if factor != 1:
        o_tensor = tl.zeros((BLOCK,), tl.int32) + tl.program_id(1)
        p_tensor = select(gradients, o_tensor, TENSORS)
        for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
            o_element = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            p_block = tl.max_contiguous(tl.multiple_of(p_tensor + o_element, ALIGNMENT), BLOCK)
            m_block = o_element < size
            b_gradient = tl.load(p_block, mask=m_block, other=0.0).to(factor.dtype) * factor
            tl.store(p_block, narrowed(b_gradient, p_block.dtype.element_ty), mask=m_block)
