// The fast kernel for fp32 rows: every row is read once, its products run on the fp32 units, exact.
//
// A team of warps takes one row, which lies in shared memory as vectors of 4 columns. The row needs two kinds of pass,
// in tiles of kStudents student layers that stay in registers:
//   products  x_i · t_j                              for z_ij = ⟨s_i, t_j⟩ and for p_ij = ⟨e_i, t_j⟩
//             a warp takes whole tiles with kTeachers teacher layers, so that it sums over its lanes once for each
//   combine   x_i − Σ_j b_ij t_j                     for e_i, in place, with b = a, and for ∂s_i / 2w, with b = τ c
//             a warp takes a share of the columns
// In between, on (m, n) numbers: a_ij = softmax_j(τ z_ij) and c_ij = a_ij (p_ij − Σ_j a_ij p_ij).
//
// On paper, for 12 teacher and 4 student layers of 768 columns on an H100 (3 TB/s, 132 multiprocessors at 1.7 GHz, so
// 13 bytes a cycle each): memory 61 KB, 4 700 cycles; multiply-adds 4 · 12 · 4 · 768 / 128 lanes, 1 150 cycles;
// shared memory 4 passes over 49 KB and more at 128 bytes a cycle, 1 900 cycles.
#pragma once

#include "generic_kernel.cuh"
#include "row_pipeline.cuh"

namespace alp::cuda {

// The sums over the warp of kCount values of every lane: lane k · 32 / kCount gets, with those behind it, sum k.
template <int kCount, int kMask = kWarpSize / 2>
ALP_DEVICE float scattered_sums(const float (&values)[kCount], int lane) {
  if constexpr (kCount == 1) {
    return warp_sum<2 * kMask>(values[0]);
  } else {
    const bool upper = lane & kMask;
    float half[kCount / 2];
#pragma unroll
    for (int k = 0; k < kCount / 2; ++k) {
      const float given = upper ? values[k] : values[k + kCount / 2];
      half[k] = (upper ? values[k + kCount / 2] : values[k]) + shuffle_xor(given, kMask);
    }
    return scattered_sums<kCount / 2, kMask / 2>(half, lane);
  }
}

constexpr int kTeachers = 4;  // to a tile of products, and to a vector of coefficients
constexpr int kVectors = 2;   // that a thread combines at a time

template <int kStudents, class P>
struct VectorKernel : RowPipeline<4, P> {
  using Rows = RowPipeline<4, P>;
  using Rows::lane, Rows::layout, Rows::member, Rows::members, Rows::p, Rows::pitch, Rows::scale, Rows::shared,
      Rows::sync_team, Rows::team, Rows::thread, Rows::through_attention, Rows::totals;
  static constexpr int kLanes = 8;  // that share a student's softmax

  // The team's scratch memory: three matrices [student][teacher] of the largest group, padded to whole tiles
  const int vectors = int(p.weights.D / 4), row_pairs = p.pairs_n, pairs = p.pairs_m * p.pairs_n;
  float* const z = reinterpret_cast<float*>(shared + layout.scratch + team * layout.scratch_bytes);
  float* const residual_products = z + pairs;            // p_ij
  float* const coefficient = residual_products + pairs;  // a_ij, then τ c_ij

  __device__ void run(const Constants& constants) {
    Rows::run(constants, [this](const Queued& row, int load) { take_row(row, load); });
  }

  __device__ void take_row(const Queued& row, int load) {
    Rows::wait_for_load(load);
    char* const tile = Rows::tile_of(load);
    for (int k = 0; k < p.group_count; ++k) {
      const Group g = p.groups[k];
      const bool scores = g.n > 1 && Rows::with_scores, varies = through_attention && g.n > 1;
      if (scores) {
        products(g, tile, z);
        sync_team();
      }
      attend(g, row, scores);
      sync_team();
      combine<true>(g, row, tile, !varies);
      if (varies) {
        sync_team();
        products(g, tile, residual_products);
        sync_team();
        differentiate_softmax(g, row);
        sync_team();
        if (p.student_grad) combine<false>(g, row, tile, true);
      }
      sync_team();  // scratch memory is free again
    }
    Rows::release_load();
  }

  // Layers behind a group's last one repeat it: their results are not used.
  __device__ float* student_row(char* tile, const Group& g, int i) const {
    return reinterpret_cast<float*>(tile + (g.first + min(i, g.m - 1)) * pitch);
  }
  __device__ const float* teacher_row(const char* tile, const Group& g, int j) const {
    return reinterpret_cast<const float*>(tile + (p.ms + p.index[g.teachers + min(j, g.n - 1)]) * pitch);
  }

