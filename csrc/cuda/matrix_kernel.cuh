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
//   instructions   about 2 500 (13 for 32 columns in pass 1, 51 in pass 2), at 4 a cycle    630 cycles
// so memory is the bound as long as copies never stop. But one warp takes several times as long for a row, waiting for
// its own products, so that several rows have to be under way.
#pragma once

#include "generic_kernel.cuh"
#include "row_pipeline.cuh"

namespace alp::cuda {

constexpr int kUnit = 32;  // columns that a warp takes at a time

// Floats from one row of a team's matrices to the next: rows at one bank would wait for each other.
ALP_HOST_DEVICE constexpr int scratch_pitch(int kN) { return 16 * kN + 4; }
// Bytes of a team's scratch memory: [student 8 kM] z and a, [teacher 16 kN] G, all by teacher; operands of pass 2
ALP_HOST_DEVICE constexpr int matrix_scratch(int kM, int kN, int team) {
  const int operands = kM == 1 && team == 1 ? 0 : kM * kWarpSize * (2 * kN * 16 + 4);
  return 4 * (2 * 8 * kM + 16 * kN) * scratch_pitch(kN) + operands;
}

template <bool kBf16, int kM, int kN, class P>
struct MatrixKernel : RowPipeline<2, P> {
  using Rows = RowPipeline<2, P>;
  using Rows::lane, Rows::layout, Rows::loads, Rows::member, Rows::p, Rows::part_of, Rows::parts, Rows::pitch,
      Rows::scale, Rows::shared, Rows::sync_team, Rows::team, Rows::through_attention, Rows::totals, Rows::weight_of;
  const int group_id = lane / 4, t = lane % 4;  // of the matrix fragments
  static constexpr int kPitch = scratch_pitch(kN);
  float* const scratch_z = reinterpret_cast<float*>(shared + layout.scratch + team * layout.scratch_bytes);
  float* const scratch_a = scratch_z + 8 * kM * kPitch;
  float* const gram = scratch_a + 8 * kM * kPitch;
  Bytes16* const shared_operands = reinterpret_cast<Bytes16*>(gram + 16 * kN * kPitch);  // [kM][kN][2][lane]
  float* const shared_factors = reinterpret_cast<float*>(shared_operands + kM * kN * 2 * kWarpSize);  // [kM][lane]

  // Of 8 students, in the layout of the matrix units: teachers 16 N + group_id (+ 8), students 2t (+ 1)
  using Fragment = float[kN][4];

  __device__ void run(const Constants& constants) {
    Rows::run(constants, [this](const Queued& row, int load) { take_row(row, load); });
  }

  // ---- A row -----------------------------------------------------------------------------------------

  __device__ void take_row(const Queued& row, int first_load) {
    const int kept = parts > p.stages ? parts - p.stages : 0;  // the first load that pass 2 still finds
    for (int g = 0; g < p.group_count; ++g) {                  // several groups only where the row is one part
      const Group group = p.groups[g];
      Products sums = {};
      const bool scores = group.n > 1 && Rows::with_scores;
      for (int load = 0; load < parts; ++load) {
        if (g == 0) Rows::wait_for_load(first_load + load);
        if (scores && through_attention)
          products<true>(group, first_load + load, Rows::columns_of(load), sums);
        else if (scores)
          products<false>(group, first_load + load, Rows::columns_of(load), sums);
        if (load < kept) Rows::release_load();
      }
      Fragment z;
      share_products(sums, scores, z);
      Operands operands[kM];
      const bool alone = kM == 1 && p.team == 1;  // else the warps take 8 students each, and tell each other
#pragma unroll 1
      for (int i = member; i < kM; i += p.team) {
        if (!alone)
          for_each_element(
              [&](int j, int e) { z[j][e] = scratch_z[fragment_column(i, e) * kPitch + fragment_row(j, e)]; });
        prepare_operands(group, row, i, scores, z, operands[0]);
        if (!alone) give_operands(i, operands[0]);
      }
      if (!alone) take_operands(operands);
      weigh_operands(group, row, operands);
      float squares[kM] = {};
      for (int load = kept; load < loads; ++load) {
        if (load >= parts) Rows::wait_for_load(first_load + load);
        const int part = part_of(load);
        differences(group, first_load + load, Rows::columns_of(part), operands, squares);
        if (g + 1 == p.group_count) Rows::give_back(row, first_load + load, part);
      }
      add_losses(group, row, squares);
      if (g + 1 < p.group_count) sync_team();  // scratch memory is free again
    }
  }

