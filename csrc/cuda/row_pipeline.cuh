// Rows on their way through a multiprocessor, for the kernels that hold whole rows in shared memory.
//
// A team of warps takes one row after the other; its first warp finds them. A row's n teacher and m student layers lie
// side by side in a tile of shared memory, brought there in the background. Teams are independent of each other, so
// while one computes the others' copies are under way. Where a row does not fit, it is taken in parts of its columns;
// those that are gone before a second pass are read again, from the L2 cache.
//
// Rows take different times, so the last ones are not assigned to teams beforehand but dealt out as these go on.
//
// From sm_90 on one thread copies a whole layer at a time, and the tile's arrival is counted by a barrier in shared
// memory; before, every thread copies 16 bytes at a time.
#pragma once

#include "rows.cuh"

namespace alp::cuda {

struct RowLayout {
  // Offsets in shared memory: Constants, double [warps][2][row_sums]
  static constexpr int kConstants = 0, kTotals = sizeof(Constants);
  int coef, layers, queue, arrivals, scratch, tiles;
  int scratch_bytes, tile_bytes;  // of a team; of one part of a row
  int64_t bytes;

  // warps in the block, teams of `team` warps; columns of `element` bytes in a part
  __host__ __device__ RowLayout(int ms, int ns, int columns, int element, int warps, int team, int stages,
                                int scratch_of_team) {
    const int teams = warps / team;
    auto round = [](int count) { return (count + 127) / 128 * 128; };
    scratch_bytes = round(scratch_of_team);
    tile_bytes = (ms + ns) * (element * columns + 16);
    coef = kTotals + 8 * warps * 2 * row_sums(ms);           // float [ms]
    layers = round(coef + 4 * ms);                           // Layer [ms + ns]
    queue = layers + round(int(sizeof(Layer)) * (ms + ns));  // Queued [teams][4]
    arrivals = queue + teams * 4 * 24;                       // Arrival [teams][stages]
    scratch = round(arrivals + 8 * teams * stages);
    tiles = round(scratch + teams * scratch_bytes);
    bytes = tiles + int64_t(teams) * stages * tile_bytes;
  }
};

// A row on its way through the team; r = −1 behind the last one.
struct Queued {
  int64_t r, position;
  double mu;
};

template <int kElement, class P>
struct RowPipeline {
  const P& p;
  const RowLayout layout;
  char* const shared;
  const int lane = thread_index() % kWarpSize, warp = thread_index() / kWarpSize;
  const int team = warp / p.team, member = warp % p.team, teams = block_size() / kWarpSize / p.team;
  const int members = kWarpSize * p.team, thread = member * kWarpSize + lane;
  const int parts = p.parts, pitch = kElement * p.columns + 16;
  const int last_columns = int(p.weights.D - int64_t(parts - 1) * p.columns);  // of the last part
  // A row's loads: its parts in order, then again those that a second pass does not find any more.
  const int loads = parts > p.stages ? 2 * parts - p.stages : parts;
  char* const tiles = shared + layout.tiles + team * p.stages * layout.tile_bytes;
  const Layer* const layers = reinterpret_cast<const Layer*>(shared + layout.layers);
  Queued* const queue = reinterpret_cast<Queued*>(shared + layout.queue) + 4 * team;
  double* const sums_of_warp = reinterpret_cast<double*>(shared + RowLayout::kTotals) + warp * 2 * row_sums(p.ms);
  double* totals = sums_of_warp;  // where a row's sums are added
  Arrival* const arrivals = reinterpret_cast<Arrival*>(shared + layout.arrivals) + team * p.stages;
  const float* const coef = reinterpret_cast<const float*>(shared + layout.coef);
  float scale = 0;
  bool with_scores = false, through_attention = false;  // whether the attention, and a gradient, depends on scores

  int loading = 0, load_at = 0;  // the next load: a row of the queue, and which of its loads
  int64_t next_row = block_index() + int64_t(grid_size()) * team;  // of the assigned ones
  const char* next_from = nullptr;  // of the next row to load: the layer that this lane copies first

  __device__ void sync_team() const {
    if (p.team == 1)
      sync_warp();
    else
      sync_warps(1 + team, members);
  }

  // Begins to load, before anything else is known.
  __device__ void start() {
    for (int k = lane; k < 2 * row_sums(p.ms); k += kWarpSize) sums_of_warp[k] = 0;
    prepare_row();
    sync_team();
    for (int k = 0; k < p.stages; ++k) issue_load();
  }

  // take_row(row, load) for every row; load is the number of the row's first load, since the start.
  template <class TakeRow>
  __device__ void run(const Constants& constants, TakeRow take_row) {
    scale = float(constants.scale);
    with_scores = constants.scale != 0 || p.scale_grad;
    through_attention = (p.student_grad || p.scale_grad) && !p.detach && with_scores;
    for (int row = 0;; ++row) {
      sync_warp();
      const Queued& current = queue[row % 4];
      if (current.r < 0) break;
      const bool dealt = current.r >= p.fixed_rows;
      totals = sums_of_warp + (dealt ? row_sums(p.ms) : 0);
      take_row(current, row * loads);
      complete(current);
      if (dealt) keep_sums(current.r);
    }
    wait_stores();
  }

