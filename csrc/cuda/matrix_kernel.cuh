// The fast kernel for bf16 and fp16 rows: every row is read once, its products run on the matrix units.
//
// A team of warps (row_pipeline.cuh) goes over the columns of its row twice:
//   1  z_ij = ⟨s_i, t_j⟩ and the Gram matrix G_jk = ⟨t_j, t_k⟩. Both operands are exact, sums are fp32.
//   -  a_ij = softmax_j(τ z_ij); p_ij = ⟨e_i, t_j⟩ = z_ij − Σ_k a_ik G_kj; c_ij = a_ij (p_ij − Σ_j a_ij p_ij)
//   2  e_i = s_i − Σ_j a_ij t_j, never from G, and f s_i − Σ_j b_ij t_j with b_ij = f (a_ij + τ c_ij), in one product
//      whose 16 rows are 8 a and 8 b, each split in a high and a low part. With f = 2w the second is ∂s_i; it is
//      written over s_i.
//
// On paper, for 12 teacher and 6 student layers of 768 bf16 columns, per row and multiprocessor (an H100 at its
// data-sheet figures: 3.35 TB/s, 132 multiprocessors at 1.7 GHz, so 15 bytes a cycle each):
//   memory         27 648 bytes in, 9 216 out                         2 460 cycles
//   shared memory  27.6 KB in, 49 KB for pass 1, 28 + 9 KB for pass 2, at 128 bytes a cycle    900 cycles
//   matrix units   48 × (3 + 4) mma.m16n8k16 of 2 048 multiply-adds, at 1 024 a cycle      670 cycles
//   instructions   about 2 500 (13 for 32 columns in pass 1, 52 in pass 2), at 4 a cycle    630 cycles
// so memory is the bound as long as copies never stop. Measured: 81 % of a copy's bandwidth. Shared memory holds 7
// rows, and the one or two warps of each wait for their own products.
#pragma once

#include "generic_kernel.cuh"
#include "row_pipeline.cuh"

namespace alp::cuda {

constexpr int kUnit = 32;  // columns that a warp takes at a time

// Floats from one row of the Gram matrix to the next: rows at one bank would wait for each other.
ALP_HOST_DEVICE constexpr int gram_pitch(int kN) { return 16 * kN + 4; }
// Bytes of a team's scratch memory: [teacher 16 kN][student 8 kM] floats, the same, [teacher][gram_pitch]
ALP_HOST_DEVICE constexpr int64_t matrix_scratch(int kM, int kN) {
  return 4 * (2 * 16 * kN * 8 * kM + 16 * kN * gram_pitch(kN));
}

template <bool kBf16, int kM, int kN, class P>
struct MatrixKernel : RowPipeline<2, P> {
  using Rows = RowPipeline<2, P>;
  using Rows::give_back, Rows::lane, Rows::layout, Rows::loads, Rows::member, Rows::p, Rows::part_of, Rows::parts,
      Rows::pitch, Rows::scale, Rows::shared, Rows::sync_team, Rows::team, Rows::through_attention, Rows::totals,
      Rows::weight_of;
  const int group_id = lane / 4, t = lane % 4;  // of the matrix fragments
  float* const scratch_c = reinterpret_cast<float*>(shared + layout.scratch + team * layout.scratch_bytes);
  float* const scratch_a = scratch_c + 16 * kN * 8 * kM;
  float* const gram = scratch_a + 16 * kN * 8 * kM;

  float z[kN][kM][4], a[kN][kM][4];  // fragments: teachers 16 N + group_id (+ 8), students 8 M + 2t (+ 1)

  __device__ void run(const Constants& constants) {
    Rows::run(constants, [this](const Queued& row, int load) { take_row(row, load); });
  }

  // ---- A row -----------------------------------------------------------------------------------------