  // A team member's part of `columns`, in units. Teams have 1, 2 or 4 members.
  const int team_shift = p.team / 2;
  __device__ int first_column(int columns, int of) const { return (columns / kUnit * of >> team_shift) * kUnit; }

  // Layers behind a group's last one repeat it: their results are not used.
  __device__ const char* student_row(const char* tile, const Group& g, int i) const {
    return tile + (g.first + min(i, g.m - 1)) * pitch;
  }
  __device__ const char* teacher_row(const char* tile, const Group& g, int j) const {
    return tile + (p.ms + p.index[g.teachers + min(j, g.n - 1)]) * pitch;
  }

  // A unit of columns as pass 1 takes it: 8 kM students, and teachers, 16 columns each, as left operands and, read
  // again, as right ones: each has its registers side by side, and a read costs less than moving them.
  struct Factors {
    uint32_t s[kM][4], left[2][kN][4], right[2][kN][4];
  };
  template <bool kGram>
  __device__ static void load_factors(Factors& f, const SharedPointer (&b_s)[kM], const SharedPointer (&b_left)[kN],
                                      const SharedPointer (&b_right)[kN], int d) {
#pragma unroll
    for (int i = 0; i < kM; ++i) load_matrices(f.s[i], b_s[i] + 2 * d);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        load_matrices(f.left[half][j], b_left[j] + 2 * d + 32 * half);
        if (kGram) load_matrices(f.right[half][j], b_right[j] + 2 * d + 32 * half);
      }
  }

