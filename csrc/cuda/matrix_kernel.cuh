// The fast kernel for bf16 and fp16 rows: every row is read once, its products run on the matrix units.
//
// A team of warps takes one row: n teacher and m student layers lie side by side in shared memory, brought there
// by asynchronous copies. Teams are independent of each other, so while one computes the others' copies are
// under way. Two passes over the columns:
//   1  z_ij = ⟨s_i, t_j⟩ and the Gram matrix G_jk = ⟨t_j, t_k⟩. Both operands are exact, sums are fp32.
//   -  a_ij = softmax_j(τ z_ij); p_ij = ⟨e_i, t_j⟩ = z_ij − Σ_k a_ik G_kj; c_ij = a_ij (p_ij − Σ_j a_ij p_ij)
//   2  C_i = Σ_j a_ij t_j and y_i = Σ_j c_ij t_j in one product whose 16 rows are 8 a and 8 c, each split in a
//      high and a low part; e_i = s_i − C_i directly, never from G; ∂s_i = 2w (e_i − τ y_i), written over s_i
//      and from there to memory 16 bytes at a time.
// Where a row does not fit, it is taken in parts of its columns; those that are gone before pass 2 are read
// again, from the L2 cache.
//
// On paper, for 12 teacher and 6 student layers of 768 bf16 columns, per row and multiprocessor (an H100 at its
// data-sheet figures: 3.35 TB/s, 132 multiprocessors at 1.7 GHz, so 15 bytes a cycle each):
//   memory         27 648 bytes in, 9 216 out                         2 460 cycles
//   shared memory  27.6 KB in, 37 KB for pass 1, 37 + 28 KB for pass 2, at 128 bytes a cycle    1 000 cycles
//   matrix units   48 × (3 + 4) mma.m16n8k16 of 2 048 multiply-adds, at 1 024 a cycle      670 cycles
//   instructions   about 2 500, at 4 a cycle                            630 cycles
// so memory is the bound as long as copies never stop: 7 teams of one warp hold 195 KB of rows.
#pragma once

#include "generic_kernel.cuh"

namespace alp::cuda {

constexpr int kUnit = 32;  // columns that a warp takes at a time

struct MatrixLayout {
  int64_t coef, queue, totals, scratch, tiles;  // offsets in shared memory
  int64_t scratch_bytes, tile_bytes;            // of a team; of one part of a row
  int64_t bytes;

  // warps in the block, teams of `team` warps; kM·8 students and kN·16 teachers to a group
  __host__ __device__ MatrixLayout(int ms, int ns, int columns, int warps, int team, int stages, int kM, int kN) {
    const int teams = warps / team;
    auto round = [](int64_t count) { return (count + 127) / 128 * 128; };
    scratch_bytes = 4 * (2 * 16 * kN * 8 * kM + 16 * kN * 16 * kN);
    tile_bytes = int64_t(ms + ns) * (2 * columns + 16);
    coef = 0;                         // float [ms]
    queue = round(4 * ms);            // Queued [warps][4]
    totals = queue + warps * 4 * 24;  // double [warps][2ms + 1]
    scratch = round(totals + 8 * int64_t(warps) * (2 * ms + 1));
    tiles = round(scratch + teams * scratch_bytes);
    bytes = tiles + teams * stages * tile_bytes;
  }
};

// A row on its way through the team.
struct Queued {
  int64_t r, position;
  double mu;
};

template <bool kBf16, int kM, int kN, class P>
struct MatrixKernel {
  const P& p;
  const Constants& constants;
  const MatrixLayout layout;
  char* const shared;
  const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
  const int group_id = lane / 4, t = lane % 4;  // of the matrix fragments
  const int team = warp / p.team, member = warp % p.team, teams = block_size() / kWarpSize / p.team;
  const int members = kWarpSize * p.team, thread = member * kWarpSize + lane;
  const int parts = int((p.weights.D + p.columns - 1) / p.columns), pitch = 2 * p.columns + 16;
  // A row's loads: its parts in order, then again those that pass 2 does not find any more.
  const int loads = parts > p.stages ? 2 * parts - p.stages : parts;
  const float scale = float(constants.scale);
  const bool with_gradient = p.student_grad || p.scale_grad;
  const bool through_attention = with_gradient && !p.detach && (constants.scale != 0 || p.scale_grad);
  // [teacher 16 kN][student 8 kM], the same, [teacher][teacher]
  float* const scratch_c = reinterpret_cast<float*>(shared + layout.scratch + team * layout.scratch_bytes);
  float* const scratch_a = scratch_c + 16 * kN * 8 * kM;
  float* const gram = scratch_a + 16 * kN * 8 * kM;
  char* const tiles = shared + layout.tiles + team * p.stages * layout.tile_bytes;
  Queued* const queue = reinterpret_cast<Queued*>(shared + layout.queue) + 4 * warp;
  double* const totals = reinterpret_cast<double*>(shared + layout.totals) + warp * (2 * p.ms + 1);
  const float* const coef = reinterpret_cast<const float*>(shared + layout.coef);

