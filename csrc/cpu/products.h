// The products that everything is made of, on the rows of one token:
//   dots      sums[j][i] = <x_i, t_j>
//   residual  e_i        = s_i - sum_j coef[j][i] * t_j, and sums[j][i] = <e_i, t_j>
//   combine   out_i      = base_scale_i * base_i + sum_k coef[k][i] * x_k
// Arrays of coefficients hold the student layers of one teacher layer side by side, ld apart: the
// softmax between the products then runs over vectors of student layers. Tiles keep ALP_TILE_I x ALP_TILE_J
// (ALP_TILE_I x ALP_TILE_D) accumulators in registers, so that a loaded vector serves several multiply-adds.
// Columns are width whole vectors: rows of scratch are padded with zeros.
#pragma once

#include "vec.h"

namespace alp::ALP_ISA {
namespace {

// Accumulators stay in registers only where the loops over a tile are unrolled whole.
#define ALP_UNROLL _Pragma("GCC unroll 8")
// Inlined, a tile would compete with its caller for registers.
#define ALP_TILE_FUNCTION __attribute__((noinline))
#define ALP_INLINE inline __attribute__((always_inline))

// The next row's hidden states on their way to the caches: a few lines with every tile, so that the memory stays busy
// while the products read the caches, and no prefetch waits in a burst.
struct Ahead {
  static constexpr int kLines = 4;         // at once: an unrolled burst costs little beside a tile
  static constexpr int64_t kStart = 1024;  // bytes of a row that follows on this one where pairs are fetched
  const char* const* rows;                 // [count]
  const int64_t* bytes;                    // [count] length of each
  Fetching fetching;
  int count = 0;
  int bursts = 0;  // a tile
  int row = 0;
  int64_t at = 0;

  static constexpr int64_t step_of(Fetching f) { return f == Fetching::lines ? 64 : 128; }

