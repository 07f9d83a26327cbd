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

// Sum of the lanes. Halving keeps the additions independent; the order is fixed by the width alone.
template <class A, int kLanes, class V>
inline A sum(V v) {
  if constexpr (kLanes == 1) {
    return v[0];
  } else {
    typedef A Half __attribute__((vector_size(kLanes / 2 * sizeof(A))));
    Half low, high;
    __builtin_memcpy(&low, &v, sizeof low);
    __builtin_memcpy(&high, reinterpret_cast<char*>(&v) + sizeof low, sizeof high);
    return sum<A, kLanes / 2>(low + high);
  }
}

// Sums of four float vectors at once, in a quarter of the shuffles.
typedef float Quad __attribute__((vector_size(16)));
template <int kLanes, class V>
inline Quad fold(V v) {
  if constexpr (kLanes == 4) {
    return v;
  } else {
    typedef float Half __attribute__((vector_size(kLanes / 2 * sizeof(float))));
    Half low, high;
    __builtin_memcpy(&low, &v, sizeof low);
    __builtin_memcpy(&high, reinterpret_cast<char*>(&v) + sizeof low, sizeof high);
    return fold<kLanes / 2>(low + high);
  }
}
inline Quad sum4(Vec<float> v0, Vec<float> v1, Vec<float> v2, Vec<float> v3) {
  constexpr int W = kWidth<float>;
  const Quad q0 = fold<W>(v0), q1 = fold<W>(v1), q2 = fold<W>(v2), q3 = fold<W>(v3);
  const Quad pairs01 = __builtin_shufflevector(q0, q1, 0, 4, 1, 5) + __builtin_shufflevector(q0, q1, 2, 6, 3, 7);
  const Quad pairs23 = __builtin_shufflevector(q2, q3, 0, 4, 1, 5) + __builtin_shufflevector(q2, q3, 2, 6, 3, 7);
  return __builtin_shufflevector(pairs01, pairs23, 0, 1, 4, 5) + __builtin_shufflevector(pairs01, pairs23, 2, 3, 6, 7);
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

// The 16-bit dtypes as types, so that a product can read its rows as they lie in memory.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Bf16 x) { return bf16_to_float(x.bits); }
inline float widen(Fp16 x) { return fp16_to_float(x.bits); }

// kWidth<A> elements as a vector of the compute dtype.
inline Vec<float> load_row(const float* p) { return load<Vec<float>>(p); }
inline Vec<double> load_row(const double* p) { return load<Vec<double>>(p); }
inline Vec<float> load_row(const Bf16* p) {
  typedef uint16_t Bits __attribute__((vector_size(ALP_VECTOR_BYTES / 2)));
  typedef uint32_t Wide __attribute__((vector_size(ALP_VECTOR_BYTES)));
  Bits bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (Vec<float>)(__builtin_convertvector(bits, Wide) << 16);
}
inline Vec<float> load_row(const Fp16* p) {
#if defined(__AVX512F__)
  return Vec<float>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__F16C__) && ALP_VECTOR_BYTES == 32
  return Vec<float>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  Vec<float> v;
  for (int k = 0; k < kWidth<float>; ++k) v[k] = fp16_to_float(p[k].bits);
  return v;
#endif
}

// The same for one element: V is the vector or the scalar type.
template <class V, class T>
inline V load_as(const T* p) {
  if constexpr (sizeof(V) == ALP_VECTOR_BYTES)
    return load_row(p);
  else
    return V(widen(*p));
}

template <class A, class T>
void unpack_row(const char* row, A* out, int64_t D) {
  const T* x = reinterpret_cast<const T*>(row);
  int64_t d = 0;
  if constexpr (sizeof(A) == 4 && sizeof(T) <= 4)
    for (; d + kWidth<A> <= D; d += kWidth<A>) store(out + d, load_row(x + d));
  for (; d < D; ++d) out[d] = A(widen(x[d]));
}

// Widen a row into the compute dtype.
template <class A>
void unpack(const char* row, Dtype type, A* out, int64_t D) {
  switch (type) {
    case Dtype::f32: return unpack_row<A, float>(row, out, D);
    case Dtype::f64: return unpack_row<A, double>(row, out, D);
    case Dtype::bf16: return unpack_row<A, Bf16>(row, out, D);
    case Dtype::f16: return unpack_row<A, Fp16>(row, out, D);
  }
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

// The bits of kWidth<float> numbers in bf16, rounded to nearest even; NaN stays NaN.
inline auto to_bf16(Vec<float> x) {
  typedef uint32_t Wide __attribute__((vector_size(ALP_VECTOR_BYTES)));
  typedef uint16_t Bits __attribute__((vector_size(ALP_VECTOR_BYTES / 2)));
  const Wide bits = (Wide)x;
  const Wide rounded = x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;
  return __builtin_convertvector(rounded >> 16, Bits);
}

template <Out kOut>
inline void put(char* row, int64_t d, Vec<float> x) {
  if constexpr (kOut == Out::bf16) {
    const auto bits = to_bf16(x);
    __builtin_memcpy(row + 2 * d, &bits, sizeof bits);
#if defined(__AVX512F__)
  } else if constexpr (kOut == Out::f16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + 2 * d), _mm512_cvtps_ph(__m512(x), 0));
  } else if constexpr (kOut == Out::stream) {
    _mm512_stream_ps(reinterpret_cast<float*>(row) + d, __m512(x));
#elif defined(__AVX2__)
  } else if constexpr (kOut == Out::f16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + 2 * d), _mm256_cvtps_ph(__m256(x), 0));
  } else if constexpr (kOut == Out::stream) {
    _mm256_stream_ps(reinterpret_cast<float*>(row) + d, __m256(x));
#endif
  } else if constexpr (kOut == Out::f16) {
    for (int k = 0; k < kWidth<float>; ++k) put<kOut>(row, d + k, x[k]);
  } else {
    store(reinterpret_cast<float*>(row) + d, x);
  }
}
template <Out kOut>
inline void put(char* row, int64_t d, Vec<double> x) {
  if constexpr (kOut == Out::plain || kOut == Out::stream)
    store(reinterpret_cast<double*>(row) + d, x);
  else
    for (int k = 0; k < kWidth<double>; ++k) put<kOut>(row, d + k, x[k]);
}

inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();  // streamed stores become visible to the threads that read the gradient
#endif
}

// ---- exp(x) for x <= 0 ------------------------------------------------------------------------------

inline Vec<float> exp_nonpositive(Vec<float> x) {
  // x = k ln 2 + f with |f| <= ln 2 / 2; exp f by its Taylor polynomial of degree 7, then times 2^k.
  using V = Vec<float>;
  const V lowest = V{} - 87.0f;  // below, exp leaves the normal floats: a weight of 0 beside the maximum's 1
  const V clamped = x < lowest ? lowest : x;  // NaN stays NaN
  const V shifter = V{} + 12582912.0f;        // 1.5 * 2^23: adding it rounds to an integer
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
  typedef int32_t Int __attribute__((vector_size(ALP_VECTOR_BYTES)));
  const Int power = (__builtin_convertvector(k, Int) + 127) << 23;
  const V result = p * (V)power;  // the bits, not the value
  return x < lowest ? V{} : result;
}

inline Vec<double> exp_nonpositive(Vec<double> x) {
  for (int k = 0; k < kWidth<double>; ++k) x[k] = __builtin_exp(x[k]);
  return x;
}

}  // namespace
}  // namespace alp::ALP_ISA
