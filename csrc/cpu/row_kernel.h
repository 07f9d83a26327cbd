// The loss and its gradients for a range of rows, one row at a time: a row's hidden states are read
// from memory once and stay in the caches until its gradients are written. Included once per
// instruction set by row_kernel_<isa>.cpp.
#pragma once

#include "products.h"

namespace alp::ALP_ISA {
namespace {

// std::is_same, without the C++ library (vec.h says why)
template <class T, class U>
constexpr bool same = false;
template <class T>
constexpr bool same<T, T> = true;

inline double row_weight(const Problem& p, int64_t position) {
  switch (p.weight_type) {
    case WeightType::none: return 1.0;
    case WeightType::boolean: return static_cast<const uint8_t*>(p.weights)[position] != 0;
    case WeightType::u8: return static_cast<const uint8_t*>(p.weights)[position];
    case WeightType::i8: return static_cast<const int8_t*>(p.weights)[position];
    case WeightType::i16: return static_cast<const int16_t*>(p.weights)[position];
    case WeightType::i32: return static_cast<const int32_t*>(p.weights)[position];
    case WeightType::i64: return double(static_cast<const int64_t*>(p.weights)[position]);
    case WeightType::f16: return fp16_to_float(static_cast<const uint16_t*>(p.weights)[position]);
    case WeightType::bf16: return bf16_to_float(static_cast<const uint16_t*>(p.weights)[position]);
    case WeightType::f32: return static_cast<const float*>(p.weights)[position];
    case WeightType::f64: return static_cast<const double*>(p.weights)[position];
  }
  return 1.0;
}

// Hands out a thread's scratch memory; with a null base it only counts what is asked for.
class Arena {
 public:
  explicit Arena(char* base) : base(base) {}
  template <class T>
  T* take(int64_t count) {
    char* at = base + used;
    used += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(at);
  }
  template <class T>
  T* zeros(int64_t count) {
    T* at = take<T>(count);
    if (base != nullptr) __builtin_memset(at, 0, count * sizeof(T));
    return at;
  }
  int64_t used = 0;

