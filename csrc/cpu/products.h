// The two products that everything is made of, on scratch rows of one token:
//   dots     out[j][i] = <x_i, t_j>
//   combine  out_i     = base_scale_i * base_i + sum_k coef[k][i] * x_k
// Arrays of coefficients hold the student layers of one teacher layer side by side, ld apart: the
// softmax between the products then runs over vectors of student layers. Both products take a block of
// columns, small enough for what they read to stay in the L1 cache. Tiles keep ALP_TILE_I x ALP_TILE_J
// (ALP_TILE_I x ALP_TILE_D) accumulators in registers, so that a loaded vector serves several multiply-adds.
#pragma once

#include "vec.h"

namespace alp::ALP_ISA {
namespace {

// Accumulators stay in registers only where the loops over a tile are unrolled whole.
#define ALP_UNROLL _Pragma("GCC unroll 8")
// Inlined, a tile would compete with its caller for registers.
#define ALP_TILE_FUNCTION __attribute__((noinline))
#define ALP_INLINE inline __attribute__((always_inline))

// The next row's hidden states on their way to the L2 cache: a few lines with every tile, so that the
// memory stays busy while the products read the caches, and no prefetch waits in a burst.
struct Ahead {
  static constexpr int kLines = 4;  // at once: an unrolled burst costs little beside a tile
  const char* const* rows;          // [count]
  const int64_t* bytes;             // [count] length of each
  int count = 0;
  int bursts = 0;  // a tile
  int row = 0;
  int64_t at = 0;

