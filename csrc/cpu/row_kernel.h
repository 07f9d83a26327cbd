// The loss and its gradients for a range of rows, one row at a time: a row's hidden states are read
// from memory once and stay in the caches until its gradients are written. Included once per
// instruction set by row_kernel_<isa>.cpp.
#pragma once

#include "products.h"

namespace alp::ALP_ISA {
namespace {

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
  int64_t used = 0;

 private:
  char* base;
};

template <class A>
class RowKernel {
 public:
  RowKernel(const Problem& p, Arena& arena, Partial partial) : p(p), partial(partial) {
    const int64_t m = p.m, n = p.n, mn = m * n;
    const bool mean = p.pooling == Pooling::mean;
    s = arena.take<const A*>(m);
    t = arena.take<const A*>(n);
    h = arena.take<const A*>(m);
    rows_a = arena.take<const A*>(m > n ? m : n);
    rows_b = arena.take<const A*>(n > 2 * m ? n : 2 * m);
    next = arena.take<const char*>(m + n);
    out = arena.take<char*>(m > n ? m : n);
    squares = arena.take<double>(m);
    weight = arena.take<A>(m);
    base_scale = arena.take<A>(m > n ? m : n);
    // Read by full vectors, hence the room behind the last element.
    z = arena.take<A>(mn + 16);
    a = arena.take<A>(mn + 16);
    products = arena.take<A>(mn);
    coef = arena.take<A>(p.teacher_grad ? 2 * mn : mn);
    all_a = arena.take<A>(p.teacher_grad ? mn : 0);
    all_c = arena.take<A>(p.teacher_grad ? mn : 0);

    // One line more than D: rows at a multiple of 4 KiB would share one cache set.
    pitch = (p.D + 15) / 16 * 16 + 16;
    residual = arena.take<A>(m * pitch);
    spare = arena.take<A>(pitch);
    own_s = arena.take<A>(direct(p.student_dtype) ? 0 : m * pitch);
    own_t = arena.take<A>(direct(p.teacher_dtype) ? 0 : n * pitch);
    combined = arena.take<A>(p.normalize ? m * pitch : 0);
    student_side = arena.take<A>(p.normalize ? m * pitch : 0);
    pooled_student_grad = arena.take<A>(mean && p.student_grad ? m * pitch : 0);
    pooled_teacher_grad = arena.take<A>(mean && p.teacher_grad ? n * pitch : 0);

    prefetch.rows = next;
    prefetch.student_rows = p.m;
    prefetch.bytes[0] = p.D * dtype_size(p.student_dtype);
    prefetch.bytes[1] = p.D * dtype_size(p.teacher_dtype);
  }

  void run(int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      double mu;
      const int64_t position = locate(r, &mu);
      if (mu == 0) {
        skip(r);
        continue;
      }
      for (int i = 0; i < p.m; ++i) {
        if (p.student_active[i]) s[i] = fetch(p.student[i], p.student_dtype, own_s + i * pitch, position);
        weight[i] = A(p.gradient_coef[i] * mu);
      }
      for (int j = 0; j < p.n; ++j)
        if (p.teacher_active[j]) t[j] = fetch(p.teacher[j], p.teacher_dtype, own_t + j * pitch, position);
      announce(r + 1, end);
      for (int g = 0; g < p.group_count; ++g) group(p.groups[g], r, position, mu);
      if (p.teacher_grad) teacher_gradients(position);
      complete(r, position);
    }
    fence();
  }

 private:
  const Problem& p;
  Partial partial;
  const A **s, **t;            // [m], [n] this row of each layer, in the compute dtype
  const A** h;                 // [m] what stands for e_i in p_ij and dt_j
  const A **rows_a, **rows_b;  // the rows of a product
  const char** next;           // [m + n] where the next row of each layer starts
  char** out;
  double* squares;
  A *weight, *base_scale;  // [m] 2w
  A *z, *a, *products, *coef;
  A *all_a, *all_c;  // (m, n) a_ij and tau c_ij of all groups, for the teacher's gradient
  int64_t pitch;     // from one scratch row to the next
  A *residual, *spare, *own_s, *own_t, *combined, *student_side, *pooled_student_grad, *pooled_teacher_grad;
  Prefetcher prefetch{}, idle{};
  double mean_total = 0;  // sum of the weights of a "mean" row

  static constexpr Dtype kCompute = sizeof(A) == 4 ? Dtype::f32 : Dtype::f64;
  bool direct(Dtype type) const { return type == kCompute && p.pooling != Pooling::mean; }
  bool with_gradient() const { return p.student_grad || p.teacher_grad || p.scale_grad; }
  bool through_attention() const { return with_gradient() && !p.detach && (p.scale != 0 || p.scale_grad); }

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