  // x_i · t_j, by the warps of the team in turns
  __device__ void products(const Group& g, char* tile, float* result) {
    constexpr int kSums = kStudents == 2 ? 8 : 16;
    const int across = (g.n + kTeachers - 1) / kTeachers, tiles = (g.m + kStudents - 1) / kStudents * across;
    for (int k = member; k < tiles; k += p.team) {
      const int i0 = k / across * kStudents, j0 = k % across * kTeachers;
      const float *x[kStudents], *t[kTeachers];
#pragma unroll
      for (int i = 0; i < kStudents; ++i) x[i] = student_row(tile, g, i0 + i);
#pragma unroll
      for (int j = 0; j < kTeachers; ++j) t[j] = teacher_row(tile, g, j0 + j);
      float sums[kSums] = {};
#pragma unroll 2
      for (int v = lane; v < vectors; v += kWarpSize) {
        float4 x_v[kStudents], t_v[kTeachers];
#pragma unroll
        for (int i = 0; i < kStudents; ++i) x_v[i] = load_vector(x[i], v);
#pragma unroll
        for (int j = 0; j < kTeachers; ++j) t_v[j] = load_vector(t[j], v);
#pragma unroll
        for (int i = 0; i < kStudents; ++i)
#pragma unroll
          for (int j = 0; j < kTeachers; ++j) {
            float& sum = sums[i * kTeachers + j];
            sum += x_v[i].x * t_v[j].x;
            sum += x_v[i].y * t_v[j].y;
            sum += x_v[i].z * t_v[j].z;
            sum += x_v[i].w * t_v[j].w;
          }
      }
      const float sum = scattered_sums(sums, lane);
      const int at = lane / (kWarpSize / kSums);
      if (lane % (kWarpSize / kSums) == 0 && at < kStudents * kTeachers)
        result[(i0 + at / kTeachers) * row_pairs + j0 + at % kTeachers] = sum;
    }
  }

  __device__ static float4 load_vector(const float* row, int v) { return reinterpret_cast<const float4*>(row)[v]; }

  // Calls visit(i, n) with a student of the group, one to kLanes lanes, and the number of its teachers. All lanes take
  // part in every call; those without a student of their own get n = 0.
  template <class Visit>
  __device__ void for_each_student(const Group& g, Visit visit) {
    constexpr int kAtATime = kWarpSize / kLanes;
    for (int first = member * kAtATime; first < g.m; first += p.team * kAtATime) {
      const int i = first + lane / kLanes;
      visit(i, i < g.m ? g.n : 0);
    }
  }

  // a_ij, 0 for teachers that are not there
  __device__ void attend(const Group& g, const Queued& row, bool scores) {
    for_each_student(g, [&](int i, int n) {
      float* const a = coefficient + i * row_pairs;
      const float* const z_i = z + i * row_pairs;
      float top = -INFINITY, total = 0;
      if (scores) {
        for (int j = lane % kLanes; j < n; j += kLanes) top = scale * z_i[j] > top ? scale * z_i[j] : top;
        top = warp_max<kLanes>(top);
        for (int j = lane % kLanes; j < n; j += kLanes) {
          a[j] = exponential(scale * z_i[j] - top);
          total += a[j];
        }
      }
      const float inverse = 1.f / warp_sum<kLanes>(total);
      double entropy = 0;
      for (int j = lane % kLanes; j < (n + kTeachers - 1) / kTeachers * kTeachers; j += kLanes) {
        a[j] = j >= n ? 0.f : scores ? a[j] * inverse : 1.f / float(n);
        if (p.attention != nullptr && !(a[j] <= 0)) entropy -= double(a[j]) * double(logf(a[j]));
      }
      if (p.attention != nullptr) show_attention(g, row, i, n, warp_sum<kLanes>(entropy));
    });
  }

  // What return_details shows of a student.
  __device__ void show_attention(const Group& g, const Queued& row, int i, int n, double entropy) {
    float* const shown = attention_row<float>(p, g.first + min(i, g.m - 1), row.r);
    for (int j = lane % kLanes; n > 0 && j < p.n; j += kLanes) shown[j] = 0;
    sync_warp();
    for (int j = lane % kLanes; j < n; j += kLanes)
      shown[p.original[p.m + p.index[g.teachers + j]]] = coefficient[i * row_pairs + j];
    if (n > 0 && lane % kLanes == 0) totals[p.ms + g.first + i] += row.mu * entropy;
  }