 private:
  char* base;
};

// Scratch of one thread: (2m + 1) rows of A, n more where the teacher's rows are gathered or get gradients, m more
// with teacher gradients, m more for the queries in attend_back, 2m more with normalize, each D padded to at most 1023
// bytes more; and n * lanes(m) * (one vector + 4 A) of coefficients. With m 6, n 12, D 768 in fp32 that is 56 KB.
//
// A is the compute dtype. A student's row is widened, in its first product, into a scratch row of A, padded with
// zeros to whole vectors: every tile reads it again, and rows of the hidden states themselves lie a multiple of
// 4 KiB apart and would all fall into the same few sets of the L1 cache. The teacher's rows are widened wherever
// they are read: a copy costs more than to read them from the L2 cache once more. They are gathered first only where
// the two sides differ in dtype, D is not whole vectors, the row is a mean, or with normalize.
template <class A>
class RowKernel {
 public:
  RowKernel(const Problem& p, Arena& arena, Partial partial) : p(p), partial(partial) {
    const int64_t m = p.m, n = p.n;
    h = arena.take<A*>(m);
    group_s = arena.take<A*>(m);
    group_q = arena.take<A*>(p.query != nullptr ? m : 0);
    group_t = arena.take<A*>(n);
    from_s = arena.take<const char*>(m);
    from_t = arena.take<const char*>(n);
    bases = arena.take<const A*>(m > n ? m : n);
    rows = arena.take<A*>(2 * m);
    out = arena.take<A*>(m > n ? m : n);
    grad = arena.take<char*>(m > n ? m : n);
    next = arena.take<const char*>(m + n);
    next_bytes = arena.take<int64_t>(m + n);
    // Student layers lie side by side, in full vectors: (n, ld) and (ld) arrays. The lanes behind the last
    // student layer are computed like the others and never read.
    const int64_t ld = lanes(p.m), lanes_n = n * ld;
    weight = arena.take<A>(m);
    base_scale = arena.take<A>(m > n ? m : n);
    sums = arena.take<Vec<A>>(m * n);
    squares = arena.take<Vec<A>>(m);
    wide = arena.take<Vec<A>>(n * ALP_TILE_D);
    z = arena.zeros<A>(lanes_n);
    a = arena.zeros<A>(lanes_n);
    products = arena.zeros<A>(lanes_n);
    coef = arena.zeros<A>(p.teacher_grad && 2 * m * n > lanes_n ? 2 * m * n : lanes_n);
    group_weight = arena.zeros<A>(ld);
    all_a = arena.take<A>(p.teacher_grad ? m * n : 0);
    all_c = arena.take<A>(p.teacher_grad ? m * n : 0);

    width = (p.D + kWidth<A> - 1) / kWidth<A> * kWidth<A>;
    const int64_t whole = (p.teacher_dtype == Dtype::bf16 ? kSpan<PairedBf16> : 1) * kWidth<A>;
    as_they_are = p.student_dtype == p.teacher_dtype && p.D % whole == 0 && p.pooling != Pooling::mean && !p.normalize;
    constexpr int64_t kStep = 512 / sizeof(A);
    pitch = ((width + kStep - 1) / kStep | 1) * kStep;  // an odd multiple of 512 bytes spreads the rows over the sets
    own_s = arena.take<A>(m * pitch);
    own_t = arena.take<A>(as_they_are && !p.teacher_grad ? 0 : n * pitch);
    errors = arena.take<A>(m * pitch);
    own_q = p.query != nullptr ? arena.take<A>(m * pitch) : own_s;
    spare = arena.zeros<A>(pitch);
    combined = arena.take<A>(p.normalize ? m * pitch : 0);
    student_side = arena.take<A>(p.normalize ? m * pitch : 0);
    // A student's gradient row takes the place of its hidden state, where the teacher's gradient needs that no more.
    student_out = p.teacher_grad ? arena.take<A>(m * pitch) : own_s;
  }

  void run(int64_t begin, int64_t end, int64_t last) {
    for (int64_t r = begin; r < end; ++r) {
      double mu;
      const int64_t position = locate(r, &mu);
      if (mu == 0) {
        skip(r);
        continue;
      }
      for (int i = 0; i < p.m; ++i) weight[i] = A(p.gradient_coef[i] * mu);
      if (p.pooling == Pooling::mean)
        gather_mean(position);
      else if (!as_they_are)
        gather(position);
      look_ahead(r + 1, last);
      for (int g = 0; g < p.group_count; ++g) group(p.groups[g], r, position, mu);
      if (p.teacher_grad) teacher_gradients(position);
      complete(r, position);
    }
    fence();
  }

 private:
  const Problem& p;
  Partial partial;
  A** h;                              // [m] what stands for e_i in p_ij and dt_j
  A **group_s, **group_q, **group_t;  // the rows of a group
  const char **from_s, **from_t;      // and their hidden states
  const A** bases;                    // rows of a product
  A **rows, **out;
  char** grad;        // where gradient rows lie
  const char** next;  // [m + n] where the next rows start
  int64_t* next_bytes;
  Ahead ahead{};
  A *weight, *base_scale;        // [m] 2w, and the factors of a combination's bases
  Vec<A>*sums, *squares, *wide;  // m * n and [m] vectors whose lanes add up to a product and to ||e_i||^2; of a tile
  A *z, *a, *products, *coef;    // (n, ld) <s_i, t_j>, a_ij, p_ij then c_ij, coefficients of a combination
  A* group_weight;               // [ld] 2w of a group's student layers
  A *all_a, *all_c;              // (m, n) a_ij and tau c_ij of all groups, for the teacher's gradient
  int64_t width, pitch;          // D in whole vectors, from one scratch row to the next
  A *own_s, *own_q, *own_t, *errors, *spare, *combined, *student_side, *student_out;  // scratch rows
  bool as_they_are;       // the teacher's rows are read from the hidden states; bf16 in pairs
  double mean_total = 0;  // sum of the weights of a "mean" row