  // A dealt row's sums have places of their own, since nobody knows beforehand who takes it.
  __device__ void keep_sums(int64_t r) const {
    sync_team();
    for (int k = not_before(lane); member == 0 && k < wanted_sums(p); k += kWarpSize) {
      double sum = 0;
      for (int of = 0; of < p.team; ++of) {
        double& of_member = totals[of * 2 * row_sums(p.ms) + place_of_sum(p, k)];
        sum += of_member;
        of_member = 0;
      }
      p.dealt_sums[k * p.dealt_count + r - p.fixed_rows] = sum;
    }
    sync_team();
  }

  // ---- Loads -----------------------------------------------------------------------------------------

  // Finds the next row of weight other than 0, while the load before it is under way. Rows before it get zeros. The
  // first p.fixed_rows rows are assigned; the others are dealt out, to who comes first.
  __device__ void prepare_row() {
    if (member != 0) return;
    Row row{};
    int64_t r = -1;
    while (row.mu == 0) {
      r = next_row;
      if (r < p.fixed_rows) {
        next_row += int64_t(grid_size()) * not_before(teams);
      } else {
        unsigned dealt = 0;
        if (lane == 0 && p.fixed_rows < p.weights.rows) dealt = take_number(p.ticket + 1);
        r = p.fixed_rows + shuffle(dealt, 0);
      }
      if (r >= p.weights.rows) {
        r = -1;
        break;
      }
      row = find_row(p.weights, r);
      if (row.mu == 0) skip(r);
    }
    if (lane == 0) queue[loading % 4] = {r, row.position, row.mu};
    if (r >= 0 && lane < p.ms + p.ns) next_from = row_of(layers[lane], row.position);
    sync_warp();
  }

  __device__ int part_of(int load) const { return load < parts ? load : 2 * parts - p.stages - 1 - load; }
  __device__ int columns_of(int part) const { return part + 1 == parts ? last_columns : p.columns; }
  __device__ int64_t offset_of(int part) const { return int64_t(part) * p.columns * kElement; }  // in a layer's row
  // There are one or two stages.
  __device__ int stage_of(int load) const { return load & (p.stages - 1); }
  __device__ char* tile_of(int load) const { return tiles + stage_of(load) * layout.tile_bytes; }

  // Starts the team's next load, into a tile that the whole team has done with.
  __device__ void issue_load() {
    const Queued& row = queue[loading % 4];
    if (row.r >= 0) {
      const int load = loading * loads + load_at, part = part_of(load_at), bytes = columns_of(part) * kElement;
      const int64_t offset = offset_of(part);
      char* const tile = tile_of(load);
      if (!bulk_copies()) {
        for (int q = member; q < p.ms + p.ns; q += p.team) {
          const char* from = row_of(layers[q], row.position) + offset;
#pragma unroll 4
          for (int at = 16 * lane; at < bytes; at += 16 * kWarpSize) copy16_async(tile + q * pitch + at, from + at);
        }
      } else if (member == 0) {
        Arrival* const arrival = arrivals + stage_of(load);
        if (lane == 0) expect_bytes(arrival, bytes * (p.ms + p.ns));
#pragma unroll 1
        for (int q = lane; q < p.ms + p.ns; q += kWarpSize) {
          const char* const from = (q == lane ? next_from : row_of(layers[q], row.position)) + offset;
          if (q >= p.ms) copy_bulk(tile + q * pitch, from, bytes, arrival);
          if (q < p.ms) {
            wait_stores();  // of this lane, from the row that it now overwrites
            copy_bulk(tile + q * pitch, from, bytes, arrival);
          }
        }
      }
    }
    if (!bulk_copies()) commit_copies();  // one group per load, an empty one behind the last row
    if (++load_at < loads || row.r < 0) return;
    load_at = 0;
    ++loading;
    prepare_row();
  }

  // Waits until load number `load` has arrived for the whole team.
  __device__ void wait_for_load(int load) {
    if (bulk_copies()) return wait_arrival(arrivals + stage_of(load), load >> (p.stages - 1) & 1);
    if (loading * loads + load_at - load > 1)
      wait_copies<1>();
    else
      wait_copies<0>();
    sync_team();
  }

  // This warp has done with the oldest load: once the whole team has, the next one goes to its place.
  __device__ void release_load() {
    if (bulk_copies()) fence_copies();  // behind what was written there
    sync_team();
    issue_load();
  }

  // ---- Gradients -------------------------------------------------------------------------------------

  __device__ float weight_of(const Group& g, int student, const Queued& row) const {  // 2w
    return coef[g.first + min(student, g.m - 1)] * float(row.mu);
  }