  // τ c_ij over a_ij
  __device__ void differentiate_softmax(const Group& g, const Queued& row) {
    double scale_gradient = 0;
    for_each_student(g, [&](int i, int n) {
      float* const a = coefficient + i * row_pairs;
      const float* const p_i = residual_products + i * row_pairs;
      float mean = 0, along = 0;
      for (int j = lane % kLanes; j < n; j += kLanes) mean += a[j] * p_i[j];
      mean = warp_sum<kLanes>(mean);
      for (int j = lane % kLanes; j < n; j += kLanes) {
        const float c = a[j] * (p_i[j] - mean);
        along += c * z[i * row_pairs + j];
        a[j] = scale * c;
      }
      if (!p.scale_grad) return;
      along = warp_sum<kLanes>(along);
      if (n > 0 && lane % kLanes == 0) scale_gradient -= double(Rows::weight_of(g, i, row)) * double(along);
    });
    if (!p.scale_grad) return;
    scale_gradient = warp_sum(scale_gradient);
    if (lane == 0) totals[2 * p.ms] += scale_gradient;
  }

  // x_i − Σ_j b_ij t_j: over x_i, or times 2w to memory where this is the gradient; with kLoss, its square into the
  // loss
  template <bool kLoss>
  __device__ void combine(const Group& g, const Queued& row, char* tile, bool gradient) {
    for (int i0 = 0; i0 < g.m; i0 += kStudents) {
      float* x[kStudents];
      float squares[4] = {};
#pragma unroll
      for (int i = 0; i < kStudents; ++i) x[i] = student_row(tile, g, i0 + i);
      for (int v = thread; v < vectors; v += kVectors * members) {
        float4 sum[kStudents][kVectors];
        int at[kVectors];  // a vector behind the last one repeats it
#pragma unroll
        for (int q = 0; q < kVectors; ++q) {
          at[q] = v + q * members < vectors ? v + q * members : v;
#pragma unroll
          for (int i = 0; i < kStudents; ++i) sum[i][q] = load_vector(x[i], at[q]);
        }
        for (int j0 = 0; j0 < g.n; j0 += kTeachers) {
          float4 b[kStudents];
#pragma unroll
          for (int i = 0; i < kStudents; ++i) b[i] = load_vector(coefficient + (i0 + i) * row_pairs + j0, 0);
#pragma unroll
          for (int j = 0; j < kTeachers; ++j) {
            const float* const t = teacher_row(tile, g, j0 + j);
#pragma unroll
            for (int q = 0; q < kVectors; ++q) {
              const float4 t_v = load_vector(t, at[q]);
#pragma unroll
              for (int i = 0; i < kStudents; ++i)
                subtract(sum[i][q], j == 0 ? b[i].x : j == 1 ? b[i].y : j == 2 ? b[i].z : b[i].w, t_v);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kStudents; ++i) {
          const int slot = g.first + min(i0 + i, g.m - 1);
          char* const to = Rows::gradient_of(slot, row, 0);
          const bool wanted = gradient && Rows::layers[slot].grad != nullptr;
          const float weight = Rows::weight_of(g, i0 + i, row);
#pragma unroll
          for (int q = 0; q < kVectors; ++q) {
            if (q > 0 && v + q * members >= vectors) continue;
            const float4 e = sum[i][q];
            if (kLoss) squares[i] += e.x * e.x + e.y * e.y + (e.z * e.z + e.w * e.w);
            if (i0 + i >= g.m) continue;
            if (!gradient)
              reinterpret_cast<float4*>(x[i])[at[q]] = e;
            else if (wanted)
              store16_streaming(to + 16 * at[q], {float_bits(weight * e.x), float_bits(weight * e.y),
                                                  float_bits(weight * e.z), float_bits(weight * e.w)});
          }
        }
      }
      if (!kLoss) continue;
      const float sum = scattered_sums(squares, lane);
      const int i = i0 + lane / (kWarpSize / 4);
      if (lane % (kWarpSize / 4) == 0 && lane / (kWarpSize / 4) < kStudents && i < g.m)
        totals[g.first + i] += row.mu * double(sum);
    }
  }

  __device__ static void subtract(float4& sum, float factor, const float4& t) {
    sum.x -= factor * t.x;
    sum.y -= factor * t.y;
    sum.z -= factor * t.z;
    sum.w -= factor * t.w;
  }
};

constexpr int kVectorWarps = 12;  // of 168 registers a thread

// Bytes of a team's scratch memory.
ALP_HOST_DEVICE inline int64_t vector_scratch(int pairs_m, int pairs_n) { return int64_t(12) * pairs_m * pairs_n; }

template <int kStudents, class P>
__global__ void __launch_bounds__(kVectorWarps* kWarpSize, 1) alp_vector(const __grid_constant__ P p) {
  ALP_DYNAMIC_SHARED(shared);
  const RowLayout layout(p.ms, p.ns, p.columns, 4, block_size() / kWarpSize, p.team, p.stages,
                         vector_scratch(p.pairs_m, p.pairs_n));
  run_rows<VectorKernel<kStudents, P>>(p, layout, shared);
}

}  // namespace alp::cuda