  static constexpr int kLanes = kWidth<A> < 4 ? 4 : kWidth<A>;
  static int64_t lanes(int m) { return (m + kLanes - 1) / kLanes * kLanes; }
  bool with_gradient() const { return p.student_grad || p.teacher_grad || p.scale_grad; }
  bool through_attention() const { return with_gradient() && !p.detach && (p.scale != 0 || p.scale_grad); }

  // Calls f with a null pointer to the type that stands for rows of the dtype. With rows as they are scratch rows have
  // the order of columns of PairedBf16 too.
  template <class F>
  void with_type(Dtype type, F f) const {
    switch (type) {
      case Dtype::f32: return f(static_cast<float*>(nullptr));
      case Dtype::f64:
        if constexpr (sizeof(A) == 8) f(static_cast<double*>(nullptr));
        return;  // a float64 side computes in float64
      case Dtype::bf16: return as_they_are ? f(static_cast<PairedBf16*>(nullptr)) : f(static_cast<Bf16*>(nullptr));
      case Dtype::f16: return f(static_cast<Fp16*>(nullptr));
    }
  }

  // The row's weight, and its position among the (*lead) rows (of its first for "mean").
  int64_t locate(int64_t r, double* mu) {
    const int64_t first = r * p.seq;
    if (p.pooling == Pooling::token || p.pooling == Pooling::cls) {
      *mu = row_weight(p, first);
      return first;
    }
    if (p.pooling == Pooling::last) {
      int64_t k = p.seq - 1;
      while (k > 0 && row_weight(p, first + k) == 0) --k;
      *mu = row_weight(p, first + k) != 0;
      return first + k;
    }
    mean_total = 0;
    for (int64_t k = 0; k < p.seq; ++k) mean_total += row_weight(p, first + k);
    *mu = mean_total != 0;
    return first;
  }

  // Widens every layer's row.
  void gather(int64_t position) {
    for (int i = 0; i < p.m; ++i)
      if (p.student_active[i]) gather_row(p.student[i], p.student_dtype, own_s + i * pitch, position);
    for (int j = 0; j < p.n; ++j)
      if (p.teacher_active[j]) gather_row(p.teacher[j], p.teacher_dtype, own_t + j * pitch, position);
  }
  void gather_row(const Layer& layer, Dtype type, A* own, int64_t position) {
    with_type(type, [&]<class T>(T*) { unpack(reinterpret_cast<const T*>(row_of(layer, position)), own, width, p.D); });
  }

  void gather_mean(int64_t position) {
    for (int i = 0; i < p.m; ++i)
      if (p.student_active[i]) average(p.student[i], p.student_dtype, own_s + i * pitch, position);
    for (int j = 0; j < p.n; ++j)
      if (p.teacher_active[j]) average(p.teacher[j], p.teacher_dtype, own_t + j * pitch, position);
  }
  void average(const Layer& layer, Dtype type, A* own, int64_t position) {
    for (int64_t d = 0; d < width; ++d) own[d] = 0;
    for (int64_t k = 0; k < p.seq; ++k) {
      const double weight_k = row_weight(p, position + k);
      if (weight_k == 0) continue;
      const A share = A(weight_k / mean_total);
      with_type(type, [&]<class T>(T*) {
        add_row(reinterpret_cast<const T*>(row_of(layer, position + k)), share, own, p.D);
      });
    }
  }