  inline __attribute__((always_inline)) void step() {
    for (int k = 0; k < bursts && row < count; ++k) {
      const char* line = rows[row] + at;  // past the row's end lies the row after the next, as a rule
      ALP_UNROLL
      for (int l = 0; l < kLines; ++l) __builtin_prefetch(line + 64 * l, 0, 2);
      if ((at += 64 * kLines) >= bytes[row]) {
        at = 0;
        ++row;
      }
    }
  }
};

template <int k>
struct Height {
  static constexpr int value = k;
};
template <int kMax, class F>
inline void with_height(int height, F f) {
  if constexpr (kMax > 1)
    if (height < kMax) return with_height<kMax - 1>(height, f);
  f(Height<kMax>());
}
inline int tile_count(int m) { return (m + ALP_TILE_I - 1) / ALP_TILE_I; }
// Calls f(i, height) for tiles of nearly equal height that cover m rows.
template <class F>
inline void each_tile(int m, F f) {
  for (int i = 0, left = tile_count(m); left > 0; --left) {
    const int height = (m - i + left - 1) / left;
    with_height<ALP_TILE_I>(height, [&](auto h) { f(i, h); });
    i += height;
  }
}

// The rows of a product of m by n. Where they are used for the first time their elements come from the hidden
// states, of type S, and go to scratch on the way.
template <class A, class S = A>
struct Operands {
  A *const *x, *const *t;                                      // [m] and [n] scratch rows
  const S *const *from_x = nullptr, *const *from_t = nullptr;  // [m] and [n] hidden states
};

template <bool kFirst, class A, class S>
ALP_INLINE Vec<A> operand(A* scratch, const S* from) {
  if constexpr (!kFirst) return load<Vec<A>>(scratch);
  const Vec<A> value = load_wide(from);
  store(scratch, value);
  return value;
}

template <int kI, int kJ, bool kFirstX, bool kFirstT, class A, class S>
ALP_INLINE void dots_tile(const Operands<A, S>& o, int i0, int j0, Columns c, Vec<A>* sums, int64_t ld) {
  // Local copies, which no store can change as far as the compiler knows.
  A *x[kI], *t[kJ];
  const S *from_x[kI] = {}, *from_t[kJ] = {};
  Vec<A> acc[kJ][kI];
  sums += j0 * ld + i0;
  ALP_UNROLL
  for (int i = 0; i < kI; ++i) {
    x[i] = o.x[i0 + i];
    if constexpr (kFirstX) from_x[i] = o.from_x[i0 + i];
  }
  ALP_UNROLL
  for (int j = 0; j < kJ; ++j) {
    t[j] = o.t[j0 + j];
    if constexpr (kFirstT) from_t[j] = o.from_t[j0 + j];
    ALP_UNROLL
    for (int i = 0; i < kI; ++i) acc[j][i] = sums[j * ld + i];
  }
  for (int64_t d = c.begin; d < c.end; d += kWidth<A>) {
    Vec<A> b_x[kI];
    ALP_UNROLL
    for (int i = 0; i < kI; ++i) b_x[i] = operand<kFirstX>(x[i] + d, from_x[i] + d);
    ALP_UNROLL
    for (int j = 0; j < kJ; ++j) {
      const Vec<A> b_t = operand<kFirstT>(t[j] + d, from_t[j] + d);
      ALP_UNROLL
      for (int i = 0; i < kI; ++i) acc[j][i] += b_x[i] * b_t;
    }
  }
  ALP_UNROLL
  for (int j = 0; j < kJ; ++j) {
    ALP_UNROLL
    for (int i = 0; i < kI; ++i) sums[j * ld + i] = acc[j][i];
  }
}

template <int kI, bool kFirst, bool kFirstT, class A, class S>
ALP_TILE_FUNCTION void dots_rows(const Operands<A, S>& o, int i, int n, Columns c, Vec<A>* sums, int64_t ld,
                                 Ahead& ahead) {
  int j = 0;
  const auto tile = [&](auto width) {
    if (kFirst && j == 0)
      dots_tile<kI, width.value, kFirst, kFirstT>(o, i, j, c, sums, ld);
    else
      dots_tile<kI, width.value, false, kFirstT>(o, i, j, c, sums, ld);
    j += width.value;
  };
  while (j + ALP_TILE_J <= n) {
    ahead.step();
    tile(Height<ALP_TILE_J>());
  }
  while (j < n) tile(Height<1>());
}

// Adds the columns' share to sums (n, ld), whose lanes are yet to be added up.
template <bool kFirst, class A, class S>
void dots(int m, int n, const Operands<A, S>& o, Columns c, Vec<A>* sums, int64_t ld, Ahead& ahead) {
  each_tile(m, [&](int i, auto height) {
    if (kFirst && i == 0)
      dots_rows<height.value, kFirst, kFirst>(o, i, n, c, sums, ld, ahead);
    else
      dots_rows<height.value, kFirst, false>(o, i, n, c, sums, ld, ahead);
  });
}

// out (n, ld) of sums (n, ld)
template <class A>
void add_lanes(int m, int n, const Vec<A>* sums, A* out, int64_t ld) {
  for (int64_t k = 0; k < n * ld; k += ld)
    for (int64_t i = k; i < k + m; i += 4) {
      if constexpr (sizeof(A) == 4)
        store(out + i, sum4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]));
      else
        for (int64_t l = i; l < i + 4; ++l) out[l] = sum<A, kWidth<A>>(sums[l]);
    }
}

template <class A>
A dot(const A* x, const A* y, int64_t D) {
  Vec<A> total = {};
  for (int64_t d = 0; d < D; d += kWidth<A>) total += load<Vec<A>>(x + d) * load<Vec<A>>(y + d);
  return sum<A, kWidth<A>>(total);
}

// A combination of m output rows from m bases and n rows x_k. coef is (n, ld): the coefficients of one
// x_k lie together. A residual is base_i - sum_k coef[k][i] * x_k instead.
// T is A for scratch rows, or the dtype of gradient rows that a tile rounds to and writes at once.
template <class A, class T = A>
struct Combination {
  int m, n;
  const A* const* base;  // [m]
  const A* base_scale;   // [m]; unused by a residual
  const A* const* x;     // [n]
  const A* coef;
  int64_t ld;
  T* const* out;             // [m]
  bool past_caches = false;  // how gradients are stored
};

