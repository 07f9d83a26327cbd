// The loss and its gradients for every dtype, alignment, number of layers, width and option. One block takes
// one row at a time and holds as many of its columns as fit in shared memory, widened to the compute dtype;
// a row that does not fit is read once per pass, after the first from the L2 cache.
#pragma once

#include "rows.cuh"

namespace alp::cuda {

constexpr int kGenericThreads = 256;
constexpr int kTile = 4;  // layers per register tile

ALP_DEVICE float exponential(float x) { return expf(x); }
ALP_DEVICE double exponential(double x) { return exp(x); }
ALP_DEVICE float root(float x) { return sqrtf(x); }
ALP_DEVICE double root(double x) { return sqrt(x); }

template <class A>
ALP_DEVICE A load_element(const char* row, Dtype type, int64_t at) {
  switch (type) {
    case Dtype::f32: return A(reinterpret_cast<const float*>(row)[at]);
    case Dtype::f64: return A(reinterpret_cast<const double*>(row)[at]);
    case Dtype::bf16: return A(bf16_to_float(reinterpret_cast<const uint16_t*>(row)[at]));
    case Dtype::f16: return A(fp16_to_float(reinterpret_cast<const uint16_t*>(row)[at]));
  }
  return A(0);
}
template <class A>
ALP_DEVICE void store_element(char* row, Dtype type, int64_t at, A value) {
  switch (type) {
    case Dtype::f32: reinterpret_cast<float*>(row)[at] = float(value); return;
    case Dtype::f64: reinterpret_cast<double*>(row)[at] = double(value); return;
    case Dtype::bf16: reinterpret_cast<uint16_t*>(row)[at] = float_to_bf16(float(value)); return;
    case Dtype::f16: reinterpret_cast<uint16_t*>(row)[at] = float_to_fp16(float(value)); return;
  }
}
// Four elements from an address that is aligned to them.
ALP_DEVICE void load4(const char* row, Dtype type, int64_t at, float* out) {
  if (type == Dtype::f32) {
    const float4 v = *reinterpret_cast<const float4*>(row + 4 * at);
    out[0] = v.x, out[1] = v.y, out[2] = v.z, out[3] = v.w;
    return;
  }
  const uint2 v = *reinterpret_cast<const uint2*>(row + 2 * at);
  const uint16_t bits[4] = {uint16_t(v.x), uint16_t(v.x >> 16), uint16_t(v.y), uint16_t(v.y >> 16)};
#pragma unroll
  for (int k = 0; k < 4; ++k) out[k] = type == Dtype::bf16 ? bf16_to_float(bits[k]) : fp16_to_float(bits[k]);
}
ALP_DEVICE void store4(char* row, Dtype type, int64_t at, const float (&in)[4]) {
  if (type == Dtype::f32)
    *reinterpret_cast<float4*>(row + 4 * at) = {in[0], in[1], in[2], in[3]};
  else if (type == Dtype::bf16)
    *reinterpret_cast<uint2*>(row + 2 * at) = {pack<true>(in[0], in[1]), pack<true>(in[2], in[3])};
  else
    *reinterpret_cast<uint2*>(row + 2 * at) = {pack<false>(in[0], in[1]), pack<false>(in[2], in[3])};
}

// What shared memory holds, or the block's part of the scratch memory for the arrays of m·n that it does not.
template <class A>
struct Arrays {
  A *s, *t, *h;  // (ms, pitch), (ns, pitch), (ms, pitch) columns of the row: s_i, t_j, and e_i or h_C
  A *z, *a, *c;  // (ns, ms) ⟨s_i, t_j⟩, a_ij, and p_ij, then c_ij = a_ij (p_ij − Σ_j a_ij p_ij)
  A* weight;     // (ms) 2w
  A *inverse_s, *inverse_c, *along_s, *along_c;  // (ms) of normalize
  A* sums;                                       // (2, warps, ms) partial sums of a pass
  double* totals;                                // (2ms + 1) of the block
  double* d_scale;                               // (ms) of this row
  double* shared;                                // (2 warps) for sums over the block
  Constants* constants;