  __device__ void take_row(const Queued& row, int first_load) {
    const int kept = parts > p.stages ? parts - p.stages : 0;  // the first load that pass 2 still finds
    for (int g = 0; g < p.group_count; ++g) {                  // several groups only where the row is one part
      const Group group = p.groups[g];
      float gram_part[kN][2 * kN][4];
#pragma unroll
      for (int j = 0; j < kN; ++j) {
#pragma unroll
        for (int k = 0; k < 2 * kN; ++k)
#pragma unroll
          for (int e = 0; e < 4; ++e) gram_part[j][k][e] = 0;
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) z[j][i][e] = 0;
      }
      const bool scores = group.n > 1 && Rows::with_scores;
      for (int load = 0; load < parts; ++load) {
        if (g == 0) Rows::wait_for_load(first_load + load);
        if (scores) products(group, first_load + load, Rows::columns_of(load), gram_part);
        if (load >= kept) continue;
        sync_team();
        Rows::issue_load();
      }
      if (scores) share_products(group, gram_part);
      attend(group, row, scores);
      const bool varies = through_attention && group.n > 1;
      Operands operands;
      differentiate_softmax(group, row, varies, operands);
      sync_team();
      split_operands(operands);
      float squares[kM] = {};
      for (int load = kept; load < loads; ++load) {
        if (load >= parts) Rows::wait_for_load(first_load + load);
        const int part = part_of(load);
        differences(group, first_load + load, Rows::columns_of(part), operands, squares);
        if (g + 1 == p.group_count) give_back(row, first_load + load, part);
      }
      add_losses(group, row, squares);
      sync_team();  // scratch memory is free again
    }
  }

  // A team member's part of `columns`, in units.
  __device__ int first_column(int columns, int of) const { return columns / kUnit * of / p.team * kUnit; }

  // Layers behind a group's last one repeat it: their results are not used.
  __device__ const char* student_row(const char* tile, const Group& g, int i) const {
    return tile + (g.first + min(i, g.m - 1)) * pitch;
  }
  __device__ const char* teacher_row(const char* tile, const Group& g, int j) const {
    return tile + (p.ms + p.index[g.teachers + min(j, g.n - 1)]) * pitch;
  }

  // z and G over one part of the columns
  __device__ void products(const Group& g, int load, int columns, float (&gram_part)[kN][2 * kN][4]) {
    const char* tile = Rows::tile_of(load);
    SharedPointer b_s[kM], b_t[kN], b_g[kN];
#pragma unroll
    for (int i = 0; i < kM; ++i) b_s[i] = shared_pointer(student_row(tile, g, 8 * i + lane % 8) + lane / 8 * 16);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      b_t[j] = shared_pointer(teacher_row(tile, g, 16 * j + lane % 16) + lane / 16 * 16);
      b_g[j] = shared_pointer(teacher_row(tile, g, 16 * j + lane / 16 * 8 + lane % 8) + lane / 8 % 2 * 16);
    }
    const int begin = first_column(columns, member), end = first_column(columns, member + 1);
#pragma unroll
    for (int i = 0; i < kM; ++i) b_s[i] += 2 * begin;
#pragma unroll
    for (int j = 0; j < kN; ++j) b_t[j] += 2 * begin, b_g[j] += 2 * begin;
    // The second halves of the units have sums of their own where there are few: a product waits for the one before.
    constexpr int kChains = kM * kN == 1 ? 2 : 1;
    float second_z[kN][kM][4] = {}, second_gram[kN][2 * kN][4] = {};
    for (int d = begin; d < end; d += kUnit) {
      uint32_t s[kM][4];  // 8 students × 32 columns
#pragma unroll
      for (int i = 0; i < kM; ++i) load_matrices(s[i], b_s[i]), b_s[i] += 2 * kUnit;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // 16 teachers × 16 columns, as a left operand and, read again, as two right ones: each has its registers side
        // by side, and a read costs less than moving them
        uint32_t teachers[kN][4], others[kN][4];
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          load_matrices(teachers[j], b_t[j]), b_t[j] += kUnit;
          if (through_attention) load_matrices(others[j], b_g[j]);
          b_g[j] += kUnit;
        }
        auto& z_sum = kChains == 2 && half == 1 ? second_z : z;
        auto& gram_sum = kChains == 2 && half == 1 ? second_gram : gram_part;
#pragma unroll
        for (int j = 0; j < kN; ++j) {
#pragma unroll
          for (int i = 0; i < kM; ++i)
            multiply_add<kBf16>(z_sum[j][i], teachers[j], s[i][2 * half], s[i][2 * half + 1]);
          if (!through_attention) continue;
#pragma unroll
          for (int k = 0; k < kN; ++k) {
            multiply_add<kBf16>(gram_sum[j][2 * k], teachers[j], others[k][0], others[k][1]);
            multiply_add<kBf16>(gram_sum[j][2 * k + 1], teachers[j], others[k][2], others[k][3]);
          }
        }
      }
    }
    if constexpr (kChains == 2)
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
#pragma unroll
          for (int i = 0; i < kM; ++i) z[j][i][e] += second_z[j][i][e];
