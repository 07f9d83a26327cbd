// Rows on their way through a multiprocessor, for the kernels that hold whole rows in shared memory.
//
// A team of warps takes one row after the other: its n teacher and m student layers lie side by side in a tile of
// shared memory, brought there in the background. Teams are independent of each other, so while one computes the
// others' copies are under way. Where a row does not fit, it is taken in parts of its columns; those that are gone
// before a second pass are read again, from the L2 cache. Gradients are written over the student layers and from
// there to memory.
//
// From sm_90 on one thread copies a whole layer at a time, and the tile's arrival is counted by a barrier in shared
// memory; before, every thread copies 16 bytes at a time.
#pragma once

#include "rows.cuh"

namespace alp::cuda {

struct RowLayout {
  int64_t coef, layers, queue, totals, arrivals, scratch, tiles;  // offsets in shared memory
  int64_t scratch_bytes, tile_bytes;                              // of a team; of one part of a row
  int64_t bytes;

  // warps in the block, teams of `team` warps; columns of `element` bytes in a part
  __host__ __device__ RowLayout(int ms, int ns, int columns, int element, int warps, int team, int stages,
                                int64_t scratch_of_team) {
    const int teams = warps / team;
    auto round = [](int64_t count) { return (count + 127) / 128 * 128; };
    scratch_bytes = round(scratch_of_team);
    tile_bytes = int64_t(ms + ns) * (element * columns + 16);
    coef = 0;                                                    // float [ms]
    layers = round(4 * ms);                                      // Layer [ms + ns]
    queue = layers + round(int64_t(sizeof(Layer)) * (ms + ns));  // Queued [warps][4]
    totals = queue + warps * 4 * 24;                             // double [warps][2ms + 1]
    arrivals = totals + 8 * int64_t(warps) * (2 * ms + 1);       // Arrival [teams][stages]
    scratch = round(arrivals + 8 * int64_t(teams) * stages);
    tiles = round(scratch + teams * scratch_bytes);
    bytes = tiles + teams * stages * tile_bytes;
  }
};

// A row on its way through the team.
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
  const int parts = int((p.weights.D + p.columns - 1) / p.columns), pitch = kElement * p.columns + 16;
  // A row's loads: its parts in order, then again those that a second pass does not find any more.
  const int loads = parts > p.stages ? 2 * parts - p.stages : parts;
  char* const tiles = shared + layout.tiles + team * p.stages * layout.tile_bytes;
  const Layer* const layers = reinterpret_cast<const Layer*>(shared + layout.layers);
  Queued* const queue = reinterpret_cast<Queued*>(shared + layout.queue) + 4 * warp;
  double* const totals = reinterpret_cast<double*>(shared + layout.totals) + warp * (2 * p.ms + 1);
  Arrival* const arrivals = reinterpret_cast<Arrival*>(shared + layout.arrivals) + team * p.stages;
  const float* const coef = reinterpret_cast<const float*>(shared + layout.coef);
  float scale = 0;
  bool with_scores = false, through_attention = false;  // whether the attention, and a gradient, depends on scores

  int issued = 0;       // loads, since the start
  int load_at = 0;      // which of a row's loads is next
  unsigned queued = 0;  // rows that loads have reached
  bool more = false;    // rows are left to load
  int64_t next_row = block_index() + int64_t(grid_size()) * team, next_position = 0;
  const char* next_from = nullptr;  // of the next row to load: the layer that this lane copies first

  __device__ void sync_team() {
    if (p.team == 1)
      sync_warp();
    else
      sync_warps(1 + team, members);
  }

  // Begins to load, before anything else is known.
  __device__ void start() {
    for (int k = lane; k < 2 * p.ms + 1; k += kWarpSize) totals[k] = 0;
    prepare_row();
    for (int k = 0; k < p.stages; ++k) issue_load();
  }

  // take_row(row, load) for every row; load is the number of the row's first load.
  template <class TakeRow>
  __device__ void run(const Constants& constants, TakeRow take_row) {
    scale = float(constants.scale);
    with_scores = constants.scale != 0 || p.scale_grad;
    through_attention = (p.student_grad || p.scale_grad) && !p.detach && with_scores;
    int consumed = 0;  // loads of the rows before
    for (unsigned row = 0; row != queued; ++row) {
      sync_warp();
      const Queued current = queue[row % 4];
      take_row(current, consumed);
      complete(current);
      consumed += loads;
    }
    wait_stores();
  }

  // ---- Loads -----------------------------------------------------------------------------------------

  // Finds the next row of weight other than 0, for the load after the current one: while that is under way. Rows
  // before it get zeros.
  __device__ void prepare_row() {
    const int64_t step = int64_t(grid_size()) * teams;
    more = false;
    for (; next_row < p.weights.rows && !more; next_row += step) {
      const Row row = find_row(p.weights, next_row);
      more = row.mu != 0;
      if (!more) {
        skip(next_row);
        continue;
      }
      if (lane == 0) queue[queued % 4] = {next_row, row.position, row.mu};
      next_position = row.position;
      if (lane < p.ms + p.ns) next_from = row_of(layers[lane], row.position);
    }
  }