  // Counts the bytes where base is null. columns is a multiple of 4.
  __host__ __device__ static int64_t lay_out(Arrays* at, char* base, char* scratch, int ms, int ns, int columns) {
    int64_t used = 0, scratch_used = 0;
    auto take = [&](auto*& pointer, int64_t count) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(base + used);
      used += (count * int64_t(sizeof *pointer) + 15) / 16 * 16;
    };
    auto take_large = [&](A*& pointer, int64_t count) {
      if (scratch == nullptr) return take(pointer, count);
      pointer = reinterpret_cast<A*>(scratch + scratch_used);
      scratch_used += count * int64_t(sizeof(A));
    };
    constexpr int warps = kGenericThreads / kWarpSize;
    const int64_t pitch = columns + 4, mn = int64_t(ms) * ns;  // rows at one bank would wait for each other
    take(at->totals, row_sums(ms));
    take(at->d_scale, ms);
    take(at->shared, 2 * warps);
    take(at->constants, 1);
    take(at->s, ms * pitch);
    take(at->t, ns * pitch);
    take(at->h, ms * pitch);
    take(at->weight, ms);
    take(at->inverse_s, ms);
    take(at->inverse_c, ms);
    take(at->along_s, ms);
    take(at->along_c, ms);
    take(at->sums, 2 * warps * ms);
    take_large(at->z, mn);
    take_large(at->a, mn);
    take_large(at->c, mn);
    return used;
  }
};

// The passes over the columns that give one or two sums per student layer.
enum class Pass { lengths, directions, residuals, gradients };

template <class A, class P>
struct GenericKernel {
  const P& p;
  const Constants& constants;
  Arrays<A> at;
  Row row;
  int64_t r;
  int loaded = -1;  // chunk of columns in shared memory
  const int thread = thread_index(), warp = thread / kWarpSize, lane = thread % kWarpSize;
  static constexpr int warps = kGenericThreads / kWarpSize;
  const int pitch, chunks;
  const bool with_gradient, through_attention;

  __device__ GenericKernel(const P& p, const Constants& c, const Arrays<A>& at)
      : p(p),
        constants(c),
        at(at),
        pitch(p.columns + 4),
        chunks(p.parts),
        with_gradient(p.student_grad || p.teacher_grad || p.scale_grad),
        through_attention(with_gradient && !p.detach && (c.scale != 0 || p.scale_grad)) {}

  __device__ void run() {
    for (int k = thread; k < p.ms * p.ns; k += kGenericThreads)
      at.a[k] = A(-1), at.c[k] = A(0);  // outside the layer map
    for (int k = thread; k < row_sums(p.ms); k += kGenericThreads) at.totals[k] = 0;
    for (r = block_index(); r < p.weights.rows; r += grid_size()) {
      sync_block();
      row = find_row(p.weights, r);
      if (row.mu == 0)
        skip();
      else
        take_row();
    }
    sync_block();
    // Sums of layers without a slot are 0 and stay unwritten.
    double* partial = p.partials + int64_t(block_index()) * (2 * p.m + 1);
    for (int i = thread; i < p.m; i += kGenericThreads) {
      partial[i] = i < p.ms ? at.totals[i] : 0;
      partial[p.m + i] = i < p.ms ? at.totals[p.ms + i] : 0;
    }
    if (thread == 0) partial[2 * p.m] = at.totals[2 * p.ms];
  }

  __device__ void take_row() {
    for (int i = thread; i < p.ms; i += kGenericThreads) {
      at.weight[i] = A(constants.unit * p.omega[i] * row.mu);
      at.d_scale[i] = 0;
    }
    loaded = -1;
    if (any_scores()) {
      for (int chunk = 0; chunk < chunks; ++chunk) {
        load(chunk);
        for (int g = 0; g < p.group_count; ++g)
          if (has_scores(p.groups[g])) products(p.groups[g], at.s, at.z, chunk == 0);
      }
    }
    sync_block();
    attend();
    sync_block();
    if (p.normalize) {
      pass<Pass::lengths>();
      for (int i = thread; i < p.ms; i += kGenericThreads) {
        at.inverse_s[i] = inverse_length(i, 0);
        at.inverse_c[i] = inverse_length(i, 1);
      }
      sync_block();
      pass<Pass::directions>();
      for (int i = thread; i < p.ms; i += kGenericThreads) {
        at.along_s[i] = direction(at.inverse_s[i], pass_sum(i, 0));
        at.along_c[i] = direction(at.inverse_c[i], pass_sum(i, 1));
      }
      sync_block();
    }
    pass<Pass::residuals>();
    for (int i = thread; i < p.ms; i += kGenericThreads) at.totals[i] += row.mu * double(pass_sum(i, 0));
    if (through_attention) differentiate_softmax();
    sync_block();
    if (p.student_grad || p.teacher_grad) pass<Pass::gradients>();
    complete();
    if (thread == 0)
      for (int i = 0; i < p.ms; ++i) at.totals[2 * p.ms] += at.d_scale[i];
  }