  // The next row's place, and how many of its lines to prefetch with every tile of this row's products.
  void look_ahead(int64_t r, int64_t last) {
    const int64_t position = r * p.seq;
    const bool known = p.pooling == Pooling::token || p.pooling == Pooling::cls;
    ahead.count = 0;
    if (!known || r == last || row_weight(p, position) == 0) return;
    int64_t lines = 0, tiles = 1;
    const auto add = [&](const Layer& layer, Dtype type) {
      const int64_t bytes = p.D * dtype_size(type);
      next[ahead.count] = row_of(layer, position);
      const bool foreseen =
          p.fetching == Fetching::pairs && next[ahead.count] == row_of(layer, (r - 1) * p.seq) + bytes;
      next_bytes[ahead.count] = foreseen && bytes > Ahead::kStart ? Ahead::kStart : bytes;
      lines += next_bytes[ahead.count++] / Ahead::step_of(p.fetching) + 1;
    };
    for (int i = 0; i < p.m; ++i)
      if (p.student_active[i]) add(p.student[i], p.student_dtype);
    for (int j = 0; j < p.n; ++j)
      if (p.teacher_active[j]) add(p.teacher[j], p.teacher_dtype);
    for (int g = 0; g < p.group_count; ++g)
      tiles += tile_count(p.groups[g].m) * (2 * width / (ALP_TILE_D * kWidth<A>)+p.groups[g].n / ALP_TILE_J);
    const int64_t step = tiles * Ahead::kLines;
    ahead = {next, next_bytes, p.fetching, ahead.count, int((lines + step - 1) / step)};
  }

  // A layer's gradient row from scratch to memory; a "mean" row is spread later.
  void write(const Layer& layer, Dtype type, const A* row, int64_t position) {
    if (layer.grad == nullptr || p.pooling == Pooling::mean) return;
    write_row(layer.grad + position * p.D * dtype_size(type), type, row);
  }
  void write_row(char* at, Dtype type, const A* row) const {
    with_type(type, [&]<class T>(T*) { pack(row, reinterpret_cast<T*>(at), p.D, p.stream); });
  }

  // One dense block of the attention: students that attend to the same teachers.
  void group(const Group& g, int64_t r, int64_t position, double mu) {
    for (int i = 0; i < g.m; ++i) {
      group_s[i] = own_s + g.student[i] * pitch;
      group_weight[i] = weight[g.student[i]];
    }
    if (!as_they_are) {
      for (int j = 0; j < g.n; ++j) group_t[j] = own_t + g.teacher[j] * pitch;
      return group_of<A>(g, nullptr, group_t, r, position, mu);
    }
    for (int i = 0; i < g.m; ++i) from_s[i] = row_of(p.student[g.student[i]], position);
    for (int j = 0; j < g.n; ++j) from_t[j] = row_of(p.teacher[g.teacher[j]], position);
    with_type(p.teacher_dtype, [&]<class S>(S*) {
      if constexpr (!same<S, Bf16> && requires(const S* from, Vec<A> v) { v = load_wide(from, 0); })
        group_of<S>(g, reinterpret_cast<const S* const*>(from_s), reinterpret_cast<const S* const*>(from_t), r,
                    position, mu);
    });
  }

  // t are the teacher's rows. s are the student's hidden states where scratch does not hold these yet, or null.
  template <class S>
  void group_of(const Group& g, const S* const* s, const S* const* t, int64_t r, int64_t position, double mu) {
    const int m = g.m, n = g.n;
    const int64_t ld = lanes(m);
    const bool varies = n > 1 && through_attention();
    if (p.task == Task::attend_back) return attend_back(g, s, t, r, position, varies);
    attend(g, s, t, r, position, mu);
    if (p.task == Task::attend) return write_sum(g, n, t, a, position);
    if (p.normalize)
      compare_normalised(g, mu);
    else
      compare(g, t, mu, varies);
    if (!with_gradient()) return;
    if (varies) {
      add_lanes(m, n, sums, products, ld);  // p_ij = <e_i, t_j>
      differentiate_softmax(m, n);
    }
    if (p.teacher_grad) keep_coefficients(g, varies);
    if (!p.student_grad) return;
    // ds_i = 2w (h_i - tau sum_j c_ij t_j)
    for (int i = 0; i < m; ++i) {
      bases[i] = p.normalize ? student_side + g.student[i] * pitch : h[g.student[i]];
      out[i] = student_out + g.student[i] * pitch;
    }
    const Combination<A, S> gradient{m, varies ? n : 0, bases, group_weight, t, coef, ld, out};
    write_combination(gradient, p.student, g.student, p.student_dtype, position);
  }