  // Where a part of a student layer's gradient goes
  __device__ char* gradient_of(int slot, const Queued& row, int part) const {
    return layers[slot].grad + row.position * p.weights.D * kElement + offset_of(part);
  }

  // Writes one part of the gradients, which lie over the students in the tile of `load`, and starts the next load into
  // it.
  __device__ void give_back(const Queued& row, int load, int part) {
    if (!p.student_grad) return release_load();
    if (bulk_copies()) fence_copies();
    sync_team();
    const char* const tile = tile_of(load);
    const int bytes = columns_of(part) * kElement;
    if (bulk_copies()) {
#pragma unroll 1
      for (int i = lane; i < p.ms && member == 0; i += kWarpSize)
        if (layers[i].grad != nullptr) store_bulk(gradient_of(i, row, part), tile + i * pitch, bytes);
    } else {
      for (int i = 0; i < p.ms; ++i) {
        if (layers[i].grad == nullptr) continue;
        char* const to = gradient_of(i, row, part);
        for (int k = 16 * thread; k < bytes; k += 16 * members) store16_streaming(to + k, load16(tile + i * pitch + k));
      }
      sync_team();
    }
    issue_load();
  }

  // ---- Zeros -----------------------------------------------------------------------------------------

  __device__ void complete(const Queued& row) {
    if (p.ms == p.m && p.weights.pooling == Pooling::token) return;
    const int64_t seq = not_before(p.weights.seq), bytes = kElement * not_before(p.weights.D);
#pragma unroll 1
    for (int i = 0; i < p.m; ++i) {
      char* grad = p.layers[i].grad;
      const bool active = i < p.ms;
      if (p.attention != nullptr && !active && member == 0)
        for (int k = not_before(lane); k < p.n; k += kWarpSize) attention_row<float>(p, i, row.r)[k] = 0;
      if (grad == nullptr || (active && p.weights.pooling == Pooling::token)) continue;
      zero_all_but(grad + row.r * seq * bytes, seq, active ? row.position - row.r * seq : seq, bytes, thread, members);
    }
  }

  // By the team's first warp
  __device__ void skip(int64_t r) {
    const int64_t bytes = not_before(p.weights.seq) * p.weights.D * kElement;
#pragma unroll 1
    for (int i = 0; i < p.m; ++i) {
      if (p.layers[i].grad != nullptr) zero_bytes(p.layers[i].grad + r * bytes, bytes, lane, kWarpSize);
      if (p.attention != nullptr)
        for (int k = not_before(lane); k < p.n; k += kWarpSize) attention_row<float>(p, i, r)[k] = 0;
    }
    if (r < p.fixed_rows) return;
    for (int k = not_before(lane); k < wanted_sums(p); k += kWarpSize)
      p.dealt_sums[k * p.dealt_count + r - p.fixed_rows] = 0;
  }
};

// A kernel's body around its rows: what does not change, the rows themselves, and the sums over all blocks.
template <class Kernel, class P>
__device__ void run_rows(const P& p, const RowLayout& layout, char* shared) {
  for (int q = thread_index(); q < p.ms + p.ns; q += block_size())
    reinterpret_cast<Layer*>(shared + layout.layers)[q] = p.layers[q < p.ms ? q : p.m + q - p.ms];
  const int warps = block_size() / kWarpSize;
  if (bulk_copies())
    for (int k = thread_index(); k < warps / p.team * p.stages; k += block_size())
      start_arrival(reinterpret_cast<Arrival*>(shared + layout.arrivals) + k);
  sync_block();
  Kernel kernel{{p, layout, shared}};
  kernel.start();
  // The teams' scratch memory is not in use yet.
  double* const sums = reinterpret_cast<double*>(shared + layout.scratch);
  const Constants constants = find_constants(p, sums);
  Constants* const kept = reinterpret_cast<Constants*>(shared + RowLayout::kConstants);
  if (thread_index() == 0) *kept = constants;
  for (int q = thread_index(); q < p.ms; q += block_size())
    reinterpret_cast<float*>(shared + layout.coef)[q] = float(constants.unit * p.omega[q]);
  sync_block();
  kernel.run(constants);
  sync_block();
  const double* totals = reinterpret_cast<const double*>(shared + RowLayout::kTotals);
  double* partial = p.partials + int64_t(block_index()) * (2 * p.m + 1);
  for (int k = thread_index(); k < 2 * p.m + 1; k += block_size()) {
    const int slot = k == 2 * p.m ? 2 * p.ms : k % p.m < p.ms ? k / p.m * p.ms + k % p.m : -1;
    double sum = 0;
    for (int w = 0; w < warps && slot >= 0; ++w) sum += totals[w * 2 * row_sums(p.ms) + slot];
    partial[k] = sum;
  }
  sync_block();
  const bool last = thread_index() == 0 && takes_last_ticket(p);
  finish<float, 16>(p, *kept, reinterpret_cast<double*>(shared + RowLayout::kTotals), last);
}

}  // namespace alp::cuda
