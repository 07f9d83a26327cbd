// Vectors by the compiler's own vector extension, one width per instruction set. No includes of the
// C++ library: everything here is compiled once per instruction set, in that set's namespace.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "problem.h"

namespace alp::ALP_ISA {
namespace {

template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(ALP_VECTOR_BYTES)));
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
constexpr int kWidth = ALP_VECTOR_BYTES / sizeof(A);

// V is a vector or the scalar itself: the scalar forms serve the columns after the last full vector.
template <class V, class A>
inline V load(const A* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
template <class V, class A>
inline void store(A* p, V v) {
  __builtin_memcpy(p, &v, sizeof(V));
}

template <class A>
inline A sum(Vec<A> v) {
  // Halving keeps the additions independent; the order is fixed by the code, not by the data.
  A lane[kWidth<A>];
  __builtin_memcpy(lane, &v, sizeof v);
  for (int half = kWidth<A> / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lane[k] += lane[k + half];
  return lane[0];
}

// ---- bf16 and fp16, held as their bits ----------------------------------------------------------

inline float bf16_to_float(uint16_t bits) { return __builtin_bit_cast(float, uint32_t(bits) << 16); }

inline uint16_t float_to_bf16(float x) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  if (x != x) return uint16_t(bits >> 16 | 0x40);  // rounding must not carry a NaN into infinity
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float fp16_to_float(uint16_t bits) {
#if defined(__F16C__)
  return _cvtsh_ss(bits);
#else
  const uint32_t sign = uint32_t(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
  if (exponent == 31) return __builtin_bit_cast(float, sign | 0x7f800000 | mantissa << 13);
  if (exponent == 0) {
    const float value = float(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  return __builtin_bit_cast(float, sign | (exponent + 112) << 23 | mantissa << 13);
#endif
}

inline uint16_t float_to_fp16(float x) {
#if defined(__F16C__)
  return _cvtss_sh(x, 0);
#else
  const uint32_t bits = __builtin_bit_cast(uint32_t, x), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x477ff000) return sign | 0x7c00;
  if (magnitude < 0x38800000) {
    // Adding 0.5 aligns the value's last fp16 bit (2^-24) with the float's last mantissa bit.
    const float aligned = __builtin_bit_cast(float, magnitude) + 0.5f;
    return sign | uint16_t(__builtin_bit_cast(uint32_t, aligned) - 0x3f000000);
  }
  return sign | uint16_t((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13);
#endif
}

template <class A>
inline A load_scalar(const char* row, Dtype type, int64_t d) {
  switch (type) {
    case Dtype::f32: return A(reinterpret_cast<const float*>(row)[d]);
    case Dtype::f64: return A(reinterpret_cast<const double*>(row)[d]);
    case Dtype::bf16: return A(bf16_to_float(reinterpret_cast<const uint16_t*>(row)[d]));
    default: return A(fp16_to_float(reinterpret_cast<const uint16_t*>(row)[d]));
  }
}

// Widen a row into the compute dtype.
template <class A>
void unpack(const char* row, Dtype type, A* out, int64_t D) {
  int64_t d = 0;
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const uint16_t* half = reinterpret_cast<const uint16_t*>(row);
    if (type == Dtype::bf16)
      for (; d + 16 <= D; d += 16) {
        const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(half + d));
        _mm512_storeu_si512(out + d, _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
      }
    if (type == Dtype::f16)
      for (; d + 16 <= D; d += 16)
        _mm512_storeu_ps(out + d, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half + d))));
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) {
    const uint16_t* half = reinterpret_cast<const uint16_t*>(row);
    if (type == Dtype::bf16)
      for (; d + 8 <= D; d += 8) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(half + d));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + d), _mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
      }
    if (type == Dtype::f16)
      for (; d + 8 <= D; d += 8)
        _mm256_storeu_ps(out + d, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + d))));
  }
#endif
  for (; d < D; ++d) out[d] = load_scalar<A>(row, type, d);
}

// ---- Stores of a gradient row: the compute dtype, the same past the caches, or a narrower dtype ------