  // Of a group, for the teacher's gradients
  void keep_coefficients(const Group& g, bool varies) {
    const int64_t ld = lanes(g.m);
    for (int i = 0; i < g.m; ++i)
      for (int j = 0; j < g.n; ++j) {
        const int64_t at = int64_t(g.student[i]) * p.n + g.teacher[j];
        all_a[at] = a[j * ld + i];
        all_c[at] = varies ? A(p.scale) * products[j * ld + i] : A(0);
      }
  }

  // From g_i, which stands where the student's rows do: p_ij = <g_i, t_j>, and dq_i = tau sum_j c_ij t_j
  template <class S>
  void attend_back(const Group& g, const S* const* s, const S* const* t, int64_t r, int64_t position, bool varies) {
    const int m = g.m, n = g.n;
    const int64_t ld = lanes(m);
    dots(m, n, Operands<A, S>{group_s, t, s}, width, sums, ahead);
    add_lanes(m, n, sums, products, ld);
    for (int i = 0; i < m; ++i) {
      h[g.student[i]] = group_s[i];
      const A* attention = attention_row(g.student[i], r);
      for (int j = 0; j < n; ++j) a[j * ld + i] = attention[g.teacher[j]];
    }
    if (p.query != nullptr) {
      for (int i = 0; i < m; ++i) {
        group_q[i] = own_q + g.student[i] * pitch;
        gather_row(p.query[g.student[i]], p.student_dtype, group_q[i], position);
      }
    }
    if (p.scale_grad) {
      dots(m, n, Operands<A, S>{group_q, t}, width, sums, ahead);
      add_lanes(m, n, sums, z, ld);
    }
    if (varies) differentiate_softmax(m, n);
    if (p.teacher_grad) keep_coefficients(g, varies);
    if (p.student_grad) write_sum(g, varies ? n : 0, t, coef, position);
  }

  // sum_j factor_ij t_j in the place of the student's gradients
  template <class S>
  void write_sum(const Group& g, int n, const S* const* t, const A* factor, int64_t position) {
    for (int i = 0; i < g.m; ++i) {
      bases[i] = spare;  // zeros
      out[i] = student_out + g.student[i] * pitch;
    }
    const Combination<A, S> sum{g.m, n, bases, group_weight, t, factor, lanes(g.m), out};
    write_combination(sum, p.student, g.student, p.student_dtype, position);
  }

  // The gradient rows of some layers: from the registers to memory, or by way of scratch rows where a row has to be
  // whole first ("mean"), is not wanted, or is not made of whole vectors.
  template <class S>
  void write_combination(const Combination<A, S>& c, const Layer* layers, const int* index, Dtype type,
                         int64_t position) {
    bool direct = p.pooling != Pooling::mean && width == p.D;
    for (int i = 0; i < c.m; ++i) direct &= layers[index[i]].grad != nullptr;
    if (direct) {
      for (int i = 0; i < c.m; ++i) grad[i] = layers[index[i]].grad + position * p.D * dtype_size(type);
      with_type(type, [&]<class T>(T*) { direct = write_direct<T>(c); });
    }
    if (direct) return;
    combine(c, width, ahead);
    for (int i = 0; i < c.m; ++i) write(layers[index[i]], type, c.out[i], position);
  }
  template <class T, class S>
  bool write_direct(const Combination<A, S>& c) {
    // Rows of hidden states beside gradients of another dtype do not come about.
    if constexpr ((same<S, A> || same<S, T>) && requires(const Vec<A>* from, T* to) { narrow_vectors(from, to); }) {
      T* const* to = reinterpret_cast<T* const*>(grad);
      combine(Combination<A, S, T>{c.m, c.n, c.base, c.base_scale, c.x, c.coef, c.ld, to, p.stream}, width, ahead);
      return true;
    }
    return false;
  }