// Columns d … d + kD vectors of kI output rows, whose first coefficients are coef. A residual adds its squares
// to squares[kI].
template <bool kResidual, int kI, int kD, class A, class T>
ALP_INLINE void combine_tile(const Combination<A, T>& c, const A* const* base, const Vec<A>* base_scale, const A* coef,
                             T* const* out, int64_t d, Vec<A>* squares) {
  constexpr int W = kWidth<A>;
  Vec<A> acc[kI][kD];
  ALP_UNROLL
  for (int i = 0; i < kI; ++i) {
    ALP_UNROLL
    for (int v = 0; v < kD; ++v) {
      acc[i][v] = load<Vec<A>>(base[i] + d + v * W);
      if constexpr (!kResidual) acc[i][v] *= base_scale[i];
    }
  }
  for (int k = 0; k < c.n; ++k, coef += c.ld) {
    const A* x_k = c.x[k] + d;
    Vec<A> b_coef[kI];
    ALP_UNROLL
    for (int i = 0; i < kI; ++i) b_coef[i] = coef[i] - Vec<A>{};  // broadcast
    ALP_UNROLL
    for (int v = 0; v < kD; ++v) {
      const Vec<A> b_x = load<Vec<A>>(x_k + v * W);
      ALP_UNROLL
      for (int i = 0; i < kI; ++i) acc[i][v] = kResidual ? acc[i][v] - b_x * b_coef[i] : acc[i][v] + b_x * b_coef[i];
    }
  }
  ALP_UNROLL
  for (int i = 0; i < kI; ++i) {
    ALP_UNROLL
    for (int v = 0; v < kD; ++v) {
      if (c.past_caches && sizeof(T) == sizeof(A))  // half vectors go faster through the caches
        stream(out[i] + d + v * W, narrow_vector(acc[i][v], out[i]));
      else
        store(out[i] + d + v * W, narrow_vector(acc[i][v], out[i]));
    }
  }
  if constexpr (kResidual) {
    ALP_UNROLL
    for (int i = 0; i < kI; ++i) {
      Vec<A> square = acc[i][0] * acc[i][0];
      ALP_UNROLL
      for (int v = 1; v < kD; ++v) square += acc[i][v] * acc[i][v];
      squares[i] += square;
    }
  }
}

template <bool kResidual, int kI, class A, class T>
ALP_TILE_FUNCTION void combine_rows(const Combination<A, T>& c, int i0, Columns columns, Vec<A>* squares,
                                    Ahead& ahead) {
  constexpr int W = kWidth<A>;
  // Local copies, which no store can change as far as the compiler knows.
  const A* base[kI];
  T* out[kI];
  Vec<A> base_scale[kI], added[kI];
  ALP_UNROLL
  for (int i = 0; i < kI; ++i) {
    base[i] = c.base[i0 + i];
    out[i] = c.out[i0 + i];
    added[i] = Vec<A>{};
    if constexpr (!kResidual) base_scale[i] = c.base_scale[i0 + i] - Vec<A>{};
  }
  const Combination<A, T> local = c;
  const A* coef = c.coef + i0;
  int64_t d = columns.begin;
  for (; d + ALP_TILE_D * W <= columns.end; d += ALP_TILE_D * W) {
    ahead.step();
    combine_tile<kResidual, kI, ALP_TILE_D>(local, base, base_scale, coef, out, d, added);
  }
  for (; d < columns.end; d += W) combine_tile<kResidual, kI, 1>(local, base, base_scale, coef, out, d, added);
  if constexpr (kResidual)
    for (int i = 0; i < kI; ++i) squares[i] += added[i];
}

template <class A, class T>
void combine(const Combination<A, T>& c, Columns columns, Ahead& ahead) {
  each_tile(c.m,
            [&](int i, auto height) { combine_rows<false, height.value>(c, i, columns, (Vec<A>*)nullptr, ahead); });
}
// squares [m] vectors, whose lanes are yet to be added up
template <class A>
void residual(const Combination<A>& c, Columns columns, Vec<A>* squares, Ahead& ahead) {
  each_tile(c.m, [&](int i, auto height) { combine_rows<true, height.value>(c, i, columns, squares + i, ahead); });
}

}  // namespace
}  // namespace alp::ALP_ISA