enum class Out { plain, stream, f32, bf16, f16 };

template <Out kOut, class A>
inline void put(char* row, int64_t d, A x) {
  if constexpr (kOut == Out::bf16)
    reinterpret_cast<uint16_t*>(row)[d] = float_to_bf16(float(x));
  else if constexpr (kOut == Out::f16)
    reinterpret_cast<uint16_t*>(row)[d] = float_to_fp16(float(x));
  else if constexpr (kOut == Out::f32)
    reinterpret_cast<float*>(row)[d] = float(x);
  else
    reinterpret_cast<A*>(row)[d] = x;
}

#if defined(__AVX512F__)
template <Out kOut>
inline void put(char* row, int64_t d, Vec<float> x) {
  if constexpr (kOut == Out::bf16) {
    const __m512i bits = _mm512_castps_si512(__m512(x));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(__m512(x), __m512(x), _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + 2 * d), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
  } else if constexpr (kOut == Out::f16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + 2 * d), _mm512_cvtps_ph(__m512(x), 0));
  } else if constexpr (kOut == Out::stream) {
    _mm512_stream_ps(reinterpret_cast<float*>(row) + d, __m512(x));
  } else {
    store(reinterpret_cast<float*>(row) + d, x);
  }
}
template <Out kOut>
inline void put(char* row, int64_t d, Vec<double> x) {
  if constexpr (kOut == Out::stream)
    _mm512_stream_pd(reinterpret_cast<double*>(row) + d, __m512d(x));
  else if constexpr (kOut == Out::plain)
    store(reinterpret_cast<double*>(row) + d, x);
  else
    for (int k = 0; k < kWidth<double>; ++k) put<kOut>(row, d + k, x[k]);
}
#else
template <Out kOut, class A>
inline void put_vector(char* row, int64_t d, Vec<A> x) {
  if constexpr (kOut == Out::plain || kOut == Out::stream)
    store(reinterpret_cast<A*>(row) + d, x);
  else
    for (int k = 0; k < kWidth<A>; ++k) put<kOut>(row, d + k, x[k]);
}
template <Out kOut>
inline void put(char* row, int64_t d, Vec<float> x) {
#if defined(__AVX2__)
  if constexpr (kOut == Out::f16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + 2 * d), _mm256_cvtps_ph(__m256(x), 0));
    return;
  }
  if constexpr (kOut == Out::stream) {
    _mm256_stream_ps(reinterpret_cast<float*>(row) + d, __m256(x));
    return;
  }
#endif
  put_vector<kOut, float>(row, d, x);
}
template <Out kOut>
inline void put(char* row, int64_t d, Vec<double> x) {
  put_vector<kOut, double>(row, d, x);
}
#endif

inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();  // streamed stores become visible to the threads that read the gradient
#endif
}

// ---- exp(x) for x <= 0, at most 1 ulp off in float over the range that matters ----------------------

template <class V>
inline V exp_nonpositive(V x) {
  // x = k ln 2 + f with |f| <= ln 2 / 2; exp f by its Taylor polynomial of degree 7, then times 2^k.
  const float lowest = -87.0f;  // exp of it is the smallest normal float; below, the softmax weight is 0 to fp32
  const V far = V{} + lowest;
  const V clamped = x < far ? far : x;  // NaN stays NaN
  const V shifter = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const V k = (clamped * 1.44269504088896341f + shifter) - shifter;
  const V f = (clamped - k * 0.693359375f) + k * 2.12194440e-4f;
  V p = V{} + 1.0f / 5040;
  p = p * f + 1.0f / 720;
  p = p * f + 1.0f / 120;
  p = p * f + 1.0f / 24;
  p = p * f + 1.0f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.0f;
  p = p * f + 1.0f;
  typedef int32_t Int __attribute__((vector_size(sizeof(V))));
  const Int exponent = __builtin_convertvector(k, Int);
  const Int power = (exponent + 127) << 23;
  const V result = p * (V)power;  // the bits, not the value
  return x < far ? V{} : result;
}

}  // namespace
}  // namespace alp::ALP_ISA