  // Sums of pass 1. The second halves of the units have sums of their own where there are few: a product waits for the
  // one before.
  static constexpr int kChains = kM * kN == 1 ? 2 : 1;
  struct Products {
    float z[kChains][kN][kM][4], gram[kChains][kN][2 * kN][4];
  };
  template <bool kGram>
  __device__ static void multiply_factors(const Factors& f, Products& sums) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < kN; ++j) {
#pragma unroll
        for (int i = 0; i < kM; ++i)
          multiply_add<kBf16>(sums.z[half % kChains][j][i], f.left[half][j], f.s[i][2 * half], f.s[i][2 * half + 1]);
#pragma unroll
        for (int k = 0; kGram && k < 2 * kN; ++k)
          multiply_add<kBf16>(sums.gram[half % kChains][j][k], f.left[half][j], f.right[half][k / 2][k % 2 * 2],
                              f.right[half][k / 2][k % 2 * 2 + 1]);
      }
  }

  // z and, with kGram, G over one part of the columns
  template <bool kGram>
  __device__ void products(const Group& g, int load, int columns, Products& sums) const {
    const char* tile = Rows::tile_of(load);
    SharedPointer b_s[kM], b_left[kN], b_right[kN];
#pragma unroll
    for (int i = 0; i < kM; ++i) b_s[i] = shared_pointer(student_row(tile, g, 8 * i + lane % 8) + lane / 8 * 16);
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      b_left[j] = shared_pointer(teacher_row(tile, g, 16 * j + lane % 16) + lane / 16 * 16);
      b_right[j] = shared_pointer(teacher_row(tile, g, 16 * j + lane / 16 * 8 + lane % 8) + lane / 8 % 2 * 16);
    }
    const int begin = first_column(columns, member), last = first_column(columns, member + 1) - kUnit;
    Factors even, odd;  // one unit ahead of its use
    if (begin <= last) load_factors<kGram>(even, b_s, b_left, b_right, begin);
    for (int d = begin; d <= last; d += 2 * kUnit) {
      load_factors<kGram>(odd, b_s, b_left, b_right, min(d + kUnit, last));
      multiply_factors<kGram>(even, sums);
      if (d == last) break;
      load_factors<kGram>(even, b_s, b_left, b_right, min(d + 2 * kUnit, last));
      multiply_factors<kGram>(odd, sums);
    }
  }

  // Where element e of a fragment lies: teacher j, and student i or teacher k
  __device__ int fragment_row(int tile, int e) const { return 16 * tile + group_id + e / 2 * 8; }
  __device__ int fragment_column(int tile, int e) const { return 8 * tile + 2 * t + e % 2; }

  // visit(j, e) for every element of a fragment
  template <class Visit>
  __device__ static void for_each_element(Visit visit) {
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) visit(j, e);
  }

  // G and z into scratch memory, summed over the team; members add one after the other, so in one order
  __device__ void share_products(const Products& sums, bool scores, Fragment& z) const {
    auto total = [](const auto& chains, int j, int k, int e) {
      return kChains == 2 ? chains[0][j][k][e] + chains[kChains - 1][j][k][e] : chains[0][j][k][e];
    };
    for_each_element([&](int j, int e) { z[j][e] = total(sums.z, j, 0, e); });
    for (int turn = 0; turn < p.team && scores; ++turn) {
      if (turn == member)
        for_each_element([&](int j, int e) {
          auto add = [&](float& at, float part) { at = turn == 0 ? part : at + part; };
          const int row = fragment_row(j, e);
#pragma unroll
          for (int k = 0; k < 2 * kN; ++k) add(gram[row * kPitch + fragment_column(k, e)], total(sums.gram, j, k, e));
#pragma unroll
          for (int i = 0; i < kM; ++i)
            if (kM > 1 || p.team > 1) add(scratch_z[fragment_column(i, e) * kPitch + row], total(sums.z, j, i, e));
        });
      sync_team();
    }
  }

  // Over the teachers of the lane's two students: the lanes of one t hold them.
  template <class T>
  __device__ static void over_teachers_sum(T (&values)[2]) {
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2)
#pragma unroll
      for (int half = 0; half < 2; ++half) values[half] += shuffle_xor(values[half], mask);
  }
  __device__ static void over_teachers_max(float (&values)[2]) {
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2)
#pragma unroll
      for (int half = 0; half < 2; ++half) values[half] = larger(values[half], shuffle_xor(values[half], mask));
  }
  __device__ static float larger(float value, float other) { return other > value ? other : value; }

  // a_ij of 8 students, also in scratch memory; 0 for teachers that are not there
  __device__ void attend(const Group& g, const Queued& row, int i, bool scores, const Fragment& z, Fragment& a) const {
    if (scores) {
      float top[2] = {-INFINITY, -INFINITY}, total[2] = {};
      for_each_element([&](int j, int e) {
        a[j][e] = fragment_row(j, e) < g.n ? scale * z[j][e] : -INFINITY;
        top[e % 2] = larger(top[e % 2], a[j][e]);
      });
      over_teachers_max(top);
      for_each_element([&](int j, int e) {
        a[j][e] = exponential(a[j][e] - top[e % 2]);
        total[e % 2] += a[j][e];
      });
      over_teachers_sum(total);
      const float inverse[2] = {reciprocal(total[0]), reciprocal(total[1])};
      for_each_element([&](int j, int e) { a[j][e] *= inverse[e % 2]; });
    } else {
      const float share = 1.f / float(g.n);
      for_each_element([&](int j, int e) { a[j][e] = fragment_row(j, e) < g.n ? share : 0.f; });
    }
    for_each_element([&](int j, int e) { scratch_a[fragment_column(i, e) * kPitch + fragment_row(j, e)] = a[j][e]; });
    if (p.attention != nullptr) show_attention(g, row, i, a);
  }

  // What return_details shows of 8 students
  __device__ void show_attention(const Group& g, const Queued& row, int i, const Fragment& a) const {
    for (int k = 8 * i; k < min(8 * i + 8, int(g.m)); ++k)
      for (int j = not_before(lane); j < p.n; j += kWarpSize) attention_row<float>(p, g.first + k, row.r)[j] = 0;
    sync_warp();
    double entropy[2] = {};
    for_each_element([&](int j, int e) {
      const int student = fragment_column(i, e), slot = fragment_row(j, e);
      if (student >= g.m || slot >= g.n) return;
      attention_row<float>(p, g.first + student, row.r)[p.original[p.m + p.index[g.teachers + slot]]] = a[j][e];
      if (!(a[j][e] <= 0)) entropy[e % 2] -= double(a[j][e]) * double(logf(a[j][e]));
    });
    over_teachers_sum(entropy);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (group_id == 0 && fragment_column(i, half) < g.m)
        totals[p.ms + g.first + fragment_column(i, half)] += row.mu * entropy[half];
  }

  // What pass 2 multiplies the teachers by: rows 0 … 7 a_ij, rows 8 … 15 b_ij = f (a_ij + τ c_ij) of 8 students, as the
  // left operand, negative, in a high and a low part. For bf16 f is 2w, so that the sums are the gradient; for fp16,
  // which has not the range, 1 over a power of 2 that makes b at most 1.
  struct Operands {
    uint32_t high[kN][4], low[kN][4];
    float factor, weight;  // of the lane's row: f, and what makes the gradient of the sums
  };

  // c_ij = a_ij (p_ij − Σ_j a_ij p_ij) of 8 students, with p_ij = z_ij − Σ_k a_ik G_kj
  __device__ void differentiate_softmax(const Group& g, const Queued& row, int i, const Fragment& z, const Fragment& a,
                                        Fragment& c) const {
    sync_warp();
    for_each_element([&](int j, int e) { c[j][e] = z[j][e]; });
#pragma unroll
    for (int k = 0; k < 16 * kN; k += 4) {  // four teachers; a_ik is 0 for those that are not there
      if (k >= g.n) continue;
      float4 g_k[kN][2], a_k[2];
#pragma unroll
      for (int j = 0; j < 2 * kN; ++j)
        g_k[j / 2][j % 2] = *reinterpret_cast<const float4*>(gram + (8 * j + group_id) * kPitch + k);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        a_k[half] = *reinterpret_cast<const float4*>(scratch_a + fragment_column(i, half) * kPitch + k);
      for_each_element([&](int j, int e) {
        const float4 &x = a_k[e % 2], &y = g_k[j][e / 2];
        c[j][e] -= x.x * y.x;
        c[j][e] -= x.y * y.y;
        c[j][e] -= x.z * y.z;
        c[j][e] -= x.w * y.w;
      });
    }
    float mean[2] = {};
    for_each_element([&](int j, int e) { mean[e % 2] += a[j][e] * c[j][e]; });
    over_teachers_sum(mean);
    for_each_element([&](int j, int e) { c[j][e] = a[j][e] * (c[j][e] - mean[e % 2]); });
    if (!p.scale_grad) return;
    float along[2] = {};
    for_each_element([&](int j, int e) {
      if (fragment_row(j, e) < g.n) along[e % 2] += c[j][e] * z[j][e];
    });
    double d_scale = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (fragment_column(i, half) < g.m)
        d_scale -= double(weight_of(g, fragment_column(i, half), row)) * double(along[half]);
    d_scale = warp_sum(d_scale);
    if (lane == 0) totals[2 * p.ms] += d_scale;
  }

  // The operands of 8 students. Fragments hold teachers by students, operands students by teachers.
  __device__ void prepare_operands(const Group& g, const Queued& row, int i, bool scores, const Fragment& z,
                                   Operands& o) const {
    Fragment a, c = {};
    attend(g, row, i, scores, z, a);
    if (through_attention && g.n > 1) differentiate_softmax(g, row, i, z, a, c);
    for_each_element([&](int j, int e) { c[j][e] = a[j][e] + scale * c[j][e]; });  // b_ij / f
    float factor[2];
    if (kBf16) {
#pragma unroll
      for (int half = 0; half < 2; ++half) factor[half] = weight_of(g, fragment_column(i, half), row);
    } else {
      float top[2] = {};
      for_each_element([&](int j, int e) { top[e % 2] = larger(top[e % 2], fabsf(c[j][e])); });
      over_teachers_max(top);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float above = 2 * bits_float(float_bits(top[half]) & 0x7f800000u);
        factor[half] = top[half] > 1 && above < 3e38f ? 1 / above : 1;
      }
      // From students 2t, 2t + 1 of the lane to student group_id, as pass 2 has them
      const float even = shuffle(factor[0], group_id / 2), odd = shuffle(factor[1], group_id / 2);
      o.factor = group_id % 2 == 0 ? even : odd;
    }
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int e = k / 2 * 2;
        const float x = k % 2 == 0 ? -a[j][e] : -factor[0] * c[j][e];
        const float y = k % 2 == 0 ? -a[j][e + 1] : -factor[1] * c[j][e + 1];
        const uint32_t word = pack<kBf16>(x, y);
        o.high[j][k] = transposed(word);
        o.low[j][k] = transposed(pack<kBf16>(x - low_half(word), y - high_half(word)));
      }
  }

  // From the warps that have prepared them to the whole team
  __device__ void give_operands(int i, const Operands& o) const {
    Bytes16* const to = shared_operands + i * kN * 2 * kWarpSize + lane;
#pragma unroll
    for (int j = 0; j < kN; ++j) {
      store16(to + 2 * j * kWarpSize, {o.high[j][0], o.high[j][1], o.high[j][2], o.high[j][3]});
      store16(to + (2 * j + 1) * kWarpSize, {o.low[j][0], o.low[j][1], o.low[j][2], o.low[j][3]});
    }
    if (!kBf16) shared_factors[i * kWarpSize + lane] = o.factor;
  }
  __device__ void take_operands(Operands (&operands)[kM]) const {
    sync_team();
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      Operands& o = operands[i];
      const Bytes16* const from = shared_operands + i * kN * 2 * kWarpSize + lane;
#pragma unroll
      for (int j = 0; j < kN; ++j) {
        const Bytes16 high = load16(from + 2 * j * kWarpSize), low = load16(from + (2 * j + 1) * kWarpSize);
        o.high[j][0] = high.x, o.high[j][1] = high.y, o.high[j][2] = high.z, o.high[j][3] = high.w;
        o.low[j][0] = low.x, o.low[j][1] = low.y, o.low[j][2] = low.z, o.low[j][3] = low.w;
      }
      if (!kBf16) o.factor = shared_factors[i * kWarpSize + lane];
    }
  }

  // f, and what makes the gradient of the sums
  __device__ void weigh_operands(const Group& g, const Queued& row, Operands (&operands)[kM]) const {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      const float weight = weight_of(g, 8 * i + group_id, row);
      if (kBf16) operands[i].factor = weight;
      operands[i].weight = kBf16 ? 1 : weight / operands[i].factor;
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
  __device__ static void load_fragments(Fragments& f, const SharedPointer (&b_s)[kM], const SharedPointer (&b_t)[kN],
                                        int d) {
#pragma unroll
    for (int i = 0; i < kM; ++i) load_matrices(f.s[i], b_s[i] + 2 * d);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int j = 0; j < kN; ++j) load_matrices_transposed(f.t[half][j], b_t[j] + 2 * d + 32 * half);
  }

  // Sums of pass 2, by 16 columns and by 8: rows 0 … 7 s_i − Σ_j a_ij t_j, rows 8 … 15 f s_i − Σ_j b_ij t_j
  struct Differences {
    float of[2][2][kM][4];
  };
  __device__ static void subtract(const Fragments& f, const Operands (&o)[kM], Differences& sums) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int q = 0; q < 2; ++q)
