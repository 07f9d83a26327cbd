// Multiplies gradients in place by a factor on the device; where it is 1, nothing is read or written.
#pragma once

#include "generic_kernel.cuh"

namespace alp::cuda {

constexpr int kScaleThreads = 512, kScaleBlocks = 3;  // to a multiprocessor: with more, ending at once takes longer

struct ScaleProblem {
  static constexpr int kMaxTensors = 96;
  const void *factor, *grad_factor;  // one element each; grad_factor may be null
  Dtype dtype, factor_dtype, grad_factor_dtype;
  Weights weights;  // of the pooled rows, which are multiplied, of D elements each
  int64_t blocks;   // that share a row; the grid is a multiple of it
  int count;
  char* data[kMaxTensors];
};

// One fp32 value or two 16-bit ones
ALP_DEVICE uint32_t scale_word(uint32_t word, Dtype type, float factor) {
  if (type == Dtype::f32) return float_bits(bits_float(word) * factor);
  const uint16_t low = uint16_t(word), high = uint16_t(word >> 16);
  return type == Dtype::bf16 ? pack<true>(bf16_to_float(low) * factor, bf16_to_float(high) * factor)
                             : pack<false>(fp16_to_float(low) * factor, fp16_to_float(high) * factor);
}

__global__ void __launch_bounds__(kScaleThreads) alp_scale_gradients(const __grid_constant__ ScaleProblem p) {
  double factor = load_element<double>(static_cast<const char*>(p.factor), p.factor_dtype, 0);
  if (p.grad_factor != nullptr)
    factor *= load_element<double>(static_cast<const char*>(p.grad_factor), p.grad_factor_dtype, 0);
  if (factor == 1) return;
  const float f = float(factor);
  if (p.dtype != Dtype::f64) factor = f;  // an element's rounding does not depend on the width of its access
  const Weights& w = p.weights;
  const int64_t first = (block_index() % p.blocks) * kScaleThreads + thread_index(), step = p.blocks * kScaleThreads;
  const int64_t size = dtype_size(p.dtype), per16 = 16 / size;
  for (int64_t k = block_index() / p.blocks; k < w.rows * p.count; k += grid_size() / p.blocks) {
    char* data = p.data[k % p.count] + find_row(w, k / p.count).position * w.D * size;
    const bool vectorised = p.dtype != Dtype::f64 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    const int64_t vectors = vectorised ? w.D / per16 : 0;
#pragma unroll 2
    for (int64_t v = first; v < vectors; v += step) {
      const Bytes16 b = load16(data + 16 * v);
      store16_streaming(data + 16 * v, {scale_word(b.x, p.dtype, f), scale_word(b.y, p.dtype, f),
                                        scale_word(b.z, p.dtype, f), scale_word(b.w, p.dtype, f)});
    }
    for (int64_t at = vectors * per16 + first; at < w.D; at += step)
      store_element(data, p.dtype, at, load_element<double>(data, p.dtype, at) * factor);
  }
}

}  // namespace alp::cuda
