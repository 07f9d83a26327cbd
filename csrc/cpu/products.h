// The two products that everything is made of, on rows of one token:
//   dots     out[j][i] = <x_i, t_j>
//   combine  out_i     = base_scale_i * base_i + sum_k coef[k][i] * x_k
// Arrays of coefficients hold the student layers of one teacher layer side by side, ld apart: the
// softmax between the products then runs over vectors of student layers. Rows are read as they lie in
// memory and widened on the way into a register. Tiles keep ALP_TILE_I x ALP_TILE_J (ALP_TILE_I x
// ALP_TILE_D) accumulators in registers, so that a loaded vector serves several multiply-adds.
#pragma once

#include "vec.h"

namespace alp::ALP_ISA {
namespace {

// Accumulators stay in registers only where the loops over a tile are unrolled whole.
#define ALP_UNROLL _Pragma("GCC unroll 8")
// Inlined, a tile would compete with its caller for registers.
#define ALP_TILE_FUNCTION __attribute__((noinline))

// Shuffles of the accumulators themselves, to add up their lanes, would cost the loop before them its
// registers: the compiler takes copies instead.
template <class V>
inline void through_memory(V& to, const V& from) {
  __builtin_memcpy(&to, &from, sizeof to);
  asm volatile("" : "+m"(to));
}

template <class A, class X, class T, int kI, int kJ>
ALP_TILE_FUNCTION void dots_tile(const X* const* x, const T* const* t, int64_t D, A* out, int64_t ld) {
  constexpr int W = kWidth<A>;
  Vec<A> acc[kI][kJ] = {};
  int64_t d = 0;
  for (; d + W <= D; d += W) {
    Vec<A> b_t[kJ];
    ALP_UNROLL
    for (int j = 0; j < kJ; ++j) b_t[j] = load_row(t[j] + d);
    ALP_UNROLL
    for (int i = 0; i < kI; ++i) {
      const Vec<A> b_x = load_row(x[i] + d);
      ALP_UNROLL
      for (int j = 0; j < kJ; ++j) acc[i][j] += b_x * b_t[j];
    }
  }
  Vec<A> done[kI][kJ];
  through_memory(done, acc);
  A total[kI][kJ];
  for (int i = 0; i < kI; ++i) {
    if constexpr (kJ == 4 && sizeof(A) == 4)
      store(total[i], sum4(done[i][0], done[i][1], done[i][2], done[i][3]));
    else
      for (int j = 0; j < kJ; ++j) total[i][j] = sum<A, W>(done[i][j]);
  }
  for (; d < D; ++d)
    for (int i = 0; i < kI; ++i)
      for (int j = 0; j < kJ; ++j) total[i][j] += A(widen(x[i][d])) * A(widen(t[j][d]));
  for (int i = 0; i < kI; ++i)
    for (int j = 0; j < kJ; ++j) out[j * ld + i] = total[i][j];
}

template <class A, class X, class T, int kI>
void dots_rows(const X* const* x, int n, const T* const* t, int64_t D, A* out, int64_t ld) {
  int j = 0;
  for (; j + ALP_TILE_J <= n; j += ALP_TILE_J) dots_tile<A, X, T, kI, ALP_TILE_J>(x, t + j, D, out + j * ld, ld);
  switch (n - j) {
    case 3: return dots_tile<A, X, T, kI, 3>(x, t + j, D, out + j * ld, ld);
    case 2: return dots_tile<A, X, T, kI, 2>(x, t + j, D, out + j * ld, ld);
    case 1: return dots_tile<A, X, T, kI, 1>(x, t + j, D, out + j * ld, ld);
  }
}

// out (n, ld)
template <class A, class X, class T>
void dots(int m, const X* const* x, int n, const T* const* t, int64_t D, A* out, int64_t ld) {
  int i = 0;
  for (; i + ALP_TILE_I <= m; i += ALP_TILE_I) dots_rows<A, X, T, ALP_TILE_I>(x + i, n, t, D, out + i, ld);
  x += i;
  out += i;
  switch (m - i) {
#if ALP_TILE_I > 2
    case 5: return dots_rows<A, X, T, 5>(x, n, t, D, out, ld);
    case 4: return dots_rows<A, X, T, 4>(x, n, t, D, out, ld);
    case 3: return dots_rows<A, X, T, 3>(x, n, t, D, out, ld);
    case 2: return dots_rows<A, X, T, 2>(x, n, t, D, out, ld);
#endif
    case 1: return dots_rows<A, X, T, 1>(x, n, t, D, out, ld);
  }
}

// A combination of m output rows from m bases and n rows x_k. coef is (n, ld): the coefficients of one
// x_k lie together. While it runs it prefetches one half of the row that follows each base and each x_k:
// the memory stays busy during passes that read the caches only, and no prefetch waits in a burst.
template <class A, class B, class T>
struct Combination {
  int m, n;
  const B* const* base;  // [m]
  const A* base_scale;   // [m]; a residual's are 1
  const T* const* x;     // [n]
  const A* coef;
  int64_t ld;
  char* const* out;                        // [m]
  double* squares;                         // [m] receives ||out_i||^2 of a residual
  const char* const* next_base = nullptr;  // [m] the rows to prefetch, of T, or null
  const char* const* next_x = nullptr;     // [n]
  int half = 0;                            // which half of them
};

// The lines of half `half` of columns d … d + kBytes / sizeof(T) of a row.
template <int kBytes>
inline void prefetch_half(const char* row, int64_t byte, int half) {
  constexpr int kHalf = kBytes > 64 ? kBytes / 2 : kBytes;
  const char* at = row + byte + (kBytes > 64 ? half * kHalf : 0);
  for (int line = 0; line < kHalf; line += 64) __builtin_prefetch(at + line, 0, 2);
}

// Columns d … d + kD vectors of output rows i … i + kI. A residual has base scale 1 and sums its squares.
template <class V, Out kOut, bool kResidual, bool kPrefetch, int kI, int kD, class A, class B, class T>
inline void combine_tile(const Combination<A, B, T>& c, int i0, int64_t d, V* squares) {
  constexpr int W = sizeof(V) / sizeof(A);
  V acc[kI][kD];
  ALP_UNROLL
  for (int i = 0; i < kI; ++i) {
    if constexpr (kPrefetch) prefetch_half<kD * W * sizeof(T)>(c.next_base[i0 + i], d * sizeof(T), c.half);
    ALP_UNROLL
    for (int v = 0; v < kD; ++v) {
      const V base = load_as<V>(c.base[i0 + i] + d + v * W);
      acc[i][v] = kResidual ? base : base * c.base_scale[i0 + i];
    }
  }
  const A* coef = c.coef + i0;
  for (int k = 0; k < c.n; ++k, coef += c.ld) {
    if constexpr (kPrefetch) prefetch_half<kD * W * sizeof(T)>(c.next_x[k], d * sizeof(T), c.half);
    V b_x[kD];
    ALP_UNROLL
    for (int v = 0; v < kD; ++v) b_x[v] = load_as<V>(c.x[k] + d + v * W);
    ALP_UNROLL
    for (int i = 0; i < kI; ++i) {
      ALP_UNROLL
      for (int v = 0; v < kD; ++v) acc[i][v] += b_x[v] * coef[i];
    }
  }
  if constexpr (kResidual) {
    // Before the stores, which may alias the sums as far as the compiler knows.
    ALP_UNROLL
    for (int i = 0; i < kI; ++i) {
      V square = acc[i][0] * acc[i][0];
      ALP_UNROLL
      for (int v = 1; v < kD; ++v) square += acc[i][v] * acc[i][v];
      squares[i] += square;
    }
  }
  ALP_UNROLL
  for (int i = 0; i < kI; ++i) {
    char* out = c.out[i0 + i];
    ALP_UNROLL
    for (int v = 0; v < kD; ++v) put<kOut>(out, d + v * W, acc[i][v]);
  }
}

template <Out kOut, bool kResidual, int kI, class A, class B, class T>
ALP_TILE_FUNCTION void combine_rows(const Combination<A, B, T>& c, int i0, int64_t D) {
  constexpr int W = kWidth<A>;
  Vec<A> squares[kI] = {};
  A tail[kI] = {};
  int64_t d = 0;
  if (c.next_x != nullptr)
    for (; d + ALP_TILE_D * W <= D; d += ALP_TILE_D * W)
      combine_tile<Vec<A>, kOut, kResidual, true, kI, ALP_TILE_D>(c, i0, d, squares);
  else
    for (; d + ALP_TILE_D * W <= D; d += ALP_TILE_D * W)
      combine_tile<Vec<A>, kOut, kResidual, false, kI, ALP_TILE_D>(c, i0, d, squares);
  for (; d + W <= D; d += W) combine_tile<Vec<A>, kOut, kResidual, false, kI, 1>(c, i0, d, squares);
  constexpr Out kTail = kOut == Out::stream ? Out::plain : kOut;
  for (; d < D; ++d) combine_tile<A, kTail, kResidual, false, kI, 1>(c, i0, d, tail);
  if constexpr (kResidual) {
    Vec<A> done[kI];
    through_memory(done, squares);
    for (int i = 0; i < kI; ++i) c.squares[i0 + i] = double(sum<A, W>(done[i])) + double(tail[i]);
  }
}

template <Out kOut, bool kResidual = false, class A, class B, class T>
void combine(const Combination<A, B, T>& c, int64_t D) {
  int i = 0;
  for (; i + ALP_TILE_I <= c.m; i += ALP_TILE_I) combine_rows<kOut, kResidual, ALP_TILE_I>(c, i, D);
  switch (c.m - i) {
#if ALP_TILE_I > 2
    case 5: return combine_rows<kOut, kResidual, 5>(c, i, D);
    case 4: return combine_rows<kOut, kResidual, 4>(c, i, D);
    case 3: return combine_rows<kOut, kResidual, 3>(c, i, D);
    case 2: return combine_rows<kOut, kResidual, 2>(c, i, D);
#endif
    case 1: return combine_rows<kOut, kResidual, 1>(c, i, D);
  }
}

// combine into rows of a dtype known at run time.
template <class A, class B, class T>
void combine_into(Dtype type, bool stream, const Combination<A, B, T>& c, int64_t D) {
  if (type == Dtype::bf16) return combine<Out::bf16>(c, D);
  if (type == Dtype::f16) return combine<Out::f16>(c, D);
  if (type == Dtype::f32 && sizeof(A) == 8) return combine<Out::f32>(c, D);
  if (stream) return combine<Out::stream>(c, D);
  return combine<Out::plain>(c, D);
}

}  // namespace
}  // namespace alp::ALP_ISA