  // products: p_ij becomes c_ij = a_ij (p_ij - sum_j a_ij p_ij), coef = -2 w tau c_ij; the scale's gradient
  void differentiate_softmax(int m, int n) {
    using V = Vec<A>;
    const int64_t ld = lanes(m);
    const A scale = A(p.scale);
    for (int64_t i = 0; i < ld; i += kWidth<A>) {
      V mean = {};
      for (int64_t k = i; k < n * ld; k += ld) mean += load<V>(a + k) * load<V>(products + k);
      const V factor = load<V>(group_weight + i) * -scale;
      for (int64_t k = i; k < n * ld; k += ld) {
        const V c = load<V>(a + k) * (load<V>(products + k) - mean);
        store(products + k, c);
        store(coef + k, c * factor);
      }
    }
    if (!p.scale_grad) return;
    for (int i = 0; i < m; ++i) {
      double d_scale = 0;
      for (int64_t k = i; k < n * ld; k += ld) d_scale += double(products[k]) * double(z[k]);
      partial.d_scale[0] -= double(group_weight[i]) * d_scale;
    }
  }

  // a_ij, and what return_details shows of it
  template <class S>
  void attend(const Group& g, const S* const* s, const S* const* t, int64_t r, int64_t position, double mu) {
    const int m = g.m, n = g.n;
    const int64_t ld = lanes(m);
    if (n == 1 || (p.scale == 0 && !p.scale_grad)) {  // constant, whatever the scores
      for (int64_t k = 0; k < n * ld; ++k) a[k] = A(1) / A(n);
      for (int i = 0; s != nullptr && i < m; ++i)
        gather_row(p.student[g.student[i]], p.student_dtype, group_s[i], position);
    } else {
      dots(m, n, Operands<A, S>{group_s, t, s}, width, sums, ahead);
      add_lanes(m, n, sums, z, ld);
      softmax(m, n);
    }
    if (p.attention == nullptr) return;
    for (int i = 0; i < m; ++i) {
      double entropy = 0;
      A* attention = attention_row(g.student[i], r);
      for (int j = 0; j < p.n; ++j) attention[j] = 0;
      for (int j = 0; j < n; ++j) {
        const double a_ij = a[j * ld + i];
        attention[g.teacher[j]] = A(a_ij);
        if (!(a_ij <= 0)) entropy -= a_ij * __builtin_log(a_ij);
      }
      partial.entropy[g.student[i]] += mu * entropy;
    }
  }

  // a = softmax_j(tau z), with the maximum subtracted
  void softmax(int m, int n) {
    using V = Vec<A>;
    const int64_t ld = lanes(m);
    const A scale = A(p.scale);
    for (int64_t i = 0; i < ld; i += kWidth<A>) {
      V top = load<V>(z + i) * scale;
      for (int64_t k = i + ld; k < n * ld; k += ld) {
        const V score = load<V>(z + k) * scale;
        top = score > top ? score : top;
      }
      V total = {};
      for (int64_t k = i; k < n * ld; k += ld) {
        const V e = exp_nonpositive(load<V>(z + k) * scale - top);
        store(a + k, e);
        total += e;
      }
      const V inverse = A(1) / total;
      for (int64_t k = i; k < n * ld; k += ld) store(a + k, load<V>(a + k) * inverse);
    }
  }