  __device__ int part_of(int load) const { return load < parts ? load : 2 * parts - p.stages - 1 - load; }
  __device__ int columns_of(int part) const {
    const int64_t left = p.weights.D - int64_t(part) * p.columns;
    return left < p.columns ? int(left) : p.columns;
  }
  __device__ char* tile_of(int load) const { return tiles + load % p.stages * layout.tile_bytes; }

  // Starts the team's next load, into a tile that the whole team has done with.
  __device__ void issue_load() {
    if (more) {
      if (load_at == 0) ++queued;
      const int part = part_of(load_at), bytes = columns_of(part) * kElement;
      const int64_t offset = int64_t(part) * p.columns * kElement;
      char* const tile = tile_of(issued);
      if (!bulk_copies()) {
        for (int q = member; q < p.ms + p.ns; q += p.team) {
          const char* from = row_of(layers[q], next_position) + offset;
#pragma unroll 4
          for (int at = 16 * lane; at < bytes; at += 16 * kWarpSize) copy16_async(tile + q * pitch + at, from + at);
        }
      } else if (member == 0) {
        Arrival* const arrival = arrivals + issued % p.stages;
        if (lane == 0) expect_bytes(arrival, bytes * (p.ms + p.ns));
#pragma unroll 1
        for (int q = lane; q < p.ms + p.ns; q += kWarpSize) {
          const char* const from = (q == lane ? next_from : row_of(layers[q], next_position)) + offset;
          if (q >= p.ms) copy_bulk(tile + q * pitch, from, bytes, arrival);
          if (q < p.ms) {
            wait_stores();  // of this lane, from the row that it now overwrites
            copy_bulk(tile + q * pitch, from, bytes, arrival);
          }
        }
      }
    }
    if (!bulk_copies()) commit_copies();  // one group per load, an empty one behind the last row
    ++issued;
    if (!more || ++load_at < loads) return;
    load_at = 0;
    prepare_row();
  }

  // Waits until load number `load` has arrived for the whole team.
  __device__ void wait_for_load(int load) {
    if (bulk_copies()) return wait_arrival(arrivals + load % p.stages, load / p.stages % 2);
    if (issued - load > 1)
      wait_copies<1>();
    else
      wait_copies<0>();
    sync_team();
  }

  // ---- Gradients -------------------------------------------------------------------------------------

  __device__ float weight_of(const Group& g, int student, const Queued& row) const {  // 2w
    return coef[g.first + min(student, g.m - 1)] * float(row.mu);
  }

  // Writes one part of the gradients, which lie over the students in the tile of `load`, and starts the next load
  // into it.
  __device__ void give_back(const Queued& row, int load, int part) {
    if (bulk_copies()) fence_copies();
    sync_team();
    if (p.student_grad) {
      const char* const tile = tile_of(load);
      const int bytes = columns_of(part) * kElement;
      const int64_t at = row.position * p.weights.D * kElement + int64_t(part) * p.columns * kElement;
      if (bulk_copies()) {
        if (member == 0)
#pragma unroll 1
          for (int i = lane; i < p.ms; i += kWarpSize)
            if (layers[i].grad != nullptr) store_bulk(layers[i].grad + at, tile + i * pitch, bytes);
      } else {
        for (int i = 0; i < p.ms; ++i) {
          if (layers[i].grad == nullptr) continue;
          for (int k = 16 * thread; k < bytes; k += 16 * members)
            store16_streaming(layers[i].grad + at + k, load16(tile + i * pitch + k));
        }
        sync_team();
      }
    }
    issue_load();
  }

  __device__ float* attention_row(int slot, int64_t r) const {
    return static_cast<float*>(p.attention) + (int64_t(p.original[slot]) * p.weights.rows + r) * p.n;
  }

  // ---- Zeros -----------------------------------------------------------------------------------------

  __device__ void complete(const Queued& row) {
    const int64_t seq = p.weights.seq, bytes = kElement * p.weights.D;
    if (p.ms == p.m && p.weights.pooling == Pooling::token) return;
#pragma unroll 1
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
    const int64_t bytes = p.weights.seq * p.weights.D * kElement;
#pragma unroll 1
    for (int i = 0; i < p.m; ++i) {
      if (p.layers[i].grad != nullptr) zero_bytes(p.layers[i].grad + r * bytes, bytes, thread, members);
      if (p.attention != nullptr && member == 0)
        for (int k = lane; k < p.n; k += kWarpSize) attention_row(i, r)[k] = 0;
    }
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
  for (int q = thread_index(); q < p.ms; q += block_size())
    reinterpret_cast<float*>(shared + layout.coef)[q] = float(constants.unit * p.omega[q]);
  sync_block();
  kernel.run(constants);
  sync_block();
  const double* totals = reinterpret_cast<const double*>(shared + layout.totals);
  double* partial = p.partials + int64_t(block_index()) * (2 * p.m + 1);
  for (int k = thread_index(); k < 2 * p.m + 1; k += block_size()) {
    const int slot = k == 2 * p.m ? 2 * p.ms : k % p.m < p.ms ? k / p.m * p.ms + k % p.m : -1;
    double sum = 0;
    for (int w = 0; w < warps && slot >= 0; ++w) sum += totals[w * (2 * p.ms + 1) + slot];
    partial[k] = sum;
  }
  sync_block();
  finish<float>(p, constants, reinterpret_cast<double*>(shared + layout.totals));
}

}  // namespace alp::cuda