#pragma unroll
        for (int i = 0; i < kM; ++i) {
          const uint32_t word = f.s[i][2 * half + q];
          float (&sum)[4] = sums.of[half][q][i];
          sum[0] = low_half(word);
          sum[1] = high_half(word);
          sum[2] = low_half(word) * o[i].factor;
          sum[3] = high_half(word) * o[i].factor;
        }
#pragma unroll
    for (int j = 0; j < kN; ++j)
#pragma unroll
      for (int low = 0; low < 2; ++low)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int q = 0; q < 2; ++q)
#pragma unroll
            for (int i = 0; i < kM; ++i)
              multiply_add<kBf16>(sums.of[half][q][i], low == 1 ? o[i].low[j] : o[i].high[j], f.t[half][j][2 * q],
                                  f.t[half][j][2 * q + 1]);
  }
  // |e_i|², and ∂s_i over s_i; to: where the lane stores, as it loads students, and the step to the next unit
  __device__ void finish_unit(const Differences& sums, const Operands (&o)[kM], SharedPointer (&to)[kM],
                              const int (&step)[kM], float (&squares)[kM]) const {
    sync_warp();  // the unit is read by all lanes
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      uint32_t words[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float (&sum)[4] = sums.of[k / 2][k % 2][i];
        squares[i] += sum[0] * sum[0];
        squares[i] += sum[1] * sum[1];
        words[k] = kBf16 ? pack<kBf16>(sum[2], sum[3]) : pack<kBf16>(o[i].weight * sum[2], o[i].weight * sum[3]);
      }
      if (p.student_grad) store_matrices(to[i], words);
      to[i] += step[i];
    }
  }

  // Pass 2 over one part of the columns
  __device__ void differences(const Group& g, int load, int columns, const Operands (&o)[kM], float (&squares)[kM]) {
    char* tile = Rows::tile_of(load);
    SharedPointer b_s[kM], b_t[kN], to[kM];
    int step[kM];
    const int begin = first_column(columns, member), last = first_column(columns, member + 1) - kUnit;
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      b_s[i] = shared_pointer(student_row(tile, g, 8 * i + lane % 8) + lane / 8 * 16);
      // Layers that are not there go to scratch memory, where z is not needed any more.
      const bool there = 8 * i + lane % 8 < g.m;
      to[i] = there ? b_s[i] + 2 * begin : shared_pointer(reinterpret_cast<char*>(scratch_z) + 16 * lane);
      step[i] = there ? 2 * kUnit : 0;
    }
