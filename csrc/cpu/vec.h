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

// Lanes of two vectors by number, the second's after the first's.
#if __has_builtin(__builtin_shufflevector)
#define ALP_SHUFFLE __builtin_shufflevector
#else  // GCC 11
#define ALP_SHUFFLE(x, y, ...) __builtin_shuffle(x, y, QuadIndex{__VA_ARGS__})
#endif

// Sums of four float vectors at once, in a quarter of the shuffles.
typedef float Quad __attribute__((vector_size(16)));
typedef int32_t QuadIndex __attribute__((vector_size(16)));
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
  const Quad pairs01 = ALP_SHUFFLE(q0, q1, 0, 4, 1, 5) + ALP_SHUFFLE(q0, q1, 2, 6, 3, 7);
  const Quad pairs23 = ALP_SHUFFLE(q2, q3, 0, 4, 1, 5) + ALP_SHUFFLE(q2, q3, 2, 6, 3, 7);
  return ALP_SHUFFLE(pairs01, pairs23, 0, 1, 4, 5) + ALP_SHUFFLE(pairs01, pairs23, 2, 3, 6, 7);
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

// The 16-bit dtypes as types.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};
// bf16 that is widened, and rounded to, two vectors at a time: one of their even columns, one of their odd ones. In
// this order it takes one instruction for each, in the columns' own order two. Sums over columns do not care.
struct PairedBf16 {
  uint16_t bits;
};
template <class T>
constexpr int kSpan = 1;  // vectors of columns that belong together
template <>
constexpr int kSpan<PairedBf16> = 2;

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Bf16 x) { return bf16_to_float(x.bits); }
inline float widen(Fp16 x) { return fp16_to_float(x.bits); }
inline float widen(PairedBf16 x) { return bf16_to_float(x.bits); }

inline void narrow(double x, double* to) { *to = x; }
inline void narrow(double x, float* to) { *to = float(x); }
inline void narrow(double x, Bf16* to) { to->bits = float_to_bf16(float(x)); }
inline void narrow(double x, Fp16* to) { to->bits = float_to_fp16(float(x)); }
inline void narrow(double x, PairedBf16* to) { to->bits = float_to_bf16(float(x)); }