  __device__ static constexpr double eps() { return 1e-12; }
  __device__ A inverse_length(int i, int which) {
    const A length = root(pass_sum(i, which));
    return A(1) / (length < A(eps()) ? A(eps()) : length);
  }
  // The factor of x in P_x(e) = e / |x| + factor x
  __device__ static A direction(A inverse, A product) {
    return inverse >= A(1 / eps()) ? A(0) : -inverse * inverse * inverse * product;
  }

  // Whether the attention of a group depends on the scores at all.
  __device__ bool has_scores(const Group& g) const { return g.n > 1 && (constants.scale != 0 || p.scale_grad); }
  __device__ bool any_scores() const {
    for (int g = 0; g < p.group_count; ++g)
      if (has_scores(p.groups[g])) return true;
    return false;
  }

  // ---- Columns into shared memory --------------------------------------------------------------------

  __device__ int columns_of(int chunk) const {
    const int64_t left = p.weights.D - int64_t(chunk) * p.columns;
    return left < p.columns ? int(left) : p.columns;
  }

  __device__ void load(int chunk) {
    if (chunk == loaded) return;
    sync_block();  // the columns before may still be read
    for (int k = warp; k < p.ms + p.ns; k += warps) {
      const bool student = k < p.ms;
      const Layer& layer = student ? p.layers[k] : p.layers[p.m + k - p.ms];
      load_layer(layer, student ? p.student_dtype : p.teacher_dtype, chunk,
                 student ? at.s + k * pitch : at.t + (k - p.ms) * pitch);
    }
    loaded = chunk;
    sync_block();
  }

  __device__ void load_layer(const Layer& layer, Dtype type, int chunk, A* out) {
    const int64_t first = int64_t(chunk) * p.columns;
    const int count = columns_of(chunk), padded = (count + 3) / 4 * 4;
    if (p.weights.pooling != Pooling::mean) {
      const char* from = row_of(layer, row.position);
      if constexpr (sizeof(A) == 4) {
        if (count % 4 == 0 &&
            (reinterpret_cast<uintptr_t>(from) + first * dtype_size(type)) % (4 * dtype_size(type)) == 0) {
#pragma unroll 4
          for (int d = 4 * lane; d < count; d += 4 * kWarpSize) load4(from, type, first + d, out + d);
          return;
        }
      }
      for (int d = lane; d < padded; d += kWarpSize) out[d] = d < count ? load_element<A>(from, type, first + d) : A(0);
      return;
    }
    for (int d = lane; d < padded; d += kWarpSize) out[d] = A(0);
    for (int64_t k = 0; k < p.weights.seq; ++k) {
      const double weight = position_weight(p.weights, row.position + k);
      if (weight == 0) continue;
      const A share = A(weight / row.mean_total);
      const char* from = row_of(layer, row.position + k);
      for (int d = lane; d < count; d += kWarpSize) out[d] += share * load_element<A>(from, type, first + d);
    }
  }

  // ---- Products over the columns ---------------------------------------------------------------------

