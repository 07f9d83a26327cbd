// Values of small tensors, read and written on the host.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "../tensors.h"

namespace alp {

inline float narrow_to_float(uint16_t bits, bool bf16) {
  if (bf16) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  const int exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
  const float sign = bits & 0x8000 ? -1.f : 1.f;
  if (exponent == 31) return mantissa ? std::numeric_limits<float>::quiet_NaN() : sign * HUGE_VALF;
  return sign * std::ldexp(float(exponent ? mantissa + 1024 : mantissa), (exponent ? exponent : 1) - 25);
}

template <class T>
void widen(const void* data, int64_t begin, int64_t count, double* out) {
  const T* values = static_cast<const T*>(data) + begin;
  for (int64_t k = 0; k < count; ++k) out[k] = double(values[k]);
}

// Elements begin … begin + count of a contiguous tensor of any real dtype, as doubles.
inline void widen(const void* data, WeightType type, int64_t begin, int64_t count, double* out) {
  switch (type) {
    case WeightType::none: std::fill(out, out + count, 1.0); return;
    case WeightType::boolean: return widen<bool>(data, begin, count, out);
    case WeightType::u8: return widen<uint8_t>(data, begin, count, out);
    case WeightType::i8: return widen<int8_t>(data, begin, count, out);
    case WeightType::i16: return widen<int16_t>(data, begin, count, out);
    case WeightType::i32: return widen<int32_t>(data, begin, count, out);
    case WeightType::i64: return widen<int64_t>(data, begin, count, out);
    case WeightType::f32: return widen<float>(data, begin, count, out);
    case WeightType::f64: return widen<double>(data, begin, count, out);
    case WeightType::f16:
    case WeightType::bf16:
      for (int64_t k = 0; k < count; ++k)
        out[k] = narrow_to_float(static_cast<const uint16_t*>(data)[begin + k], type == WeightType::bf16);
  }
}

inline double scalar_value(const Tensor& tensor) {
  double value = 0;
  widen(tensor.data_ptr(), weight_dtype(tensor), 0, 1, &value);
  return value;
}

inline void fill(Tensor& tensor, bool f64, const double* values, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    if (f64)
      static_cast<double*>(tensor.data_ptr())[k] = values[k];
    else
      static_cast<float*>(tensor.data_ptr())[k] = float(values[k]);
  }
}

}  // namespace alp