#pragma unroll
          for (int k = 0; k < 2 * kN; ++k) gram_part[j][k][e] += second_gram[j][k][e];
        }
  }

  // Where element e of a fragment lies: teacher j, and student i or teacher k
  __device__ int fragment_row(int tile, int e) const { return 16 * tile + group_id + e / 2 * 8; }
  __device__ int fragment_column(int tile, int e) const { return 8 * tile + 2 * t + e % 2; }

  // G into scratch memory, z summed over the team; members add one after the other, so in one order
  __device__ void share_products(const Group& g, const float (&gram_part)[kN][2 * kN][4]) {
    for (int turn = 0; turn < p.team; ++turn) {
      if (turn == member) {
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = fragment_row(j, e);
#pragma unroll
            for (int k = 0; k < 2 * kN; ++k) {
              float& at = gram[row * gram_pitch(kN) + fragment_column(k, e)];
              at = turn == 0 ? gram_part[j][k][e] : at + gram_part[j][k][e];
            }
            if (p.team == 1) continue;
#pragma unroll
            for (int i = 0; i < kM; ++i) {
              float& at = scratch_c[row * 8 * kM + fragment_column(i, e)];
              at = turn == 0 ? z[j][i][e] : at + z[j][i][e];
            }
          }
      }
      sync_team();
    }
    if (p.team == 1) return;
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
      for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) z[j][i][e] = scratch_c[fragment_row(j, e) * 8 * kM + fragment_column(i, e)];
  }

  // Over the teachers of a student: the lanes of one t hold them.
  template <class T>
  __device__ static T over_teachers_sum(T value) {
    value += shuffle_xor(value, 4);
    value += shuffle_xor(value, 8);
    return value + shuffle_xor(value, 16);
  }
  __device__ static float over_teachers_max(float value) {
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
      const float other = shuffle_xor(value, mask);
      value = other > value ? other : value;
    }
    return value;
  }

  // a_ij in fragments and, for the other layouts, in scratch memory; 0 for teachers that are not there
  __device__ void attend(const Group& g, const Queued& row, bool scores) {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = scale * shuffle(z[0][i][half], t), total = 0;  // of teacher 0
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
          for (int e = half; e < 4; e += 2)
            if (fragment_row(j, e) < g.n) top = scale * z[j][i][e] > top ? scale * z[j][i][e] : top;
        top = over_teachers_max(top);
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
          for (int e = half; e < 4; e += 2) {
            a[j][i][e] = fragment_row(j, e) < g.n ? exponential(scale * z[j][i][e] - top) : 0.f;
            total += a[j][i][e];
          }
        const float inverse = 1.f / over_teachers_sum(total);
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
          for (int e = half; e < 4; e += 2) {
            if (scores)
              a[j][i][e] *= inverse;
            else
              a[j][i][e] = fragment_row(j, e) < g.n ? 1.f / float(g.n) : 0.f;
          }
      }
    if (member != 0) return;
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
      for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) scratch_a[fragment_row(j, e) * 8 * kM + fragment_column(i, e)] = a[j][i][e];
    if (p.attention != nullptr) show_attention(g, row);
  }

  // What return_details shows; by the team's first warp.
  __device__ void show_attention(const Group& g, const Queued& row) {
    for (int i = 0; i < g.m; ++i)
      for (int k = lane; k < p.n; k += kWarpSize) Rows::attention_row(g.first + i, row.r)[k] = 0;
    sync_warp();
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int student = fragment_column(i, half);
        double entropy = 0;
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
          for (int e = half; e < 4; e += 2) {
            if (student >= g.m || fragment_row(j, e) >= g.n) continue;
            const float a_ij = a[j][i][e];
            const int teacher = p.index[g.teachers + fragment_row(j, e)];
            Rows::attention_row(g.first + student, row.r)[p.original[p.m + teacher]] = a_ij;
            if (!(a_ij <= 0)) entropy -= double(a_ij) * double(logf(a_ij));
          }
        entropy = over_teachers_sum(entropy);
        if (group_id == 0 && student < g.m) totals[p.ms + g.first + student] += row.mu * entropy;
      }
  }

  // What pass 2 multiplies the teachers by: rows 0 … 7 a_ij, rows 8 … 15 b_ij = f (a_ij + τ c_ij) of 8 students, as the
  // left operand, negative, in a high and a low part. For bf16 f is 2w, so that the sums are the gradient; for fp16,
  // which has not the range, 1 over a power of 2 that makes b at most 1.
  struct Operands {
    uint32_t high[kM][kN][4], low[kM][kN][4];
    float factor[kM], weight[kM];  // of the lane's row: f, and what makes the gradient of the sums
  };

  // Σ_j x_ij y_ij over the lane's teachers
  using Fragment = float[kN][kM][4];
  __device__ float lane_product(const Group& g, const Fragment& x, const Fragment& y, int i, int half) const {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
      for (int e = half; e < 4; e += 2)
        if (fragment_row(j, e) < g.n) sum += x[j][i][e] * y[j][i][e];
    return sum;
  }

  // b_ij into scratch memory
  __device__ void differentiate_softmax(const Group& g, const Queued& row, bool varies, Operands& o) {
    float c[kN][kM][4] = {};
    if (varies) {
      sync_team();
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
          for (int e = 0; e < 4; ++e) c[j][i][e] = z[j][i][e];
      for (int k = 0; k < g.n; ++k) {  // p_ij = z_ij − Σ_k a_ik G_kj
        float g_kj[2 * kN];
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          g_kj[2 * j] = gram[k * gram_pitch(kN) + 16 * j + group_id];
          g_kj[2 * j + 1] = gram[k * gram_pitch(kN) + 16 * j + group_id + 8];
        }
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          const float a0 = scratch_a[k * 8 * kM + fragment_column(i, 0)];
          const float a1 = scratch_a[k * 8 * kM + fragment_column(i, 1)];
#pragma unroll
          for (int j = 0; j < kN; ++j)
#pragma unroll
            for (int e = 0; e < 4; ++e) c[j][i][e] -= (e % 2 == 0 ? a0 : a1) * g_kj[2 * j + e / 2];
        }
      }
      double d_scale = 0;