  const A* fetch(const Layer& layer, Dtype type, A* own, int64_t position) {
    if (direct(type)) return reinterpret_cast<const A*>(row_of(layer, position));
    if (p.pooling != Pooling::mean) {
      unpack<A>(row_of(layer, position), type, own, p.D);
      return own;
    }
    for (int64_t d = 0; d < p.D; ++d) own[d] = 0;
    for (int64_t k = 0; k < p.seq; ++k) {
      const double weight_k = row_weight(p, position + k);
      if (weight_k == 0) continue;
      const A share = A(weight_k / mean_total);
      unpack<A>(row_of(layer, position + k), type, spare, p.D);
      for (int64_t d = 0; d < p.D; ++d) own[d] += share * spare[d];
    }
    return own;
  }

  // Tell the prefetcher where the next row lies.
  void announce(int64_t r, int64_t end) {
    int count = 0;
    const int64_t position = r * p.seq;
    const bool known = p.pooling == Pooling::token || p.pooling == Pooling::cls;
    if (known && r < end && row_weight(p, position) != 0) {
      for (int i = 0; i < p.m; ++i) next[count++] = row_of(p.student[i], position);
      for (int j = 0; j < p.n; ++j) next[count++] = row_of(p.teacher[j], position);
    }
    prefetch.start(count);
  }

  // Where a layer's gradient row goes: to memory, to scratch until it is spread, or to nowhere.
  char* gradient_row(const Layer& layer, Dtype type, A* pooled, int64_t position) {
    if (layer.grad == nullptr) return reinterpret_cast<char*>(spare);
    if (p.pooling == Pooling::mean) return reinterpret_cast<char*>(pooled);
    return layer.grad + position * p.D * dtype_size(type);
  }
  Dtype gradient_dtype(Dtype type) const { return p.pooling == Pooling::mean ? kCompute : type; }

  // One dense block of the attention: students that attend to the same teachers.
  void group(const Group& g, int64_t r, int64_t position, double mu) {
    const int m = g.m, n = g.n;
    for (int i = 0; i < m; ++i) rows_a[i] = s[g.student[i]];
    for (int j = 0; j < n; ++j) rows_b[j] = t[g.teacher[j]];
    attend(g, r, mu);
    if (p.normalize)
      compare_normalised(g, mu);
    else
      compare(g, mu);
    if (!with_gradient()) return;
    const bool varies = n > 1 && through_attention();
    if (varies) {
      for (int i = 0; i < m; ++i) rows_a[i] = h[g.student[i]];
      dots<A>(m, rows_a, n, rows_b, p.D, products, n, prefetch);  // p_ij = <e_i, t_j>
      for (int i = 0; i < m; ++i) differentiate_softmax(g, i);    // products becomes c_ij
    }
    if (p.teacher_grad)
      for (int i = 0; i < m; ++i)
        for (int j = 0; j < n; ++j) {
          const int64_t at = int64_t(g.student[i]) * p.n + g.teacher[j];
          all_a[at] = a[i * n + j];
          all_c[at] = varies ? A(p.scale) * products[i * n + j] : A(0);
        }
    if (!p.student_grad) return;
    // ds_i = 2w (h_i - tau sum_j c_ij t_j)
    for (int i = 0; i < m; ++i) {
      const int student = g.student[i];
      rows_a[i] = p.normalize ? student_side + student * pitch : h[student];
      base_scale[i] = weight[student];
      out[i] = gradient_row(p.student[student], p.student_dtype, pooled_student_grad + student * pitch, position);
      if (varies)
        for (int j = 0; j < n; ++j) coef[j * m + i] = -weight[student] * A(p.scale) * products[i * n + j];
    }
    const Combination<A> gradient{m, varies ? n : 0, rows_a, base_scale, rows_b, coef, m, out, nullptr};
    combine_into<A>(gradient_dtype(p.student_dtype), p.stream, gradient, p.D, prefetch);
  }

  // c_ij = a_ij (p_ij - sum_j a_ij p_ij), and its share of the scale's gradient
  void differentiate_softmax(const Group& g, int i) {
    A* row = products + i * g.n;
    const A *attention = a + i * g.n, *score = z + i * g.n;
    A mean = 0;
    for (int j = 0; j < g.n; ++j) mean += attention[j] * row[j];
    double d_scale = 0;
    for (int j = 0; j < g.n; ++j) {
      row[j] = attention[j] * (row[j] - mean);
      if (p.scale_grad) d_scale += double(row[j]) * double(score[j]);
    }
    partial.d_scale[0] -= double(weight[g.student[i]]) * d_scale;
  }

