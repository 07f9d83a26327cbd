// The two products that everything is made of, on rows of one token:
//   dots     out[i][j] = <x_i, t_j>
//   combine  out_i     = base_scale_i * base_i + sum_k coef[k][i] * x_k
// Tiles keep ALP_TILE_I x ALP_TILE_J (ALP_TILE_I x ALP_TILE_D) accumulators in registers, so that a loaded vector
// serves several multiply-adds. Between blocks of columns the next row is prefetched.
#pragma once

#include "vec.h"

namespace alp::ALP_ISA {
namespace {

// Brings the next row of every layer into the L2 while this one is computed, a few lines at a time: the
// memory stays busy during the passes that read the caches only.
struct Prefetcher {
  const char* const* rows;  // [count] where the next row of each layer starts
  int count = 0;            // 0 = nothing to prefetch
  int64_t bytes[2] = {0, 0};  // of a student, of a teacher row
  int student_rows = 0;
  int64_t lines_per_step = 1;
  int current = 0;
  int64_t offset = 0;
  int64_t steps = 0;

  void start(int new_count) {
    // The number of steps in a row is what it was in the last one.
    const int64_t lines = (student_rows * bytes[0] + (count - student_rows) * bytes[1]) / 64 + count;
    if (steps > 0 && count > 0) lines_per_step = lines / steps + 1;
    count = new_count;
    current = 0;
    offset = 0;
    steps = 0;
  }