  inline __attribute__((always_inline)) void step() {
    for (int k = 0; k < bursts && row < count; ++k) {
      const char* line = rows[row] + at;  // past the row's end lies the row after the next, as a rule
      if (fetching == Fetching::lines) {
        ALP_UNROLL
        for (int l = 0; l < kLines; ++l) __builtin_prefetch(line + step_of(Fetching::lines) * l, 0, 3);  // to L1
      } else {
        ALP_UNROLL
        for (int l = 0; l < kLines; ++l) __builtin_prefetch(line + step_of(Fetching::pairs) * l, 0, 2);  // to L2
      }
      if ((at += step_of(fetching) * kLines) >= bytes[row]) {
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

// The rows of a product of m by n: scratch rows x, and rows t of S, which may be hidden states. Where x is used for
// the first time its elements come from hidden states and go to scratch on the way.
template <class A, class S>
struct Operands {
  A* const* x;                       // [m]
  const S* const* t;                 // [n]
  const S* const* from_x = nullptr;  // [m]
};

// kFirst: x's elements come from hidden states and go to scratch. kPairs: they come from there too, and are multiplied
// as they are, two columns an instruction.
template <int kI, int kJ, bool kFirst, bool kPairs, class A, class S>
ALP_INLINE void dots_tile(A* const* rows, const S* const* from, const S* const* teachers, int64_t width, Vec<A>* sums) {
  constexpr int W = kWidth<A>;
  // Local copies, which no store can change as far as the compiler knows.
  A* x[kI];
  const S *from_x[kI] = {}, *t[kJ];
  Vec<A> acc[kJ][kI];
  ALP_UNROLL
  for (int i = 0; i < kI; ++i) {
    x[i] = rows[i];
    if constexpr (kFirst || kPairs) from_x[i] = from[i];
  }
  ALP_UNROLL
  for (int j = 0; j < kJ; ++j) {
    t[j] = teachers[j];
    ALP_UNROLL
    for (int i = 0; i < kI; ++i) acc[j][i] = Vec<A>{};
  }
  for (int64_t d = 0; d < width; d += kSpan<S> * W) {
    if constexpr (kPairs) {
      decltype(load_pairs(from_x[0])) b_x[kI];
      ALP_UNROLL
      for (int i = 0; i < kI; ++i) {
        b_x[i] = load_pairs(from_x[i] + d);
        if constexpr (kFirst) {
          store(x[i] + d, load_wide(from_x[i] + d, 0));
          store(x[i] + d + W, load_wide(from_x[i] + d, 1));
        }
      }
      ALP_UNROLL
      for (int j = 0; j < kJ; ++j) {
        const auto b_t = load_pairs(t[j] + d);
        ALP_UNROLL
        for (int i = 0; i < kI; ++i) acc[j][i] = add_products(acc[j][i], b_x[i], b_t);
      }
    } else {
      ALP_UNROLL
      for (int v = 0; v < kSpan<S>; ++v) {
        Vec<A> b_x[kI];
        ALP_UNROLL
        for (int i = 0; i < kI; ++i) {
          if constexpr (kFirst) {
            b_x[i] = load_wide(from_x[i] + d, v);
            store(x[i] + d + v * W, b_x[i]);
          } else {
            b_x[i] = load<Vec<A>>(x[i] + d + v * W);
          }
        }
        ALP_UNROLL
        for (int j = 0; j < kJ; ++j) {
          const Vec<A> b_t = load_wide(t[j] + d, v);
          ALP_UNROLL
          for (int i = 0; i < kI; ++i) acc[j][i] += b_x[i] * b_t;
        }
      }
    }
  }
  ALP_UNROLL
  for (int j = 0; j < kJ; ++j) {
    ALP_UNROLL
    for (int i = 0; i < kI; ++i) sums[j * kI + i] = acc[j][i];
  }
}

template <int kI, class A, class S>
ALP_TILE_FUNCTION void dots_rows(const Operands<A, S>& o, int i, int n, int64_t width, Vec<A>* sums, Ahead& ahead) {
  int j = 0;
  const auto tile = [&](auto count) {
    constexpr bool kPairs = kPairProducts<A, S>;
    if (o.from_x == nullptr)
      dots_tile<kI, count.value, false, false>(o.x + i, o.from_x, o.t + j, width, sums + j * kI);
    else if (j == 0)
      dots_tile<kI, count.value, true, kPairs>(o.x + i, o.from_x + i, o.t, width, sums);
    else
      dots_tile<kI, count.value, false, kPairs>(o.x + i, o.from_x + i, o.t + j, width, sums + j * kI);
    j += count.value;
  };
  while (j + ALP_TILE_J <= n) {
    ahead.step();
    tile(Height<ALP_TILE_J>());
  }
  while (j < n) tile(Height<1>());
}

// sums, whose lanes are yet to be added up: for every tile of x's rows (n, its height) vectors, one tile after the
// other.
template <class A, class S>
void dots(int m, int n, const Operands<A, S>& o, int64_t width, Vec<A>* sums, Ahead& ahead) {
  each_tile(m, [&](int i, auto height) { dots_rows<height.value>(o, i, n, width, sums + i * n, ahead); });
}

// out (n, ld) of sums
template <class A>
void add_lanes(int m, int n, const Vec<A>* sums, A* out, int64_t ld) {
  each_tile(m, [&](int i0, auto height) {
    constexpr int kI = height.value;
    for (int j = 0; j < n; ++j, sums += kI) {
      A* to = out + j * ld + i0;
      if constexpr (sizeof(A) == 4) {
        ALP_UNROLL
        for (int i = 0; i < kI; i += 4) {
          const auto row = [&](int k) { return i + k < kI ? sums[i + k] : Vec<A>{}; };
          const Quad quad = sum4(row(0), row(1), row(2), row(3));
          __builtin_memcpy(to + i, &quad, (kI - i < 4 ? kI - i : 4) * sizeof(A));
        }
      } else {
        for (int i = 0; i < kI; ++i) to[i] = sum<A, kWidth<A>>(sums[i]);
      }
    }
  });
}

template <class A>
A dot(const A* x, const A* y, int64_t D) {
  Vec<A> total = {};
  for (int64_t d = 0; d < D; d += kWidth<A>) total += load<Vec<A>>(x + d) * load<Vec<A>>(y + d);
  return sum<A, kWidth<A>>(total);
}

// e_i = s_i - sum_j coef[j][i] * t_j, for m rows s_i of scratch and n rows t_j of S.
template <class A, class S>
struct Residual {
  int m, n;
  const A* const* s;  // [m]
  const S* const* t;  // [n]
  const A* coef;      // (n, ld)
  int64_t ld;
  A* const* out;    // [m] rows that take e_i, or null pointers
  Vec<A>* squares;  // [m] vectors whose lanes add up to ||e_i||^2
  Vec<A>* sums;     // as of dots: <e_i, t_j>
  Vec<A>* wide;     // [n * ALP_TILE_D] for the columns of t that a tile reads twice
};

// Columns d … d + kD vectors of e_i in registers, of kI rows. Their squares are added to squares[kI], with kProducts
// also <e_i, t_j> to sums (n, kI).
template <bool kProducts, int kI, int kD, class A, class S>
ALP_INLINE void residual_tile(const Residual<A, S>& r, const A* const* s, const A* coef, A* const* out, int64_t d,
                              Vec<A>* squares, Vec<A>* sums) {
  constexpr int W = kWidth<A>;
  Vec<A> e[kI][kD];
  ALP_UNROLL
  for (int i = 0; i < kI; ++i) {
    ALP_UNROLL
    for (int v = 0; v < kD; ++v) e[i][v] = load<Vec<A>>(s[i] + d + v * W);
  }
  for (int j = 0; j < r.n; ++j, coef += r.ld) {
    const S* t_j = r.t[j] + d;
    Vec<A> b_coef[kI];
    ALP_UNROLL
    for (int i = 0; i < kI; ++i) b_coef[i] = coef[i] - Vec<A>{};  // broadcast
    ALP_UNROLL
    for (int v = 0; v < kD; ++v) {
      const Vec<A> b_t = load_wide(t_j, v);
      if constexpr (kProducts) r.wide[j * kD + v] = b_t;
      ALP_UNROLL
      for (int i = 0; i < kI; ++i) e[i][v] = e[i][v] - b_t * b_coef[i];
    }
  }
  ALP_UNROLL
  for (int i = 0; i < kI; ++i) {
    Vec<A> square = e[i][0] * e[i][0];
    ALP_UNROLL
    for (int v = 1; v < kD; ++v) square += e[i][v] * e[i][v];
    squares[i] += square;
  }
  if (out[0] != nullptr) {
    ALP_UNROLL
    for (int i = 0; i < kI; ++i) {
      ALP_UNROLL
      for (int v = 0; v < kD; ++v) store(out[i] + d + v * W, e[i][v]);
    }
  }
  if constexpr (kProducts) {
    for (int j = 0; j < r.n; ++j, sums += kI) {
      Vec<A> acc[kI];
      ALP_UNROLL
      for (int i = 0; i < kI; ++i) acc[i] = sums[i];
      ALP_UNROLL
      for (int v = 0; v < kD; ++v) {
        const Vec<A> b_t = r.wide[j * kD + v];
        ALP_UNROLL
        for (int i = 0; i < kI; ++i) acc[i] += e[i][v] * b_t;
      }
      ALP_UNROLL
      for (int i = 0; i < kI; ++i) sums[i] = acc[i];
    }
  }
}

template <bool kProducts, int kI, class A, class S>
ALP_TILE_FUNCTION void residual_rows(const Residual<A, S>& r, int i0, int64_t width, Ahead& ahead) {
  constexpr int W = kWidth<A>;
  // Local copies, which no store can change as far as the compiler knows.
  const Residual<A, S> local = r;
  const A *s[kI], *coef = r.coef + i0;
  A* out[kI];
  Vec<A> squares[kI], *sums = r.sums + i0 * r.n;
  ALP_UNROLL
  for (int i = 0; i < kI; ++i) {
    s[i] = r.s[i0 + i];
    out[i] = r.out[i0 + i];
    squares[i] = Vec<A>{};
  }
  if constexpr (kProducts)
    for (int k = 0; k < r.n * kI; ++k) sums[k] = Vec<A>{};
  int64_t d = 0;
  for (; d + ALP_TILE_D * W <= width; d += ALP_TILE_D * W) {
    ahead.step();
    residual_tile<kProducts, kI, ALP_TILE_D>(local, s, coef, out, d, squares, sums);
  }
  for (; d < width; d += kSpan<S> * W) residual_tile<kProducts, kI, kSpan<S>>(local, s, coef, out, d, squares, sums);
  ALP_UNROLL
  for (int i = 0; i < kI; ++i) r.squares[i0 + i] = squares[i];
}

template <bool kProducts, class A, class S>
void residual(const Residual<A, S>& r, int64_t width, Ahead& ahead) {
  each_tile(r.m, [&](int i, auto height) { residual_rows<kProducts, height.value>(r, i, width, ahead); });
}

// A combination of m output rows from m bases and n rows x_k. coef is (n, ld): the coefficients of one
// x_k lie together. S is A for scratch rows, or the dtype of hidden states; T is A, or the dtype of gradient rows
// that a tile rounds to and writes at once.
template <class A, class S = A, class T = A>
struct Combination {
  int m, n;
  const A* const* base;  // [m]
  const A* base_scale;   // [m]
  const S* const* x;     // [n]
  const A* coef;
  int64_t ld;
  T* const* out;             // [m]
  bool past_caches = false;  // how gradients are stored
};

// Columns d … d + kD vectors of kI output rows, whose first coefficients are coef.
template <int kI, int kD, class A, class S, class T>
ALP_INLINE void combine_tile(const Combination<A, S, T>& c, const A* const* base, const Vec<A>* base_scale,
                             const A* coef, T* const* out, int64_t d) {
  constexpr int W = kWidth<A>;
  Vec<A> acc[kI][kD];
  ALP_UNROLL
  for (int i = 0; i < kI; ++i) {
    ALP_UNROLL
    for (int v = 0; v < kD; ++v) acc[i][v] = load<Vec<A>>(base[i] + d + v * W) * base_scale[i];
  }
  for (int k = 0; k < c.n; ++k, coef += c.ld) {
    const S* x_k = c.x[k] + d;
    Vec<A> b_coef[kI];
    ALP_UNROLL
    for (int i = 0; i < kI; ++i) b_coef[i] = coef[i] - Vec<A>{};
    ALP_UNROLL
    for (int v = 0; v < kD; ++v) {
      const Vec<A> b_x = load_wide(x_k, v);
      ALP_UNROLL
      for (int i = 0; i < kI; ++i) acc[i][v] = acc[i][v] + b_x * b_coef[i];
    }
  }
  ALP_UNROLL
  for (int i = 0; i < kI; ++i) {
    ALP_UNROLL
    for (int v = 0; v < kD; v += kSpan<T>) {
      if (c.past_caches && sizeof(T) == sizeof(A))  // 16-bit rows go faster through the caches
        stream(out[i] + d + v * W, narrow_vectors(acc[i] + v, out[i]));
      else
        store(out[i] + d + v * W, narrow_vectors(acc[i] + v, out[i]));
    }
  }
}

template <int kI, class A, class S, class T>
ALP_TILE_FUNCTION void combine_rows(const Combination<A, S, T>& c, int i0, int64_t width, Ahead& ahead) {
  constexpr int W = kWidth<A>;
  const A* base[kI];
  T* out[kI];
  Vec<A> base_scale[kI];
  ALP_UNROLL
  for (int i = 0; i < kI; ++i) {
    base[i] = c.base[i0 + i];
    out[i] = c.out[i0 + i];
    base_scale[i] = c.base_scale[i0 + i] - Vec<A>{};
  }
  const Combination<A, S, T> local = c;
  const A* coef = c.coef + i0;
  int64_t d = 0;
  for (; d + ALP_TILE_D * W <= width; d += ALP_TILE_D * W) {
    ahead.step();
    combine_tile<kI, ALP_TILE_D>(local, base, base_scale, coef, out, d);
  }
  constexpr int kRest = kSpan<S> > kSpan<T> ? kSpan<S> : kSpan<T>;
  for (; d < width; d += kRest * W) combine_tile<kI, kRest>(local, base, base_scale, coef, out, d);
}

template <class A, class S, class T>
void combine(const Combination<A, S, T>& c, int64_t width, Ahead& ahead) {
  each_tile(c.m, [&](int i, auto height) { combine_rows<height.value>(c, i, width, ahead); });
}

}  // namespace
}  // namespace alp::ALP_ISA