  int issued = 0;       // loads, since the start
  int load_at = 0;      // which of a row's loads is next
  unsigned queued = 0;  // rows that loads have reached
  bool more = true;     // rows are left to load
  int64_t next_row = block_index() + int64_t(grid_size()) * team;

  float z[kN][kM][4], a[kN][kM][4];  // fragments: teachers 16 N + group_id (+ 8), students 8 M + 2t (+ 1)

  __device__ void sync_team() {
    if (p.team == 1)
      sync_warp();
    else
      sync_warps(1 + team, members);
  }

  __device__ void run() {
    for (int k = lane; k < 2 * p.ms + 1; k += kWarpSize) totals[k] = 0;
    for (int k = 0; k < p.stages; ++k) issue_load();
    int consumed = 0;  // loads of the rows before
    for (unsigned row = 0;; ++row) {
      if (row == queued) return;  // nothing was left to load
      sync_warp();
      const Queued current = queue[row % 4];
      take_row(current, consumed);
      consumed += loads;
    }
  }

  // ---- Loads -----------------------------------------------------------------------------------------

  // The next row of weight other than 0 into the queue; rows before it get zeros.
  __device__ bool enqueue_row() {
    const int64_t step = int64_t(grid_size()) * teams;
    for (; next_row < p.weights.rows; next_row += step) {
      const Row row = find_row(p.weights, next_row);
      if (row.mu == 0) {
        skip(next_row);
        continue;
      }
      if (lane == 0) queue[queued % 4] = {next_row, row.position, row.mu};
      ++queued;
      next_row += step;
      sync_warp();
      return true;
    }
    return false;
  }

  __device__ int part_of(int load) const { return load < parts ? load : 2 * parts - p.stages - 1 - load; }
  __device__ int columns_of(int part) const {
    const int64_t left = p.weights.D - int64_t(part) * p.columns;
    return left < p.columns ? int(left) : p.columns;
  }

  // Starts the team's next load. Each call is one group of copies, an empty one behind the last row.
  __device__ void issue_load() {
    if (more && (load_at == 0 || load_at == loads)) {
      more = enqueue_row();
      load_at = 0;
    }
    if (more) {
      const int part = part_of(load_at++), vectors = columns_of(part) / 8;
      const int64_t position = queue[(queued - 1) % 4].position;
      char* tile = tiles + issued % p.stages * layout.tile_bytes;
      for (int q = member; q < p.ms + p.ns; q += p.team) {
        const Layer& layer = p.layers[q < p.ms ? q : p.m + q - p.ms];
        const char* from = row_of(layer, position) + int64_t(part) * p.columns * 2;
        char* to = tile + q * pitch;
#pragma unroll 4
        for (int v = lane; v < vectors; v += kWarpSize) copy16_async(to + 16 * v, from + 16 * v);
      }
    }
    commit_copies();
    ++issued;
  }

  // Waits until load number `load` has arrived for the whole team.
  __device__ void wait_for_load(int load) {
    if (issued - load > 1)
      wait_copies<1>();
    else
      wait_copies<0>();
    sync_team();
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
      const bool scores = group.n > 1 && (constants.scale != 0 || p.scale_grad);
      for (int load = 0; load < parts; ++load) {
        if (g == 0) wait_for_load(first_load + load);
        if (scores) products(group, first_load + load, columns_of(load), gram_part);
        if (load >= kept) continue;
        sync_team();
        issue_load();
      }
      float factor[kM];  // of y_i in the gradient
      if (scores) share_products(group, gram_part);
      attend(group, row, scores);
      const bool varies = through_attention && group.n > 1;
      differentiate_softmax(group, row, varies, factor);
      sync_team();
      Operands operands;
      split_operands(operands);
      float squares[kM] = {};
      for (int load = kept; load < loads; ++load) {
        if (load >= parts) wait_for_load(first_load + load);
        const int part = part_of(load);
        differences(group, row, first_load + load, columns_of(part), operands, factor, squares);
        if (g + 1 < p.group_count) continue;
        sync_warp();
        if (p.student_grad) write_gradients(row, first_load + load, part);
        sync_team();
        issue_load();
      }
      add_losses(group, row, squares);
      sync_team();  // scratch memory is free again
    }
    complete(row);
  }

