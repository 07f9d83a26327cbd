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

template <class T>
bool stored_as(Dtype type);
template <>
bool stored_as<float>(Dtype type) {
  return type == Dtype::f32;
}
template <>
bool stored_as<double>(Dtype type) {
  return type == Dtype::f64;
}
template <>
bool stored_as<Bf16>(Dtype type) {
  return type == Dtype::bf16;
}
template <>
bool stored_as<Fp16>(Dtype type) {
  return type == Dtype::f16;
}

// A is the compute dtype. T is the dtype of the rows that the products read: the hidden states' own where
// both sides share it, else A, and the rows are widened into scratch first.
template <class A, class T>
class RowKernel {
 public:
  RowKernel(const Problem& p, Arena& arena, Partial partial) : p(p), partial(partial) {
    const int64_t m = p.m, n = p.n, mn = m * n;
    const bool mean = p.pooling == Pooling::mean;
    s = arena.take<const T*>(m);
    t = arena.take<const T*>(n);
    h = arena.take<const A*>(m);
    group_s = arena.take<const T*>(m);
    group_t = arena.take<const T*>(n);
    bases = arena.take<const A*>(m > n ? m : n);
    rows = arena.take<const A*>(2 * m);
    next_s = arena.take<const char*>(m);
    next_t = arena.take<const char*>(n);
    group_next_s = arena.take<const char*>(m);
    group_next_t = arena.take<const char*>(n);
    out = arena.take<char*>(m > n ? m : n);
    squares = arena.take<double>(m);
    // Student layers lie side by side, in full vectors: (n, ld) and (ld) arrays. The lanes behind the last
    // student layer are computed like the others and never read.
    const int64_t ld = lanes(p.m), lanes_n = n * ld;
    weight = arena.take<A>(m);
    base_scale = arena.take<A>(m > n ? m : n);
    z = arena.zeros<A>(lanes_n);
    a = arena.zeros<A>(lanes_n);
    products = arena.zeros<A>(lanes_n);
    coef = arena.zeros<A>(p.teacher_grad && 2 * m * n > lanes_n ? 2 * m * n : lanes_n);
    group_weight = arena.zeros<A>(ld);
    all_a = arena.take<A>(p.teacher_grad ? mn : 0);
    all_c = arena.take<A>(p.teacher_grad ? mn : 0);

    // One line more than D: rows at a multiple of 4 KiB would share one cache set.
    pitch = (p.D + 15) / 16 * 16 + 16;
    residual = arena.take<A>(m * pitch);
    spare = arena.take<A>(pitch);
    own_s = arena.take<A>(direct() ? 0 : m * pitch);
    own_t = arena.take<A>(direct() ? 0 : n * pitch);
    wide_s = arena.take<A>(p.teacher_grad && direct() && sizeof(T) != sizeof(A) ? m * pitch : 0);
    combined = arena.take<A>(p.normalize ? m * pitch : 0);
    student_side = arena.take<A>(p.normalize ? m * pitch : 0);
    pooled_student_grad = arena.take<A>(mean && p.student_grad ? m * pitch : 0);
    pooled_teacher_grad = arena.take<A>(mean && p.teacher_grad ? n * pitch : 0);
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
      look_ahead(r + 1, end);
      for (int g = 0; g < p.group_count; ++g) group(p.groups[g], r, position, mu);
      if (p.teacher_grad) teacher_gradients(position);
      complete(r, position);
    }
    fence();
  }

 private:
  const Problem& p;
  Partial partial;
  const T **s, **t;                                               // [m], [n] this row of each layer
  const A** h;                                                    // [m] what stands for e_i in p_ij and dt_j
  const T **group_s, **group_t;                                   // those of a group
  const A **bases, **rows;                                        // rows of a product
  const char **next_s, **next_t, **group_next_s, **group_next_t;  // where the next rows start
  bool ahead = false;                                             // whether they are known
  char** out;
  double* squares;
  A *weight, *base_scale;      // [m] 2w, and the factors of a combination's bases
  A *z, *a, *products, *coef;  // (n, ld) <s_i, t_j>, a_ij, p_ij then c_ij, coefficients of a combination
  A* group_weight;             // [ld] 2w of a group's student layers
  A *all_a, *all_c;            // (m, n) a_ij and tau c_ij of all groups, for the teacher's gradient
  int64_t pitch;               // from one scratch row to the next
  A *residual, *spare, *own_s, *own_t, *wide_s, *combined, *student_side, *pooled_student_grad, *pooled_teacher_grad;
  double mean_total = 0;  // sum of the weights of a "mean" row

  static constexpr Dtype kCompute = sizeof(A) == 4 ? Dtype::f32 : Dtype::f64;
  static int64_t lanes(int m) { return (m + 15) / 16 * 16; }
  bool direct() const {
    return stored_as<T>(p.student_dtype) && stored_as<T>(p.teacher_dtype) && p.pooling != Pooling::mean;
  }
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

  const T* fetch(const Layer& layer, Dtype type, A* own, int64_t position) {
    if (direct()) return reinterpret_cast<const T*>(row_of(layer, position));
    if (p.pooling != Pooling::mean) {
      unpack<A>(row_of(layer, position), type, own, p.D);
      return reinterpret_cast<const T*>(own);  // T is A here
    }
    for (int64_t d = 0; d < p.D; ++d) own[d] = 0;
    for (int64_t k = 0; k < p.seq; ++k) {
      const double weight_k = row_weight(p, position + k);
      if (weight_k == 0) continue;
      const A share = A(weight_k / mean_total);
      unpack<A>(row_of(layer, position + k), type, spare, p.D);
      for (int64_t d = 0; d < p.D; ++d) own[d] += share * spare[d];
    }
    return reinterpret_cast<const T*>(own);
  }

  // Where the next row lies, for the products to prefetch.
  void look_ahead(int64_t r, int64_t end) {
    const int64_t position = r * p.seq;
    const bool known = p.pooling == Pooling::token || p.pooling == Pooling::cls;
    ahead = direct() && known && r < end && row_weight(p, position) != 0;
    if (!ahead) return;
    for (int i = 0; i < p.m; ++i) next_s[i] = row_of(p.student[i], position);
    for (int j = 0; j < p.n; ++j) next_t[j] = row_of(p.teacher[j], position);
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
    for (int i = 0; i < m; ++i) {
      group_s[i] = s[g.student[i]];
      group_next_s[i] = next_s[g.student[i]];
    }
    for (int j = 0; j < n; ++j) {
      group_t[j] = t[g.teacher[j]];
      group_next_t[j] = next_t[g.teacher[j]];
    }
    attend(g, r, mu);
    if (p.normalize)
      compare_normalised(g, mu);
    else
      compare(g, mu);
    if (!with_gradient()) return;
    const int64_t ld = lanes(m);
    const bool varies = n > 1 && through_attention();
    if (varies) {
      for (int i = 0; i < m; ++i) {
        rows[i] = h[g.student[i]];
        group_weight[i] = weight[g.student[i]];
      }
      dots<A>(m, rows, n, group_t, p.D, products, ld);  // p_ij = <e_i, t_j>
      differentiate_softmax(m, n);
    }
    if (p.teacher_grad)
      for (int i = 0; i < m; ++i)
        for (int j = 0; j < n; ++j) {
          const int64_t at = int64_t(g.student[i]) * p.n + g.teacher[j];
          all_a[at] = a[j * ld + i];
          all_c[at] = varies ? A(p.scale) * products[j * ld + i] : A(0);
        }
    if (!p.student_grad) return;
    // ds_i = 2w (h_i - tau sum_j c_ij t_j)
    for (int i = 0; i < m; ++i) {
      const int student = g.student[i];
      bases[i] = p.normalize ? student_side + student * pitch : h[student];
      base_scale[i] = weight[student];
      out[i] = gradient_row(p.student[student], p.student_dtype, pooled_student_grad + student * pitch, position);
    }
    Combination<A, A, T> gradient{m, varies ? n : 0, bases, base_scale, group_t, coef, ld, out, nullptr};
    prefetch_half_of_next_row(gradient, 1);
    combine_into(gradient_dtype(p.student_dtype), p.stream, gradient, p.D);
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
  void attend(const Group& g, int64_t r, double mu) {
    const int m = g.m, n = g.n;
    const int64_t ld = lanes(m);
    if (n == 1 || (p.scale == 0 && !p.scale_grad)) {  // constant, whatever the scores
      for (int64_t k = 0; k < n * ld; ++k) a[k] = A(1) / A(n);
    } else {
      dots<A>(m, group_s, n, group_t, p.D, z, ld);
      softmax(m, n);
    }
    if (p.attention == nullptr) return;
    for (int i = 0; i < m; ++i) {
      double entropy = 0;
      A* attention = static_cast<A*>(p.attention) + (int64_t(g.student[i]) * p.rows + r) * p.n;
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

  // e_i = s_i - sum_j a_ij t_j, its square into the loss
  void compare(const Group& g, double mu) {
    const int m = g.m, n = g.n;
    const int64_t ld = lanes(m);
    for (int64_t k = 0; k < n * ld; ++k) coef[k] = -a[k];
    for (int i = 0; i < m; ++i) {
      A* e = residual + g.student[i] * pitch;
      h[g.student[i]] = e;
      out[i] = reinterpret_cast<char*>(e);
    }
    Combination<A, T, T> difference{m, n, group_s, nullptr, group_t, coef, ld, out, squares};
    prefetch_half_of_next_row(difference, 0);
    combine<Out::plain, true>(difference, p.D);
    for (int i = 0; i < m; ++i) partial.loss[g.student[i]] += mu * squares[i];
  }

  // e = s/|s| - C/|C|; h_s and h_C are e carried back through the two normalisations:
  // P_x(e) = (e - x^ <x^, e>) / |x|, or e / eps where |x| < eps
  void compare_normalised(const Group& g, double mu) {
    const int m = g.m, n = g.n;
    const double eps = 1e-12;
    for (int i = 0; i < m; ++i) {
      const int student = g.student[i];
      const T* x = group_s[i];
      A *c = combined + student * pitch, *e = residual + student * pitch, *h_s = student_side + student * pitch;
      const int64_t ld = lanes(m);
      for (int j = 0; j < n; ++j) coef[j] = a[j * ld + i];
      combine_one(group_t[0], coef[0], n - 1, group_t + 1, coef + 1, c);  // C
      const double length_x = __builtin_sqrt(double(dot(x, x))), length_c = __builtin_sqrt(double(dot(c, c)));
      const A inverse_x = A(1 / (length_x < eps ? eps : length_x));
      const A inverse_c = A(1 / (length_c < eps ? eps : length_c));
      A minus = -inverse_c;
      const A* c_pointer = c;
      combine_one(x, inverse_x, 1, &c_pointer, &minus, e);  // e
      partial.loss[student] += mu * double(dot(e, e));
      if (!with_gradient()) continue;
      A along_x = length_x < eps ? A(0) : -inverse_x * inverse_x * inverse_x * dot(x, e);
      A along_c = length_c < eps ? A(0) : -inverse_c * inverse_c * inverse_c * dot(c, e);
      combine_one(e, inverse_x, 1, &x, &along_x, h_s);
      combine_one(e, inverse_c, 1, &c_pointer, &along_c, e);  // h_C, over e column by column
      h[student] = e;
    }
  }

  template <class X, class Y>
  A dot(const X* x, const Y* y) {
    A result;
    dots<A>(1, &x, 1, &y, p.D, &result, 1);
    return result;
  }

  template <class B, class X>
  void combine_one(const B* base, A base_factor, int n, const X* const* x, const A* c, A* to) {
    char* target = reinterpret_cast<char*>(to);
    const Combination<A, B, X> one{1, n, &base, &base_factor, x, c, 1, &target, nullptr};
    combine<Out::plain>(one, p.D);
  }

  template <class B>
  void prefetch_half_of_next_row(Combination<A, B, T>& c, int half) {
    if (!ahead) return;
    c.next_base = group_next_s;
    c.next_x = group_next_t;
    c.half = half;
  }

  // dt_j = -2 sum_i w (a_ij h_i + tau c_ij s_i), for teacher layers that the same students attend to
  void teacher_gradients(int64_t position) {
    for (int k = 0; k < p.teacher_group_count; ++k) {
      const Group& g = p.teacher_groups[k];
      const int m = g.m, n = g.n;
      for (int i = 0; i < m; ++i) {
        const int student = g.student[i];
        rows[i] = h[student];
        rows[m + i] = wide_student(student);
        for (int j = 0; j < n; ++j) {
          const int64_t at = int64_t(student) * p.n + g.teacher[j];
          coef[i * n + j] = -weight[student] * all_a[at];
          coef[(m + i) * n + j] = -weight[student] * all_c[at];
        }
      }
      for (int j = 0; j < n; ++j) {
        const int teacher = g.teacher[j];
        bases[j] = rows[0];  // the first row is the base of every output, the others are added
        base_scale[j] = coef[j];
        out[j] = gradient_row(p.teacher[teacher], p.teacher_dtype, pooled_teacher_grad + teacher * pitch, position);
      }
      const int count = through_attention() ? 2 * m : m;
      const Combination<A, A, A> gradient{n, count - 1, bases, base_scale, rows + 1, coef + n, n, out, nullptr};
      combine_into(gradient_dtype(p.teacher_dtype), p.stream, gradient, p.D);
    }
  }

  const A* wide_student(int i) {
    if constexpr (sizeof(T) == sizeof(A)) {
      return s[i];
    } else {
      unpack<A>(reinterpret_cast<const char*>(s[i]), p.student_dtype, wide_s + i * pitch, p.D);
      return wide_s + i * pitch;
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
      const Combination<A, A, A> scaled{1, 0, &pooled, &share, nullptr, nullptr, 1, &row, nullptr};
      combine_into(type, p.stream, scaled, p.D);
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

template <class A, class T>
int64_t scratch_bytes(const Problem& p) {
  Arena arena(nullptr);
  RowKernel<A, T>(p, arena, {});
  return arena.used;
}

template <class A, class T>
void run(const Problem& p, int64_t begin, int64_t end, char* scratch, Partial partial) {
  Arena arena(scratch);
  RowKernel<A, T>(p, arena, partial).run(begin, end);
}

template <class A, class T>
constexpr Kernel kernel = {scratch_bytes<A, T>, run<A, T>};

constexpr Kernels kernels = {kernel<float, float>, kernel<double, double>, kernel<float, Bf16>, kernel<float, Fp16>};

}  // namespace
}  // namespace alp::ALP_ISA