#pragma unroll
      for (int i = 0; i < kM; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float mean = over_teachers_sum(lane_product(g, a, c, i, half));
#pragma unroll
          for (int j = 0; j < kN; ++j)
#pragma unroll
            for (int e = half; e < 4; e += 2)
              c[j][i][e] = fragment_row(j, e) < g.n ? a[j][i][e] * (c[j][i][e] - mean) : 0.f;
          const int student = fragment_column(i, half);
          if (!p.scale_grad || student >= g.m) continue;
          d_scale -= double(weight_of(g, student, row)) * double(lane_product(g, c, z, i, half));
        }
      if (p.scale_grad && member == 0) {
        d_scale = warp_sum(d_scale);
        if (lane == 0) totals[2 * p.ms] += d_scale;
      }
    }
    sync_team();  // every member has read what lay here before
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = 0;
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
          for (int e = half; e < 4; e += 2) {
            c[j][i][e] = a[j][i][e] + scale * c[j][i][e];
            top = fabsf(c[j][i][e]) > top ? fabsf(c[j][i][e]) : top;
          }
        factor[half] = 1;
        if (kBf16) {
          factor[half] = weight_of(g, fragment_column(i, half), row);
        } else {
          top = over_teachers_max(top);
          const float above = 2 * bits_float(float_bits(top) & 0x7f800000u);
          if (top > 1 && above < 3e38f) factor[half] = 1 / above;
        }
        if (member != 0) continue;
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
          for (int e = half; e < 4; e += 2)
            scratch_c[fragment_row(j, e) * 8 * kM + fragment_column(i, e)] = factor[half] * c[j][i][e];
      }
      // From students 2t, 2t + 1 of the lane to student group_id, as pass 2 has them
      const float even = shuffle(factor[0], group_id / 2), odd = shuffle(factor[1], group_id / 2);
      o.factor[i] = group_id % 2 == 0 ? even : odd;
      o.weight[i] = kBf16 ? 1 : weight_of(g, 8 * i + group_id, row) / o.factor[i];
    }
  }

  __device__ void split_operands(Operands& o) const {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* from = e % 2 == 0 ? scratch_a : scratch_c;
          const int teacher = 16 * j + 2 * t + e / 2 * 8, student = 8 * i + group_id;
          const float x = -from[teacher * 8 * kM + student], y = -from[(teacher + 1) * 8 * kM + student];
          const uint32_t word = pack<kBf16>(x, y);
          o.high[i][j][e] = word;
          o.low[i][j][e] = pack<kBf16>(x - low_half(word), y - high_half(word));
        }
  }
  __device__ static float low_half(uint32_t word) {
    return kBf16 ? bf16_to_float(uint16_t(word)) : fp16_to_float(uint16_t(word));
  }
  __device__ static float high_half(uint32_t word) {
    return kBf16 ? bf16_to_float(uint16_t(word >> 16)) : fp16_to_float(uint16_t(word >> 16));
  }

  // A unit of columns as pass 2 takes it: 8 kM students, and teachers transposed, 16 columns each
  struct Fragments {
    uint32_t s[kM][4], t[2][kN][4];
  };
  // One unit ahead of its use, past the gradients of the unit before: no store stands between the loads and it.
  __device__ static void load_fragments(Fragments& f, const SharedPointer (&b_s)[kM], const SharedPointer (&b_t)[kN],
                                        int d) {
#pragma unroll
    for (int i = 0; i < kM; ++i) load_matrices(f.s[i], b_s[i] + 2 * d);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < kN; ++j) load_matrices_transposed(f.t[half][j], b_t[j] + 2 * d + 32 * half);
  }

  // Pass 2 over one part of the columns: |e_i|², and ∂s_i over s_i
  __device__ void differences(const Group& g, int load, int columns, const Operands& o, float (&squares)[kM]) {
    char* tile = Rows::tile_of(load);
    SharedPointer b_s[kM], b_t[kN];
    char* b_out[kM];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      b_s[i] = shared_pointer(student_row(tile, g, 8 * i + lane % 8) + lane / 8 * 16);
      b_out[i] = tile + (g.first + min(8 * i + group_id, g.m - 1)) * pitch + 4 * t;
    }