  // a_ij, and what return_details shows of it
  void attend(const Group& g, int64_t r, double mu) {
    const int m = g.m, n = g.n;
    if (n == 1) {  // softmax over one layer is 1, whatever the score
      for (int i = 0; i < m; ++i) a[i] = 1;
    } else if (p.scale == 0 && !p.scale_grad) {
      for (int k = 0; k < m * n; ++k) a[k] = A(1) / A(n);
    } else {
      dots<A>(m, rows_a, n, rows_b, p.D, z, n, idle);
      softmax(m, n);
    }
    if (p.attention == nullptr) return;
    for (int i = 0; i < m; ++i) {
      double entropy = 0;
      A* attention = static_cast<A*>(p.attention) + (int64_t(g.student[i]) * p.rows + r) * p.n;
      for (int j = 0; j < p.n; ++j) attention[j] = 0;
      for (int j = 0; j < n; ++j) {
        const double a_ij = a[i * n + j];
        attention[g.teacher[j]] = A(a_ij);
        if (!(a_ij <= 0)) entropy -= a_ij * __builtin_log(a_ij);
      }
      partial.entropy[g.student[i]] += mu * entropy;
    }
  }

  // a = softmax(tau z) per student layer, with the maximum subtracted
  void softmax(int m, int n) {
    const A scale = A(p.scale);
    for (int i = 0; i < m; ++i) {
      A top = scale * z[i * n];
      for (int j = 1; j < n; ++j) top = scale * z[i * n + j] > top ? scale * z[i * n + j] : top;
      for (int j = 0; j < n; ++j) a[i * n + j] = scale * z[i * n + j] - top;
    }
    if constexpr (sizeof(A) == 4) {
      for (int k = 0; k < m * n; k += kWidth<A>) store(a + k, exp_nonpositive(load<Vec<A>>(a + k)));
    } else {
      for (int k = 0; k < m * n; ++k) a[k] = __builtin_exp(a[k]);
    }
    for (int i = 0; i < m; ++i) {
      A total = 0;
      for (int j = 0; j < n; ++j) total += a[i * n + j];
      const A inverse = 1 / total;
      for (int j = 0; j < n; ++j) a[i * n + j] *= inverse;
    }
  }

  // e_i = s_i - sum_j a_ij t_j, its square into the loss
  void compare(const Group& g, double mu) {
    const int m = g.m, n = g.n;
    for (int i = 0; i < m; ++i) {
      for (int j = 0; j < n; ++j) coef[j * m + i] = -a[i * n + j];
      base_scale[i] = 1;
      A* e = residual + g.student[i] * pitch;
      h[g.student[i]] = e;
      out[i] = reinterpret_cast<char*>(e);
    }
    const Combination<A> difference{m, n, rows_a, base_scale, rows_b, coef, m, out, squares};
    combine<Out::plain>(difference, p.D, prefetch);
    for (int i = 0; i < m; ++i) partial.loss[g.student[i]] += mu * squares[i];
  }

  // e = s/|s| - C/|C|; h_s and h_C are e carried back through the two normalisations:
  // P_x(e) = (e - x^ <x^, e>) / |x|, or e / eps where |x| < eps
  void compare_normalised(const Group& g, double mu) {
    const int m = g.m, n = g.n;
    const double eps = 1e-12;
    for (int i = 0; i < m; ++i) {
      const int student = g.student[i];
      const A* x = rows_a[i];
      A *c = combined + student * pitch, *e = residual + student * pitch, *h_s = student_side + student * pitch;
      A* c_row = a + i * n;
      combine_one(rows_b[0], c_row[0], n - 1, rows_b + 1, c_row + 1, c, nullptr);  // C
      const double length_x = __builtin_sqrt(double(dot(x, x))), length_c = __builtin_sqrt(double(dot(c, c)));
      const A inverse_x = A(1 / (length_x < eps ? eps : length_x));
      const A inverse_c = A(1 / (length_c < eps ? eps : length_c));
      A minus = -inverse_c;
      const A* c_pointer = c;
      double square;
      combine_one(x, inverse_x, 1, &c_pointer, &minus, e, &square);  // e
      partial.loss[student] += mu * square;
      if (!with_gradient()) continue;
      A along_x = length_x < eps ? A(0) : -inverse_x * inverse_x * inverse_x * dot(x, e);
      A along_c = length_c < eps ? A(0) : -inverse_c * inverse_c * inverse_c * dot(c, e);
      combine_one(e, inverse_x, 1, &x, &along_x, h_s, nullptr);
      combine_one(e, inverse_c, 1, &c_pointer, &along_c, e, nullptr);  // h_C, over e column by column
      h[student] = e;
    }
  }