#pragma unroll
    for (int j = 0; j < kN; ++j) b_t[j] = shared_pointer(teacher_row(tile, g, 16 * j + lane % 16) + lane / 16 * 16);
    if (begin > last) return;
    Fragments even, odd;  // one unit ahead of its use
    load_fragments(even, b_s, b_t, begin);
    for (int d = begin;; d += 2 * kUnit) {
      Differences sums;
      load_fragments(odd, b_s, b_t, min(d + kUnit, last));
      subtract(even, o, sums);
      finish_unit(sums, o, to, step, squares);
      if (d == last) return;
      load_fragments(even, b_s, b_t, min(d + 2 * kUnit, last));
      subtract(odd, o, sums);
      finish_unit(sums, o, to, step, squares);
      if (d + kUnit == last) return;
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

constexpr int kMatrixWarps = 8;  // of 255 registers a thread

template <bool kBf16, int kM, int kN, class P>
__global__ void __launch_bounds__(kMatrixWarps* kWarpSize, 1) alp_matrix(const __grid_constant__ P p) {
  ALP_DYNAMIC_SHARED(shared);
  const RowLayout layout(p.ms, p.ns, p.columns, 2, block_size() / kWarpSize, p.team, p.stages,
                         matrix_scratch(kM, kN, p.team));
  run_rows<MatrixKernel<kBf16, kM, kN, P>>(p, layout, shared);
}

}  // namespace alp::cuda