#pragma unroll
    for (int j = 0; j < kN; ++j) b_t[j] = shared_pointer(teacher_row(tile, g, 16 * j + lane % 16) + lane / 16 * 16);
    const int begin = first_column(columns, member), last = first_column(columns, member + 1) - kUnit;
    Fragments even, odd;
    if (begin <= last) load_fragments(even, b_s, b_t, begin);
    for (int d = begin; d <= last; d += 2 * kUnit) {
      load_fragments(odd, b_s, b_t, min(d + kUnit, last));
      take_unit(even, g, d, o, b_out, squares);
      if (d == last) break;
      load_fragments(even, b_s, b_t, min(d + 2 * kUnit, last));
      take_unit(odd, g, d + kUnit, o, b_out, squares);
    }
  }

  __device__ void take_unit(const Fragments& f, const Group& g, int d, const Operands& o, char* const (&b_out)[kM],
                            float (&squares)[kM]) {
    sync_warp();  // all rows are read before any is written
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum[2][kM][4];  // rows 0 … 7 s_i − Σ_j a_ij t_j, rows 8 … 15 f s_i − Σ_j b_ij t_j, for 8 columns each
#pragma unroll
      for (int q = 0; q < 2; ++q)
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          const uint32_t word = f.s[i][2 * half + q];
          sum[q][i][0] = low_half(word);
          sum[q][i][1] = high_half(word);
          sum[q][i][2] = low_half(word) * o.factor[i];
          sum[q][i][3] = high_half(word) * o.factor[i];
        }
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int low = 0; low < 2; ++low)
#pragma unroll
          for (int q = 0; q < 2; ++q)
#pragma unroll
            for (int i = 0; i < kM; ++i)
              multiply_add<kBf16>(sum[q][i], low == 1 ? o.low[i][j] : o.high[i][j], f.t[half][j][2 * q],
                                  f.t[half][j][2 * q + 1]);
#pragma unroll
      for (int q = 0; q < 2; ++q)
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          squares[i] += sum[q][i][0] * sum[q][i][0];
          squares[i] += sum[q][i][1] * sum[q][i][1];
          if (!p.student_grad || 8 * i + group_id >= g.m) continue;
          *reinterpret_cast<uint32_t*>(b_out[i] + 2 * d + 32 * half + 16 * q) =
              kBf16 ? pack<kBf16>(sum[q][i][2], sum[q][i][3])
                    : pack<kBf16>(o.weight[i] * sum[q][i][2], o.weight[i] * sum[q][i][3]);
        }
    }
  }

  __device__ void add_losses(const Group& g, const Queued& row, const float (&squares)[kM]) {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      float sum = squares[i] + shuffle_xor(squares[i], 1);
      sum += shuffle_xor(sum, 2);
      if (t == 0 && 8 * i + group_id < g.m) totals[g.first + 8 * i + group_id] += row.mu * double(sum);
    }
  }
};

// Registers: 168 a thread for kM = kN = 1, 255 for the larger ones.
constexpr int matrix_warps(int kM, int kN) { return kM * kN == 1 ? 12 : 8; }

template <bool kBf16, int kM, int kN, class P>
__global__ void __launch_bounds__(matrix_warps(kM, kN) * kWarpSize, 1) alp_matrix(const __grid_constant__ P p) {
  ALP_DYNAMIC_SHARED(shared);
  const RowLayout layout(p.ms, p.ns, p.columns, 2, block_size() / kWarpSize, p.team, p.stages, matrix_scratch(kM, kN));
  run_rows<MatrixKernel<kBf16, kM, kN, P>>(p, layout, shared);
}

}  // namespace alp::cuda