  A dot(const A* x, const A* y) {
    A result;
    dots<A>(1, &x, 1, &y, p.D, &result, 1, idle);
    return result;
  }

  void combine_one(const A* base, A base_scale, int n, const A* const* x, const A* c, A* to, double* square) {
    char* target = reinterpret_cast<char*>(to);
    const Combination<A> one{1, n, &base, &base_scale, x, c, 1, &target, square};
    combine<Out::plain>(one, p.D, idle);
  }

  // dt_j = -2 sum_i w (a_ij h_i + tau c_ij s_i), for teacher layers that the same students attend to
  void teacher_gradients(int64_t position) {
    for (int k = 0; k < p.teacher_group_count; ++k) {
      const Group& g = p.teacher_groups[k];
      const int m = g.m, n = g.n;
      for (int i = 0; i < m; ++i) {
        const int student = g.student[i];
        rows_b[i] = h[student];
        rows_b[m + i] = s[student];
        for (int j = 0; j < n; ++j) {
          const int64_t at = int64_t(student) * p.n + g.teacher[j];
          coef[i * n + j] = -weight[student] * all_a[at];
          coef[(m + i) * n + j] = -weight[student] * all_c[at];
        }
      }
      for (int j = 0; j < n; ++j) {
        const int teacher = g.teacher[j];
        rows_a[j] = rows_b[0];  // the first row is the base of every output, the others are added
        base_scale[j] = coef[j];
        out[j] = gradient_row(p.teacher[teacher], p.teacher_dtype, pooled_teacher_grad + teacher * pitch, position);
      }
      const int count = through_attention() ? 2 * m : m;
      const Combination<A> gradient{n, count - 1, rows_a, base_scale, rows_b + 1, coef + n, n, out, nullptr};
      combine_into<A>(gradient_dtype(p.teacher_dtype), p.stream, gradient, p.D, prefetch);
    }
  }

  // ---- What is left of a row's gradients: zeros, and the pooled row's gradient spread over its tokens --

  void complete(int64_t r, int64_t position) {
    for (int i = 0; i < p.m; ++i)
      complete_layer(p.student[i], p.student_dtype, p.student_active[i], pooled_student_grad + i * pitch, r, position);
    for (int j = 0; j < p.n; ++j)
      complete_layer(p.teacher[j], p.teacher_dtype, p.teacher_active[j], pooled_teacher_grad + j * pitch, r, position);
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
    zero(sequence, keep * bytes);
    if (active) zero(sequence + (keep + 1) * bytes, (p.seq - keep - 1) * bytes);
  }

  void spread(char* sequence, Dtype type, const A* pooled, int64_t position) {
    const int64_t bytes = p.D * dtype_size(type);
    for (int64_t k = 0; k < p.seq; ++k) {
      const double weight_k = row_weight(p, position + k);
      char* row = sequence + k * bytes;
      if (weight_k == 0) {
        zero(row, bytes);
        continue;
      }
      const A share = A(weight_k / mean_total);
      const Combination<A> scaled{1, 0, &pooled, &share, nullptr, nullptr, 1, &row, nullptr};
      combine_into<A>(type, p.stream, scaled, p.D, idle);
    }
  }

  // A row of weight 0: not read, all its gradients 0.
  void skip(int64_t r) {
    for (int i = 0; i < p.m; ++i) skip_layer(p.student[i], p.student_dtype, r);
    for (int j = 0; j < p.n; ++j) skip_layer(p.teacher[j], p.teacher_dtype, r);
    if (p.attention != nullptr)
      for (int i = 0; i < p.m; ++i) zero_attention(i, r);
  }
  void skip_layer(const Layer& layer, Dtype type, int64_t r) {
    const int64_t bytes = p.seq * p.D * dtype_size(type);
    if (layer.grad != nullptr) zero(layer.grad + r * bytes, bytes);
  }
  void zero_attention(int i, int64_t r) {
    zero(static_cast<char*>(p.attention) + (i * p.rows + r) * p.n * sizeof(A), p.n * sizeof(A));
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
void run(const Problem& p, int64_t begin, int64_t end, char* scratch, Partial partial) {
  Arena arena(scratch);
  RowKernel<A>(p, arena, partial).run(begin, end);
}

}  // namespace
}  // namespace alp::ALP_ISA