  // e_i = s_i - sum_j a_ij t_j, its square into the loss; where the attention varies also sums of <e_i, t_j>
  template <class S>
  void compare(const Group& g, const S* const* t, double mu, bool varies) {
    const int m = g.m, n = g.n;
    for (int i = 0; i < m; ++i) {
      h[g.student[i]] = errors + g.student[i] * pitch;
      out[i] = with_gradient() ? h[g.student[i]] : nullptr;
    }
    const Residual<A, S> e{m, n, group_s, t, a, lanes(m), out, squares, sums, wide};
    if (varies)
      residual<true>(e, width, ahead);
    else
      residual<false>(e, width, ahead);
    for (int i = 0; i < m; ++i) partial.loss[g.student[i]] += mu * double(sum<A, kWidth<A>>(squares[i]));
  }

  // e = s/|s| - C/|C|; h_s and h_C are e carried back through the two normalisations:
  // P_x(e) = (e - x^ <x^, e>) / |x|, or e / eps where |x| < eps
  void compare_normalised(const Group& g, double mu) {
    const int m = g.m, n = g.n;
    const int64_t ld = lanes(m);
    const double eps = 1e-12;
    for (int i = 0; i < m; ++i) {
      const int student = g.student[i];
      const A* x = group_s[i];
      A *c = combined + student * pitch, *e = errors + student * pitch, *h_s = student_side + student * pitch;
      combine_one(group_t[0], a[i], n - 1, group_t + 1, a + ld + i, ld, c);  // C
      const double length_x = __builtin_sqrt(double(dot(x, x, width))),
                   length_c = __builtin_sqrt(double(dot(c, c, width)));
      const A inverse_x = A(1 / (length_x < eps ? eps : length_x));
      const A inverse_c = A(1 / (length_c < eps ? eps : length_c));
      const A minus = -inverse_c;
      const A* c_pointer = c;
      combine_one(x, inverse_x, 1, &c_pointer, &minus, 1, e);  // e
      partial.loss[student] += mu * double(dot(e, e, width));
      if (!with_gradient()) continue;
      const A along_x = length_x < eps ? A(0) : -inverse_x * inverse_x * inverse_x * dot(x, e, width);
      const A along_c = length_c < eps ? A(0) : -inverse_c * inverse_c * inverse_c * dot(c, e, width);
      combine_one(e, inverse_x, 1, &x, &along_x, 1, h_s);
      combine_one(e, inverse_c, 1, &c_pointer, &along_c, 1, e);  // h_C, over e column by column
      h[student] = rows[i] = e;
    }
    if (!(n > 1 && through_attention())) return;
    dots(m, n, Operands<A, A>{rows, group_t}, width, sums, ahead);
  }

  void combine_one(const A* base, A base_factor, int n, const A* const* x, const A* c, int64_t ld, A* to) {
    combine(Combination<A>{1, n, &base, &base_factor, x, c, ld, &to}, width, ahead);
  }

  // dt_j = -2 sum_i w (a_ij h_i + tau c_ij s_i), for teacher layers that the same students attend to. It takes
  // the place of t_j, which nothing reads any more.
  void teacher_gradients(int64_t position) {
    for (int k = 0; k < p.teacher_group_count; ++k) {
      const Group& g = p.teacher_groups[k];
      const int m = g.m, n = g.n;
      for (int i = 0; i < m; ++i) {
        const int student = g.student[i];
        rows[i] = h[student];
        rows[m + i] = own_q + student * pitch;
        for (int j = 0; j < n; ++j) {
          const int64_t at = int64_t(student) * p.n + g.teacher[j];
          coef[i * n + j] = -weight[student] * all_a[at];
          coef[(m + i) * n + j] = -weight[student] * all_c[at];
        }
      }
      for (int j = 0; j < n; ++j) {
        bases[j] = rows[0];  // the first row is the base of every output, the others are added
        base_scale[j] = coef[j];
        out[j] = own_t + g.teacher[j] * pitch;
      }
      const int count = through_attention() ? 2 * m : m;
      const Combination<A> gradient{n, count - 1, bases, base_scale, rows + 1, coef + n, n, out};
      write_combination(gradient, p.teacher, g.teacher, p.teacher_dtype, position);
    }
  }

  // ---- What is left of a row's gradients: zeros, and the pooled row's gradient spread over its tokens --

