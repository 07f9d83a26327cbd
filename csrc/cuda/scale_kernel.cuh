// Multiplies gradients in place by a factor on the device; where it is 1, nothing is read or written.
#pragma once

#include "generic_kernel.cuh"

namespace alp::cuda {

constexpr int kScaleThreads = 256;

struct ScaleProblem {
  static constexpr int kMaxTensors = 96;
  const void *factor, *grad_factor;  // one element each; grad_factor may be null
  Dtype dtype, factor_dtype, grad_factor_dtype;
  int count;
  char* data[kMaxTensors];
  int64_t numel[kMaxTensors];
};

template <class A>
ALP_DEVICE void scale_element(char* data, Dtype type, int64_t at, A factor) {
  store_element(data, type, at, load_element<A>(data, type, at) * factor);
}

__global__ void __launch_bounds__(kScaleThreads) alp_scale_gradients(const __grid_constant__ ScaleProblem p) {
  double factor = load_element<double>(static_cast<const char*>(p.factor), p.factor_dtype, 0);
  if (p.grad_factor != nullptr)
    factor *= load_element<double>(static_cast<const char*>(p.grad_factor), p.grad_factor_dtype, 0);
  if (factor == 1) return;
  const int64_t first = int64_t(block_index()) * kScaleThreads + thread_index();
  const int64_t step = int64_t(grid_size()) * kScaleThreads;
  const int64_t per16 = 16 / dtype_size(p.dtype);
  for (int k = 0; k < p.count; ++k) {
    char* data = p.data[k];
    const bool aligned = reinterpret_cast<uintptr_t>(data) % 16 == 0;
    const int64_t vectors = aligned ? p.numel[k] / per16 : 0;
#pragma unroll 2
    for (int64_t v = first; v < vectors; v += step) {
      Bytes16 bytes = load16_mutable(data + 16 * v);
      char* elements = reinterpret_cast<char*>(&bytes);
      if (p.dtype == Dtype::f64) {
#pragma unroll
        for (int e = 0; e < 2; ++e) scale_element<double>(elements, p.dtype, e, factor);
      } else if (p.dtype == Dtype::f32) {
#pragma unroll
        for (int e = 0; e < 4; ++e) scale_element<float>(elements, p.dtype, e, float(factor));
      } else {
#pragma unroll
        for (int e = 0; e < 8; ++e) scale_element<float>(elements, p.dtype, e, float(factor));
      }
      store16_streaming(data + 16 * v, bytes);
    }
    for (int64_t at = vectors * per16 + first; at < p.numel[k]; at += step)
      scale_element<double>(data, p.dtype, at, factor);
  }
}

}  // namespace alp::cuda
