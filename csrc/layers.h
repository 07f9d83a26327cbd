// The words that every backend and its host side share: dtypes, pooling, and a layer's rows. Plain data, no torch
// types and no C++ library.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define ALP_HOST_DEVICE __host__ __device__
#else
#define ALP_HOST_DEVICE
#endif

namespace alp {

enum class Dtype : int8_t { f32, f64, bf16, f16 };
enum class WeightType : int8_t { none, boolean, u8, i8, i16, i32, i64, f16, bf16, f32, f64 };
enum class Pooling : int8_t { token, cls, last, mean };

// static: an inline function would be merged across instruction sets, and with it the choice of instructions.
ALP_HOST_DEVICE static constexpr int64_t dtype_size(Dtype t) { return t == Dtype::f64 ? 8 : t == Dtype::f32 ? 4 : 2; }

// One hidden state (*lead, D), seen as rows of D contiguous elements at two strides.
struct Layer {
  const char* data;
  char* grad;            // contiguous (*lead, D) in the layer's dtype, or null where unwanted
  int64_t inner;         // rows per outer step; 0 where one stride reaches every row
  int64_t outer_stride;  // bytes
  int64_t inner_stride;  // bytes
};

}  // namespace alp