  // A team member's part of `columns`, in units.
  __device__ int first_column(int columns, int of) const { return columns / kUnit * of / p.team * kUnit; }

  __device__ const char* tile_of(int load) const { return tiles + load % p.stages * layout.tile_bytes; }
  // Layers behind a group's last one repeat it: their results are not used.
  __device__ const char* student_row(const char* tile, const Group& g, int i) const {
    return tile + (g.first + min(i, g.m - 1)) * pitch;
  }
  __device__ const char* teacher_row(const char* tile, const Group& g, int j) const {
    return tile + (p.ms + p.index[g.teachers + min(j, g.n - 1)]) * pitch;
  }

  // z and G over one part of the columns
  __device__ void products(const Group& g, int load, int columns, float (&gram_part)[kN][2 * kN][4]) {
    const char* tile = tile_of(load);
    const char *b_s[kM], *b_t[kN];
#pragma unroll
    for (int i = 0; i < kM; ++i) b_s[i] = student_row(tile, g, 8 * i + lane % 8) + lane / 8 * 16;
#pragma unroll
    for (int j = 0; j < kN; ++j) b_t[j] = teacher_row(tile, g, 16 * j + lane % 16) + lane / 16 * 16;
    const int end = first_column(columns, member + 1);
    for (int d = first_column(columns, member); d < end; d += kUnit) {
      uint32_t s[kM][4];  // 8 students × 32 columns
#pragma unroll
      for (int i = 0; i < kM; ++i) load_matrices(s[i], b_s[i] + 2 * d);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t teachers[kN][4];  // 16 teachers × 16 columns
#pragma unroll
        for (int j = 0; j < kN; ++j) load_matrices(teachers[j], b_t[j] + 2 * d + 32 * half);
#pragma unroll
        for (int j = 0; j < kN; ++j) {
#pragma unroll
          for (int i = 0; i < kM; ++i) multiply_add<kBf16>(z[j][i], teachers[j], s[i][2 * half], s[i][2 * half + 1]);
          if (!through_attention) continue;
#pragma unroll
          for (int k = 0; k < kN; ++k) {  // the rows of a 16 × 16 operand are two 8-column operands
            multiply_add<kBf16>(gram_part[j][2 * k], teachers[j], teachers[k][0], teachers[k][2]);
            multiply_add<kBf16>(gram_part[j][2 * k + 1], teachers[j], teachers[k][1], teachers[k][3]);
          }
        }
      }
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
              float& at = gram[row * 16 * kN + fragment_column(k, e)];
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

  __device__ float* attention_row(int slot, int64_t r) const {
    return static_cast<float*>(p.attention) + (int64_t(p.original[slot]) * p.weights.rows + r) * p.n;
  }

  // What return_details shows; by the team's first warp.
  __device__ void show_attention(const Group& g, const Queued& row) {
    for (int i = 0; i < g.m; ++i)
      for (int k = lane; k < p.n; k += kWarpSize) attention_row(g.first + i, row.r)[k] = 0;
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
            attention_row(g.first + student, row.r)[p.original[p.m + teacher]] = a_ij;
            if (!(a_ij <= 0)) entropy -= double(a_ij) * double(logf(a_ij));
          }
        entropy = over_teachers_sum(entropy);
        if (group_id == 0 && student < g.m) totals[p.ms + g.first + student] += row.mu * entropy;
      }
  }

  // c_ij, scaled to at most 1 so that 16 bits hold it, into scratch memory; factor: 2w τ times what was taken out
  __device__ void differentiate_softmax(const Group& g, const Queued& row, bool varies, float (&factor)[kM]) {
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
          g_kj[2 * j] = gram[k * 16 * kN + 16 * j + group_id];
          g_kj[2 * j + 1] = gram[k * 16 * kN + 16 * j + group_id + 8];
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
          float mean = 0;
#pragma unroll
          for (int j = 0; j < kN; ++j)
#pragma unroll
            for (int e = half; e < 4; e += 2)
              if (fragment_row(j, e) < g.n) mean += a[j][i][e] * c[j][i][e];
          mean = over_teachers_sum(mean);
          float along = 0;
#pragma unroll
          for (int j = 0; j < kN; ++j)
#pragma unroll
            for (int e = half; e < 4; e += 2) {
              c[j][i][e] = fragment_row(j, e) < g.n ? a[j][i][e] * (c[j][i][e] - mean) : 0.f;
              if (fragment_row(j, e) < g.n) along += c[j][i][e] * z[j][i][e];
            }
          const int student = fragment_column(i, half);
          if (student < g.m) d_scale -= double(weight_of(g, student, row)) * double(along);
        }
      if (p.scale_grad && member == 0) {
        d_scale = warp_sum(d_scale);
        if (lane == 0) totals[2 * p.ms] += d_scale;
      }
    }
    sync_team();  // every member has read what lay here before
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      float largest[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float top = 0;
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
          for (int e = half; e < 4; e += 2) top = fabsf(c[j][i][e]) > top ? fabsf(c[j][i][e]) : top;
        top = over_teachers_max(top);
        largest[half] = top;
        const float inverse = top > 0 ? 1.f / top : 0.f;
        // A largest c too small to divide by, or NaN alone, goes through as it is.
        const bool divisible = inverse < 3e38f && top > 0;
        if (!divisible) largest[half] = 1;
        if (member != 0) continue;
#pragma unroll
        for (int j = 0; j < kN; ++j)
#pragma unroll
          for (int e = half; e < 4; e += 2)
            scratch_c[fragment_row(j, e) * 8 * kM + fragment_column(i, e)] =
                divisible ? c[j][i][e] * inverse : c[j][i][e];
      }
      // From students 2t, 2t + 1 of the lane to student group_id, as pass 2 has them
      const float even = shuffle(largest[0], group_id / 2), odd = shuffle(largest[1], group_id / 2);
      factor[i] = weight_of(g, 8 * i + group_id, row) * scale * (group_id % 2 == 0 ? even : odd);
    }
  }

  __device__ float weight_of(const Group& g, int student, const Queued& row) const {  // 2w
    return coef[g.first + min(student, g.m - 1)] * float(row.mu);
  }

  // Rows 0 … 7 a_ij, rows 8 … 15 c_ij of 8 students, as the left operand, in a high and a low part
  struct Operands {
    uint32_t high[kM][kN][4], low[kM][kN][4];
  };
  __device__ void split_operands(Operands& o) const {
#pragma unroll
    for (int i = 0; i < kM; ++i)
#pragma unroll
      for (int j = 0; j < kN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float* from = e % 2 == 0 ? scratch_a : scratch_c;
          const int teacher = 16 * j + 2 * t + e / 2 * 8, student = 8 * i + group_id;
          const float x = from[teacher * 8 * kM + student], y = from[(teacher + 1) * 8 * kM + student];
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

  // Pass 2 over one part of the columns: |e_i|², and ∂s_i over s_i
  __device__ void differences(const Group& g, const Queued& row, int load, int columns, const Operands& o,
                              const float (&factor)[kM], float (&squares)[kM]) {
    char* tile = const_cast<char*>(tile_of(load));
    const char *b_s[kM], *b_t[kN];
    char* b_out[kM];
    float weight[kM];
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      b_s[i] = student_row(tile, g, 8 * i + lane % 8) + lane / 8 * 16;
      b_out[i] = tile + (g.first + min(8 * i + group_id, g.m - 1)) * pitch + 4 * t;
      weight[i] = weight_of(g, 8 * i + group_id, row);
    }
#pragma unroll
    for (int j = 0; j < kN; ++j) b_t[j] = teacher_row(tile, g, 16 * j + lane % 16) + lane / 16 * 16;
    const int end = first_column(columns, member + 1);
    for (int d = first_column(columns, member); d < end; d += kUnit) {
      uint32_t s[kM][4];
#pragma unroll
      for (int i = 0; i < kM; ++i) load_matrices(s[i], b_s[i] + 2 * d);
      sync_warp();  // all rows are read before any is written
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float sum[2][kM][4] = {};  // rows 0 … 7 C_i, rows 8 … 15 y_i, for 8 columns each
#pragma unroll
        for (int j = 0; j < kN; ++j) {
          uint32_t teachers[4];  // 16 teachers × 2 · 8 columns
          load_matrices_transposed(teachers, b_t[j] + 2 * d + 32 * half);
#pragma unroll
          for (int q = 0; q < 2; ++q)
#pragma unroll
            for (int i = 0; i < kM; ++i) {
              multiply_add<kBf16>(sum[q][i], o.high[i][j], teachers[2 * q], teachers[2 * q + 1]);
              multiply_add<kBf16>(sum[q][i], o.low[i][j], teachers[2 * q], teachers[2 * q + 1]);
            }
        }
#pragma unroll
        for (int q = 0; q < 2; ++q)
#pragma unroll
          for (int i = 0; i < kM; ++i) {
            const uint32_t word = s[i][2 * half + q];
            const float e0 = low_half(word) - sum[q][i][0], e1 = high_half(word) - sum[q][i][1];
            squares[i] += e0 * e0;
            squares[i] += e1 * e1;
            if (!p.student_grad || 8 * i + group_id >= g.m) continue;
            *reinterpret_cast<uint32_t*>(b_out[i] + 2 * d + 32 * half + 16 * q) =
                pack<kBf16>(weight[i] * e0 - factor[i] * sum[q][i][2], weight[i] * e1 - factor[i] * sum[q][i][3]);
          }
      }
    }
  }

  __device__ void write_gradients(const Queued& row, int load, int part) {
    const char* tile = tile_of(load);
    const int columns = columns_of(part), begin = first_column(columns, member),
              end = first_column(columns, member + 1);
    const int64_t at = (row.position * p.weights.D + int64_t(part) * p.columns + begin) * 2;
    for (int i = 0; i < p.ms; ++i) {
      char* to = p.layers[i].grad;
      if (to == nullptr) continue;
      const char* from = tile + i * pitch + 2 * begin;
#pragma unroll 4
      for (int v = lane; v < (end - begin) / 8; v += kWarpSize)
        store16_streaming(to + at + 16 * v, load16(from + 16 * v));
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

  // ---- Zeros -----------------------------------------------------------------------------------------

  __device__ void complete(const Queued& row) {
    const int64_t seq = p.weights.seq, bytes = 2 * p.weights.D;
    for (int i = 0; i < p.m; ++i) {
      char* grad = p.layers[i].grad;
      const bool active = i < p.ms;
      if (p.attention != nullptr && !active && member == 0)
        for (int k = lane; k < p.n; k += kWarpSize) attention_row(i, row.r)[k] = 0;
      if (grad == nullptr || (active && p.weights.pooling == Pooling::token)) continue;
      char* sequence = grad + row.r * seq * bytes;
      const int64_t kept = active ? row.position - row.r * seq : seq;
      zero_bytes(sequence, kept * bytes, thread, members);
      if (active) zero_bytes(sequence + (kept + 1) * bytes, (seq - kept - 1) * bytes, thread, members);
    }
  }

  __device__ void skip(int64_t r) {
    const int64_t bytes = p.weights.seq * p.weights.D * 2;
    for (int i = 0; i < p.m; ++i) {
      if (p.layers[i].grad != nullptr) zero_bytes(p.layers[i].grad + r * bytes, bytes, thread, members);
      if (p.attention != nullptr && member == 0)
        for (int k = lane; k < p.n; k += kWarpSize) attention_row(i, r)[k] = 0;
    }
  }
};

// Registers: kM = kN = 1 is held to 12 warps a multiprocessor, the larger ones to 8.
constexpr int matrix_warps(int kM, int kN) { return kM * kN == 1 ? 12 : 8; }

template <bool kBf16, int kM, int kN, class P>
__global__ void __launch_bounds__(matrix_warps(kM, kN) * kWarpSize, 1) alp_matrix(const __grid_constant__ P p) {
  ALP_DYNAMIC_SHARED(shared);
  const MatrixLayout layout(p.ms, p.ns, p.columns, block_size() / kWarpSize, p.team, p.stages, kM, kN);
  // The tiles are not in use yet.
  const Constants constants = find_constants(p, reinterpret_cast<double*>(shared + layout.tiles));
  for (int i = thread_index(); i < p.ms; i += block_size())
    reinterpret_cast<float*>(shared + layout.coef)[i] = float(constants.unit * p.omega[i]);
  sync_block();
  MatrixKernel<kBf16, kM, kN, P>{p, constants, layout, shared}.run();
  sync_block();
  const int warps = block_size() / kWarpSize;
  const double* totals = reinterpret_cast<const double*>(shared + layout.totals);
  double* partial = p.partials + int64_t(block_index()) * (2 * p.m + 1);
  for (int k = thread_index(); k < 2 * p.m + 1; k += block_size()) {
    const int slot = k == 2 * p.m ? 2 * p.ms : k % p.m < p.ms ? k / p.m * p.ms + k % p.m : -1;
    double sum = 0;
    for (int w = 0; w < warps && slot >= 0; ++w) sum += totals[w * (2 * p.ms + 1) + slot];
    partial[k] = sum;
  }
  sync_block();
  finish<float>(p, constants, reinterpret_cast<unsigned*>(shared + layout.tiles));
}

}  // namespace alp::cuda