typedef uint16_t Bits16 __attribute__((vector_size(ALP_VECTOR_BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(ALP_VECTOR_BYTES)));

// Vector v of the columns from p on, in the compute dtype.
inline Vec<float> load_wide(const float* p, int v) { return load<Vec<float>>(p + v * kWidth<float>); }
inline Vec<double> load_wide(const double* p, int v) { return load<Vec<double>>(p + v * kWidth<double>); }
inline Vec<float> load_wide(const Bf16* p, int v) {
  p += v * kWidth<float>;
#if defined(__AVX512F__)
  const Bits32 bits = Bits32(_mm512_cvtepu16_epi32(load<__m256i>(p)));
#elif defined(__AVX2__)
  const Bits32 bits = Bits32(_mm256_cvtepu16_epi32(load<__m128i>(p)));
#else
  const Bits32 bits = __builtin_convertvector(load<Bits16>(p), Bits32);
#endif
  return (Vec<float>)(bits << 16);
}
inline Vec<float> load_wide(const PairedBf16* p, int v) {
  const Bits32 pair = load<Bits32>(p + v / 2 * 2 * kWidth<float>);
  if (v % 2 == 0) return (Vec<float>)(pair << 16);
#if defined(__AVX512F__)  // a tile has no vector register left for a mask
  return Vec<float>(_mm512_maskz_mov_epi16(0xaaaaaaaa, __m512i(pair)));
#else
  return (Vec<float>)(pair & 0xffff0000);
#endif
}
inline Vec<float> load_wide(const Fp16* p, int v) {
  p += v * kWidth<float>;
#if defined(__AVX512F__)
  return Vec<float>(_mm512_cvtph_ps(load<__m256i>(p)));
#elif defined(__AVX2__)
  return Vec<float>(_mm256_cvtph_ps(load<__m128i>(p)));
#else
  Vec<float> x;
  for (int k = 0; k < kWidth<float>; ++k) x[k] = fp16_to_float(p[k].bits);
  return x;
#endif
}

// Whether an instruction multiplies two columns of rows of S and adds both to a sum in A. Products of bf16 are exact.
template <class A, class S>
constexpr bool kPairProducts = false;
#if defined(__AVX512BF16__)
template <>
constexpr bool kPairProducts<float, PairedBf16> = true;

inline __m512bh load_pairs(const PairedBf16* p) { return load<__m512bh>(p); }
inline Vec<float> add_products(Vec<float> sums, __m512bh x, __m512bh y) {  // subnormal numbers count as 0
  return Vec<float>(_mm512_dpbf16_ps(__m512(sums), x, y));
}
#endif

// Rounded to bf16, in the upper half of each lane; the lower half is anything.
inline Bits32 round_to_bf16(Vec<float> x) {
  const Bits32 bits = (Bits32)x;
  return x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000;  // NaN stays NaN
}

// kSpan<T> vectors in T, the dtype of the tag.
inline Vec<float> narrow_vectors(const Vec<float>* x, float*) { return *x; }
inline Vec<double> narrow_vectors(const Vec<double>* x, double*) { return *x; }
inline Bits16 narrow_vectors(const Vec<float>* x, Bf16*) {
  const Bits32 rounded = round_to_bf16(*x);
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i high = __m256i(rounded >> 16);
  return Bits16(_mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
#else
  return __builtin_convertvector(rounded >> 16, Bits16);
#endif
}
inline Bits32 narrow_vectors(const Vec<float>* x, PairedBf16*) {
#if defined(__AVX512BF16__)
  // The first vector's in the lower half, the second's in the upper one; then one of each in turns
  const __m512i halves = __m512i(_mm512_cvtne2ps_pbh(__m512(x[1]), __m512(x[0])));
  const __m512i turns = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return Bits32(_mm512_permutexvar_epi16(turns, halves));
#else
  return round_to_bf16(x[0]) >> 16 | (round_to_bf16(x[1]) & 0xffff0000);
#endif
}
inline Bits16 narrow_vectors(const Vec<float>* x, Fp16*) {
#if defined(__AVX512F__)
  return Bits16(_mm512_cvtps_ph(__m512(*x), 0));
#elif defined(__AVX2__)
  return Bits16(_mm256_cvtps_ph(__m256(*x), 0));
#else
  Bits16 bits;
  for (int k = 0; k < kWidth<float>; ++k) bits[k] = float_to_fp16((*x)[k]);
  return bits;
#endif
}

// Write past the caches; p is a multiple of the vector's size.
template <class V>
inline void stream(void* p, V v) {
#if defined(__x86_64__)
  if constexpr (sizeof(V) == 64)
    _mm512_stream_si512(static_cast<__m512i*>(p), __m512i(v));
  else if constexpr (sizeof(V) == 32)
    _mm256_stream_si256(static_cast<__m256i*>(p), __m256i(v));
  else if constexpr (sizeof(V) == 16)
    _mm_stream_si128(static_cast<__m128i*>(p), __m128i(v));
  else
#endif
    store(static_cast<V*>(p), v);
}

// Whether a row of T goes to or from compute dtype A in vectors; fp64 beside a narrower dtype does not.
template <class A, class T>
constexpr bool kByVectors = sizeof(A) == 4 || sizeof(T) == 8;

// Widen a row of D elements into scratch of width, with zeros behind the row's end.
template <class A, class T>
void unpack(const T* row, A* out, int64_t width, int64_t D) {
  int64_t d = 0;
  if constexpr (sizeof(A) == 4 && sizeof(T) <= 4)
    for (; d + kSpan<T> * kWidth<A> <= D; d += kSpan<T> * kWidth<A>)
      for (int v = 0; v < kSpan<T>; ++v) store(out + d + v * kWidth<A>, load_wide(row + d, v));
  for (; d < D; ++d) out[d] = A(widen(row[d]));
  for (; d < width; ++d) out[d] = 0;
}

// out += share * row, for D elements of a row that others follow
template <class A, class T>
void add_row(const T* row, A share, A* out, int64_t D) {
  constexpr int W = kWidth<A>;
  constexpr int64_t kAhead = 6144 / sizeof(T);  // as far as rows have to be fetched ahead at a memory's full speed
  int64_t d = 0;
  if constexpr (sizeof(A) == 4 && sizeof(T) <= 4)
    for (; d + W <= D; d += W) {
      __builtin_prefetch(row + d + kAhead, 0, 3);
      store(out + d, load<Vec<A>>(out + d) + load_wide(row + d, 0) * share);
    }
  for (; d < D; ++d) out[d] += share * A(widen(row[d]));
}

// Write scratch to a gradient row of D elements, each rounded to nearest even.
template <class A, class T>
void pack(const A* in, T* row, int64_t D, bool past_caches) {
  int64_t d = 0;
  if constexpr (kByVectors<A, T>) {
    for (; d + kSpan<T> * kWidth<A> <= D; d += kSpan<T> * kWidth<A>) {
      Vec<A> x[kSpan<T>];
      for (int v = 0; v < kSpan<T>; ++v) x[v] = load<Vec<A>>(in + d + v * kWidth<A>);
      if (past_caches)
        stream(row + d, narrow_vectors(x, row));
      else
        store(row + d, narrow_vectors(x, row));
    }
  }
  for (; d < D; ++d) narrow(in[d], row + d);
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