  // out_ij (+)= ⟨x_i, t_j⟩ over the loaded columns; a warp takes tiles of 4 by 4 layers
  __device__ void products(const Group& g, const A* x, A* out, bool first) {
    const int tiles_i = (g.m + kTile - 1) / kTile, tiles_j = (g.n + kTile - 1) / kTile;
    const int count = columns_of(loaded);
    for (int tile = warp; tile < tiles_i * tiles_j; tile += warps) {
      const int i0 = tile % tiles_i * kTile, j0 = tile / tiles_i * kTile;
      const A *rows[kTile], *teachers[kTile];
#pragma unroll
      for (int k = 0; k < kTile; ++k) {  // layers behind the last one repeat it and are not stored
        rows[k] = x + (g.first + min(i0 + k, g.m - 1)) * pitch;
        teachers[k] = at.t + p.index[g.teachers + min(j0 + k, g.n - 1)] * pitch;
      }
      A sum[kTile][kTile] = {};
      for (int d = lane; d < count; d += kWarpSize) {
        A b_t[kTile];
#pragma unroll
        for (int k = 0; k < kTile; ++k) b_t[k] = teachers[k][d];
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
          const A b_x = rows[i][d];
#pragma unroll
          for (int k = 0; k < kTile; ++k) sum[i][k] += b_x * b_t[k];
        }
      }
#pragma unroll
      for (int i = 0; i < kTile; ++i)
#pragma unroll
        for (int k = 0; k < kTile; ++k) {
          const A total = warp_sum(sum[i][k]);
          if (lane != 0 || i0 + i >= g.m || j0 + k >= g.n) continue;
          A& target = out[p.index[g.teachers + j0 + k] * p.ms + g.first + i0 + i];
          target = first ? total : target + total;
        }
    }
  }

  // a_ij = softmax_j(τ z_ij), and what return_details shows of it; a warp takes a student layer
  __device__ void attend() {
    for (int g = 0; g < p.group_count; ++g) {
      const Group& group = p.groups[g];
      for (int i = group.first + warp; i < group.first + group.m; i += warps) {
        const uint16_t* teachers = p.index + group.teachers;
        if (!has_scores(group)) {
          for (int k = lane; k < group.n; k += kWarpSize) at.a[teachers[k] * p.ms + i] = A(1) / A(group.n);
        } else {
          const A scale = A(constants.scale);
          A top = scale * at.z[teachers[0] * p.ms + i], total = A(0);
          for (int k = lane; k < group.n; k += kWarpSize) {
            const A score = scale * at.z[teachers[k] * p.ms + i];
            top = score > top ? score : top;
          }
          top = warp_max(top);
          for (int k = lane; k < group.n; k += kWarpSize) {
            const A e = exponential(scale * at.z[teachers[k] * p.ms + i] - top);
            at.a[teachers[k] * p.ms + i] = e;
            total += e;
          }
          const A inverse = A(1) / warp_sum(total);
          for (int k = lane; k < group.n; k += kWarpSize) at.a[teachers[k] * p.ms + i] *= inverse;
        }
        if (p.attention != nullptr) show_attention(group, i);
      }
    }
    if (p.attention == nullptr) return;
    for (int i = p.ms + warp; i < p.m; i += warps) zero_attention(i);
  }

  __device__ void zero_attention(int i) {
    for (int k = lane; k < p.n; k += kWarpSize) attention_row<A>(p, i, r)[k] = A(0);
  }
  __device__ void show_attention(const Group& group, int i) {
    zero_attention(i);
    sync_warp();
    double entropy = 0;
    for (int k = lane; k < group.n; k += kWarpSize) {
      const int j = p.index[group.teachers + k];
      const A a = at.a[j * p.ms + i];
      attention_row<A>(p, i, r)[p.original[p.m + j]] = a;
      if (!(a <= A(0))) entropy -= double(a) * double(log(a));
    }
    entropy = warp_sum(entropy);
    if (lane == 0) at.totals[p.ms + i] += row.mu * entropy;
  }

  // c holds p_ij and becomes c_ij = a_ij (p_ij − Σ_j a_ij p_ij); the scale's gradient
  __device__ void differentiate_softmax() {
    sync_block();
    for (int g = 0; g < p.group_count; ++g) {
      const Group& group = p.groups[g];
      if (group.n == 1) continue;  // c stays 0
      const uint16_t* teachers = p.index + group.teachers;
      for (int i = group.first + warp; i < group.first + group.m; i += warps) {
        A mean = A(0);
        for (int k = lane; k < group.n; k += kWarpSize) {
          const int ij = teachers[k] * p.ms + i;
          mean += at.a[ij] * at.c[ij];
        }
        mean = warp_sum(mean);
        double d_scale = 0;
        for (int k = lane; k < group.n; k += kWarpSize) {
          const int ij = teachers[k] * p.ms + i;
          at.c[ij] = at.a[ij] * (at.c[ij] - mean);
          if (p.scale_grad) d_scale += double(at.c[ij]) * double(at.z[ij]);
        }
        if (!p.scale_grad) continue;
        d_scale = warp_sum(d_scale);
        if (lane == 0) at.d_scale[i] = -double(at.weight[i]) * d_scale;
      }
    }
  }

  // ---- Column by column ------------------------------------------------------------------------------

  __device__ A pass_sum(int i, int which) const {
    A sum = A(0);
    for (int w = 0; w < warps; ++w) sum += at.sums[(which * warps + w) * p.ms + i];
    return sum;
  }

  template <Pass kPass>
  __device__ void pass() {
    sync_block();
    for (int k = thread; k < 2 * warps * p.ms; k += kGenericThreads) at.sums[k] = A(0);
    sync_block();
    for (int k = 0; k < chunks; ++k) {
      // Backwards, so that the chunk that the pass before left is the first.
      const int chunk = kPass == Pass::directions || kPass == Pass::gradients ? k : chunks - 1 - k;
      load(chunk);
      for (int g = 0; g < p.group_count; ++g)
        for (int i = 0; i < p.groups[g].m; i += kTile) student_columns<kPass>(p.groups[g], i);
      sync_block();
      if (kPass == Pass::residuals && through_attention)
        for (int g = 0; g < p.group_count; ++g)
          if (p.groups[g].n > 1) products(p.groups[g], at.h, at.c, k == 0);
      if (kPass == Pass::gradients && p.teacher_grad) teacher_columns();
      if (kPass == Pass::gradients || kPass == Pass::residuals) sync_block();
    }
  }

  // The columns of up to 4 student layers of a group: C_i = Σ_j a_ij t_j, and what the pass makes of it
  template <Pass kPass>
  __device__ void student_columns(const Group& g, int i0) {
    const int count = columns_of(loaded), first = g.first + i0, tile = min(kTile, g.m - i0);
    const bool varies = kPass == Pass::gradients && through_attention && g.n > 1;
    A sum[2][kTile] = {};
    for (int d = thread; d < count; d += kGenericThreads) {
      A combined[kTile] = {}, y[kTile] = {};  // C_i, Σ_j c_ij t_j
      for (int k = 0; k < g.n; ++k) {
        const int j = p.index[g.teachers + k];
        const A t = at.t[j * pitch + d];
        const int ij = j * p.ms + first;
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
          if (i >= tile) break;
          combined[i] += at.a[ij + i] * t;
          if (varies) y[i] += at.c[ij + i] * t;
        }
      }
#pragma unroll
      for (int q = 0; q < kTile; ++q) {
        if (q >= tile) break;
        const int i = first + q;
        const A s = at.s[i * pitch + d], C = combined[q];
        if constexpr (kPass == Pass::lengths) {
          sum[0][q] += s * s;
          sum[1][q] += C * C;
          continue;
        }
        const A e = p.normalize ? s * at.inverse_s[i] - C * at.inverse_c[i] : s - C;
        if (kPass == Pass::directions) {
          sum[0][q] += s * e;
          sum[1][q] += C * e;
          continue;
        }
        if (kPass == Pass::residuals) sum[0][q] += e * e;
        at.h[i * pitch + d] = p.normalize ? e * at.inverse_c[i] + C * at.along_c[i] : e;
        if (kPass == Pass::gradients && p.layers[i].grad != nullptr) {
          const A h = p.normalize ? e * at.inverse_s[i] + s * at.along_s[i] : e;
          const A gradient = at.weight[i] * (h - A(constants.scale) * y[q]);
          store_gradient(p.layers[i], p.student_dtype, int64_t(loaded) * p.columns + d, gradient);
        }
      }
    }
    if constexpr (kPass != Pass::gradients) {
#pragma unroll
      for (int q = 0; q < kTile; ++q) {
        const A total0 = warp_sum(sum[0][q]), total1 = kPass == Pass::residuals ? A(0) : warp_sum(sum[1][q]);
        if (lane != 0 || q >= tile) continue;
        at.sums[warp * p.ms + first + q] += total0;
        at.sums[(warps + warp) * p.ms + first + q] += total1;
      }
    }
  }

  // ∂t_j = −2 Σ_i w (a_ij h_i + τ c_ij s_i)
  __device__ void teacher_columns() {
    const int count = columns_of(loaded);
    for (int j = 0; j < p.ns; ++j) {
      const Layer& layer = p.layers[p.m + j];
      if (layer.grad == nullptr) continue;
      for (int d = thread; d < count; d += kGenericThreads) {
        A gradient = A(0);
        for (int i = 0; i < p.ms; ++i) {
          const A a = at.a[j * p.ms + i];
          if (a < A(0)) continue;  // outside the layer map: whatever layer i holds
          const A c = through_attention ? A(constants.scale) * at.c[j * p.ms + i] : A(0);
          gradient -= at.weight[i] * (a * at.h[i * pitch + d] + c * at.s[i * pitch + d]);
        }
        store_gradient(layer, p.teacher_dtype, int64_t(loaded) * p.columns + d, gradient);
      }
    }
  }

  // ---- Gradients into memory -------------------------------------------------------------------------

  __device__ void store_gradient(const Layer& layer, Dtype type, int64_t d, A value) {
    const int64_t bytes = p.weights.D * dtype_size(type);
    char* to = layer.grad + row.position * bytes;
    if (p.weights.pooling != Pooling::mean) return store_element(to, type, d, value);
    for (int64_t k = 0; k < p.weights.seq; ++k, to += bytes) {
      const double weight = position_weight(p.weights, row.position + k);
      store_element(to, type, d, weight == 0 ? A(0) : A(weight / row.mean_total) * value);
    }
  }

  // Zeros: inactive layers, and the positions of a sequence that its pooled row does not come from.
  __device__ void complete() {
    for (int k = 0; k < p.m + p.n; ++k) {
      const Layer& layer = p.layers[k];
      if (layer.grad == nullptr) continue;
      const bool active = k < p.m ? k < p.ms : k - p.m < p.ns;
      if (active && (p.weights.pooling == Pooling::token || p.weights.pooling == Pooling::mean)) continue;
      const int64_t seq = p.weights.seq, bytes = p.weights.D * dtype_size(k < p.m ? p.student_dtype : p.teacher_dtype);
      zero_all_but(layer.grad + r * seq * bytes, seq, active ? row.position - r * seq : seq, bytes, thread,
                   kGenericThreads);
    }
  }

  // A row of weight 0: not read, all its gradients 0.
  __device__ void skip() {
    for (int k = 0; k < p.m + p.n; ++k) {
      const int64_t bytes = p.weights.seq * p.weights.D * dtype_size(k < p.m ? p.student_dtype : p.teacher_dtype);
      if (p.layers[k].grad != nullptr) zero_bytes(p.layers[k].grad + r * bytes, bytes, thread, kGenericThreads);
    }
    if (p.attention == nullptr) return;
    for (int i = warp; i < p.m; i += warps) zero_attention(i);
  }
};

template <class A, class P>
__global__ void __launch_bounds__(kGenericThreads, 2) alp_generic(const __grid_constant__ P p) {
  ALP_DYNAMIC_SHARED(shared);
  Arrays<A> at;
  char* scratch = p.scratch == nullptr ? nullptr : p.scratch + block_index() * p.scratch_bytes;
  Arrays<A>::lay_out(&at, shared, scratch, p.ms, p.ns, p.columns);
  const Constants constants = find_constants(p, at.shared);
  if (thread_index() == 0) *at.constants = constants;  // registers are few
  sync_block();
  GenericKernel<A, P>(p, *at.constants, at).run();
  sync_block();
  finish<A, 4>(p, *at.constants, at.totals, thread_index() == 0 && takes_last_ticket(p));
}

}  // namespace alp::cuda