  void complete(int64_t r, int64_t position) {
    for (int i = 0; i < p.m; ++i)
      complete_layer(p.student[i], p.student_dtype, p.student_active[i], student_out + i * pitch, r, position);
    for (int j = 0; j < p.n; ++j)
      complete_layer(p.teacher[j], p.teacher_dtype, p.teacher_active[j], own_t + j * pitch, r, position);
    if (p.attention != nullptr)
      for (int i = 0; i < p.m; ++i)
        if (!p.student_active[i]) zero_attention(i, r);
  }

  void complete_layer(const Layer& layer, Dtype type, bool active, const A* pooled, int64_t r, int64_t position) {
    if (layer.grad == nullptr || (active && p.pooling == Pooling::token)) return;
    const int64_t bytes = p.D * dtype_size(type);
    char* sequence = layer.grad + r * p.seq * bytes;
    if (active && p.pooling == Pooling::mean) return spread(sequence, type, pooled, position);
    const int64_t keep = active ? position - r * p.seq : p.seq;
    zero_gradient(sequence, keep * bytes);
    if (active) zero_gradient(sequence + (keep + 1) * bytes, (p.seq - keep - 1) * bytes);
  }

  void spread(char* sequence, Dtype type, const A* pooled, int64_t position) {
    const int64_t bytes = p.D * dtype_size(type);
    double weight_of_spare = 0;
    for (int64_t k = 0; k < p.seq; ++k) {
      const double weight_k = row_weight(p, position + k);
      char* row = sequence + k * bytes;
      if (weight_k == 0) {
        zero_gradient(row, bytes);
        continue;
      }
      if (weight_k != weight_of_spare) {  // a mask's weights are all equal
        const A share = A(weight_k / mean_total);
        for (int64_t d = 0; d < width; ++d) spare[d] = share * pooled[d];
        weight_of_spare = weight_k;
      }
      write_row(row, type, spare);
    }
  }

  // A row of weight 0: not read, all its gradients 0.
  void skip(int64_t r) {
    for (int i = 0; i < p.m; ++i) skip_layer(p.student[i], p.student_dtype, r);
    for (int j = 0; j < p.n; ++j) skip_layer(p.teacher[j], p.teacher_dtype, r);
    if (p.attention != nullptr && p.task != Task::attend_back)
      for (int i = 0; i < p.m; ++i) zero_attention(i, r);
  }
  void skip_layer(const Layer& layer, Dtype type, int64_t r) {
    const int64_t bytes = p.seq * p.D * dtype_size(type);
    if (layer.grad != nullptr) zero_gradient(layer.grad + r * bytes, bytes);
  }
  A* attention_row(int i, int64_t r) const { return static_cast<A*>(p.attention) + (i * p.rows + r) * p.n; }
  void zero_attention(int i, int64_t r) { zero(reinterpret_cast<char*>(attention_row(i, r)), p.n * sizeof(A)); }
  // Past the caches like the other gradients, where these go past them.
  void zero_gradient(char* at, int64_t bytes) const {
    if (!p.stream) return zero(at, bytes);
    for (int64_t k = 0; k < bytes; k += ALP_VECTOR_BYTES) stream(at + k, Vec<float>{});
  }
  static void zero(char* at, int64_t bytes) { __builtin_memset(at, 0, bytes); }
};

template <class A>
int64_t scratch_bytes(const Problem& p) {
  Arena arena(nullptr);
  RowKernel<A>(p, arena, {});
  return arena.used;
}

template <class A>
void run(const Problem& p, int64_t begin, int64_t end, int64_t last, char* scratch, Partial partial) {
  Arena arena(scratch);
  RowKernel<A>(p, arena, partial).run(begin, end, last);
}

template <class A>
constexpr Kernel kernel = {scratch_bytes<A>, run<A>};

constexpr Kernels kernels = {kernel<float>, kernel<double>};

}  // namespace
}  // namespace alp::ALP_ISA