  void step() {
    ++steps;
    for (int64_t k = 0; k < lines_per_step && current < count; ++k) {
      __builtin_prefetch(rows[current] + offset, 0, 2);
      offset += 64;
      if (offset >= bytes[current >= student_rows]) {
        ++current;
        offset = 0;
      }
    }
  }
};

constexpr int64_t kBlock = 8;  // vectors between two steps of the prefetcher

template <class A, int kI, int kJ>
void dots_tile(const A* const* x, const A* const* t, int64_t D, A* out, int64_t ld, Prefetcher& prefetch) {
  constexpr int W = kWidth<A>;
  Vec<A> acc[kI][kJ] = {};
  int64_t d = 0;
  while (d + W <= D) {
    const int64_t stop = d + kBlock * W < D - W + 1 ? d + kBlock * W : D - W + 1;
    for (; d < stop; d += W) {
      Vec<A> b_t[kJ];
      for (int j = 0; j < kJ; ++j) b_t[j] = load<Vec<A>>(t[j] + d);
      for (int i = 0; i < kI; ++i) {
        const Vec<A> b_x = load<Vec<A>>(x[i] + d);
        for (int j = 0; j < kJ; ++j) acc[i][j] += b_x * b_t[j];
      }
    }
    prefetch.step();
  }
  for (int i = 0; i < kI; ++i)
    for (int j = 0; j < kJ; ++j) {
      A total = sum<A>(acc[i][j]);
      for (int64_t k = d; k < D; ++k) total += x[i][k] * t[j][k];
      out[i * ld + j] = total;
    }
}

template <class A, int kI>
void dots_rows(const A* const* x, int n, const A* const* t, int64_t D, A* out, int64_t ld, Prefetcher& prefetch) {
  int j = 0;
  for (; j + ALP_TILE_J <= n; j += ALP_TILE_J) dots_tile<A, kI, ALP_TILE_J>(x, t + j, D, out + j, ld, prefetch);
  switch (n - j) {
    case 3: return dots_tile<A, kI, 3>(x, t + j, D, out + j, ld, prefetch);
    case 2: return dots_tile<A, kI, 2>(x, t + j, D, out + j, ld, prefetch);
    case 1: return dots_tile<A, kI, 1>(x, t + j, D, out + j, ld, prefetch);
  }
}

// out (m, n) with leading dimension ld
template <class A>
void dots(int m, const A* const* x, int n, const A* const* t, int64_t D, A* out, int64_t ld, Prefetcher& prefetch) {
  int i = 0;
  for (; i + ALP_TILE_I <= m; i += ALP_TILE_I) dots_rows<A, ALP_TILE_I>(x + i, n, t, D, out + i * ld, ld, prefetch);
  x += i;
  out += i * ld;
  switch (m - i) {
#if ALP_TILE_I > 2
    case 5: return dots_rows<A, 5>(x, n, t, D, out, ld, prefetch);
    case 4: return dots_rows<A, 4>(x, n, t, D, out, ld, prefetch);
    case 3: return dots_rows<A, 3>(x, n, t, D, out, ld, prefetch);
    case 2: return dots_rows<A, 2>(x, n, t, D, out, ld, prefetch);
#endif
    case 1: return dots_rows<A, 1>(x, n, t, D, out, ld, prefetch);
  }
}

// A combination of m output rows from n rows x_k. coef is (n, ld): the coefficients of one x_k lie together.
template <class A>
struct Combination {
  int m, n;
  const A* const* base;  // [m]
  const A* base_scale;   // [m]
  const A* const* x;     // [n]
  const A* coef;
  int64_t ld;
  char* const* out;  // [m]
  double* squares;   // [m] receives ||out_i||^2, or null
};

// Columns d … d + kD vectors of output rows i … i + kI.
template <class V, class A, Out kOut, int kI, int kD>
inline void combine_tile(const Combination<A>& c, int i0, int64_t d, V* squares) {
  constexpr int W = sizeof(V) / sizeof(A);
  V acc[kI][kD];
  for (int i = 0; i < kI; ++i)
    for (int v = 0; v < kD; ++v) acc[i][v] = load<V>(c.base[i0 + i] + d + v * W) * c.base_scale[i0 + i];
  const A* coef = c.coef + i0;
  for (int k = 0; k < c.n; ++k, coef += c.ld) {
    V b_x[kD];
    for (int v = 0; v < kD; ++v) b_x[v] = load<V>(c.x[k] + d + v * W);
    for (int i = 0; i < kI; ++i)
      for (int v = 0; v < kD; ++v) acc[i][v] += b_x[v] * coef[i];
  }
  for (int i = 0; i < kI; ++i)
    for (int v = 0; v < kD; ++v) {
      put<kOut>(c.out[i0 + i], d + v * W, acc[i][v]);
      if (squares != nullptr) squares[i] += acc[i][v] * acc[i][v];
    }
}

template <class A, Out kOut, int kI>
void combine_rows(const Combination<A>& c, int i0, int64_t D, Prefetcher& prefetch) {
  constexpr int W = kWidth<A>;
  Vec<A> squares[kI] = {};
  A tail[kI] = {};
  int64_t d = 0;
  for (; d + ALP_TILE_D * W <= D; d += ALP_TILE_D * W) {
    combine_tile<Vec<A>, A, kOut, kI, ALP_TILE_D>(c, i0, d, c.squares ? squares : nullptr);
    prefetch.step();
  }
  for (; d + W <= D; d += W) combine_tile<Vec<A>, A, kOut, kI, 1>(c, i0, d, c.squares ? squares : nullptr);
  constexpr Out kTail = kOut == Out::stream ? Out::plain : kOut;
  for (; d < D; ++d) combine_tile<A, A, kTail, kI, 1>(c, i0, d, c.squares ? tail : nullptr);
  if (c.squares != nullptr)
    for (int i = 0; i < kI; ++i) c.squares[i0 + i] = double(sum<A>(squares[i])) + double(tail[i]);
}

template <Out kOut, class A>
void combine(const Combination<A>& c, int64_t D, Prefetcher& prefetch) {
  int i = 0;
  for (; i + ALP_TILE_I <= c.m; i += ALP_TILE_I) combine_rows<A, kOut, ALP_TILE_I>(c, i, D, prefetch);
  switch (c.m - i) {
#if ALP_TILE_I > 2
    case 5: return combine_rows<A, kOut, 5>(c, i, D, prefetch);
    case 4: return combine_rows<A, kOut, 4>(c, i, D, prefetch);
    case 3: return combine_rows<A, kOut, 3>(c, i, D, prefetch);
    case 2: return combine_rows<A, kOut, 2>(c, i, D, prefetch);
#endif
    case 1: return combine_rows<A, kOut, 1>(c, i, D, prefetch);
  }
}

// The same, into rows of a dtype known at run time.
template <class A>
void combine_into(Dtype type, bool stream, const Combination<A>& c, int64_t D, Prefetcher& prefetch) {
  if (type == Dtype::bf16) return combine<Out::bf16>(c, D, prefetch);
  if (type == Dtype::f16) return combine<Out::f16>(c, D, prefetch);
  if (type == Dtype::f32 && sizeof(A) == 8) return combine<Out::f32>(c, D, prefetch);
  if (stream) return combine<Out::stream>(c, D, prefetch);
  return combine<Out::plain>(c, D, prefetch);
}

}  // namespace
}  // namespace alp::ALP_ISA
