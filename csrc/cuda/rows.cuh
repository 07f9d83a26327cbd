// Rows and their weights, as both kernels need them: where a row lies, what it weighs, and N.
#pragma once

#include "device.cuh"
#include "problem.h"

namespace alp::cuda {

constexpr int kWarpSize = 32;

// Over the warp, or over each kLanes neighbours in it.
template <int kLanes = kWarpSize, class T>
ALP_DEVICE T warp_sum(T value) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
template <int kLanes = kWarpSize, class T>
ALP_DEVICE T warp_max(T value) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    const T other = shuffle_xor(value, mask);
    value = other > value ? other : value;
  }
  return value;
}

// Element at of a tensor of any real dtype.
ALP_DEVICE double real_value(const void* data, WeightType type, int64_t at) {
  switch (type) {
    case WeightType::none: return 1;
    case WeightType::boolean: return static_cast<const uint8_t*>(data)[at] != 0;
    case WeightType::u8: return static_cast<const uint8_t*>(data)[at];
    case WeightType::i8: return static_cast<const int8_t*>(data)[at];
    case WeightType::i16: return static_cast<const int16_t*>(data)[at];
    case WeightType::i32: return static_cast<const int32_t*>(data)[at];
    case WeightType::i64: return double(static_cast<const int64_t*>(data)[at]);
    case WeightType::f16: return fp16_to_float(static_cast<const uint16_t*>(data)[at]);
    case WeightType::bf16: return bf16_to_float(static_cast<const uint16_t*>(data)[at]);
    case WeightType::f32: return static_cast<const float*>(data)[at];
    case WeightType::f64: return static_cast<const double*>(data)[at];
  }
  return 1;
}

// Weights of 0 and less count as 0; NaN stays NaN.
ALP_DEVICE double position_weight(const Weights& w, int64_t position) {
  if (w.data == nullptr) [[likely]]
    return 1;
  const double weight = real_value(w.data, w.type, position);
  return weight <= 0 ? 0 : weight;
}

struct Row {
  double mu;          // the row's weight
  double mean_total;  // of "mean": the sum of the weights over its positions
  int64_t position;   // among the (*lead) rows; the first one of "mean"
};

// For a whole warp: every lane gets the row.
ALP_DEVICE Row find_row(const Weights& w, int64_t r) {
  const int64_t first = r * w.seq;
  if (w.pooling == Pooling::token || w.pooling == Pooling::cls) return {position_weight(w, first), 0, first};
  const int lane = not_before(thread_index() % kWarpSize);
  if (w.pooling == Pooling::last) {
    int64_t last = -1;
#pragma unroll 1
    for (int64_t k = lane; k < w.seq; k += kWarpSize)
      if (position_weight(w, first + k) != 0) last = k;
    last = warp_max(last);
    return {last < 0 ? 0.0 : 1.0, 0, first + (last < 0 ? 0 : last)};
  }
  double total = 0;
#pragma unroll 1
  for (int64_t k = lane; k < w.seq; k += kWarpSize) total += position_weight(w, first + k);
  total = warp_sum(total);
  return {total != 0 ? 1.0 : 0.0, total, first};
}

struct WeightSums {
  double total, largest;
};
ALP_DEVICE void add_weight(WeightSums& sums, double weight) {
  sums.total += weight;
  if (!(weight <= sums.largest)) sums.largest = weight;  // NaN too
}
ALP_DEVICE WeightSums warp_combine(WeightSums sums) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const double total = shuffle_xor(sums.total, mask), largest = shuffle_xor(sums.largest, mask);
    sums.total += total;
    if (!(largest <= sums.largest)) sums.largest = largest;
  }
  return sums;
}

// Sum and maximum over rows part, part + parts, … by the whole block; shared: 2 doubles per warp.
ALP_DEVICE WeightSums block_weight_sums(const Weights& w, int part, int parts, double* shared) {
  if (w.data == nullptr) return {double(w.rows), 1};
  const int warps = block_size() / kWarpSize, warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  WeightSums sums{0, 0};
  if (w.sums != nullptr) {
    for (int k = thread_index(); k < w.parts; k += block_size()) {
      sums.total += w.sums[2 * k];
      if (!(w.sums[2 * k + 1] <= sums.largest)) sums.largest = w.sums[2 * k + 1];
    }
  } else if (w.pooling == Pooling::token || w.pooling == Pooling::cls) {
    for (int64_t r = int64_t(part) * block_size() + thread_index(); r < w.rows; r += int64_t(parts) * block_size())
      add_weight(sums, position_weight(w, r * w.seq));
  } else {
    for (int64_t r = int64_t(part) * warps + warp; r < w.rows; r += int64_t(parts) * warps) {
      const double mu = find_row(w, r).mu;
      if (lane == 0) add_weight(sums, mu);
    }
  }
  sums = warp_combine(sums);
  sync_block();
  if (lane == 0) {
    shared[2 * warp] = sums.total;
    shared[2 * warp + 1] = sums.largest;
  }
  sync_block();
  sums = {0, 0};
  for (int k = 0; k < warps; ++k) {
    sums.total += shared[2 * k];
    if (!(shared[2 * k + 1] <= sums.largest)) sums.largest = shared[2 * k + 1];
  }
  sync_block();
  return sums;
}

// What does not change from row to row.
struct Constants {
  double scale;
  double inverse;  // 1 / N of the loss
  double total;    // Σμ
  double factor;   // left out of stored gradients, for grad_factor
  double unit;     // 2w = unit ω_i μ_r, as stored
};

template <class P>
ALP_DEVICE Constants find_constants(const P& p, double* shared) {
  const WeightSums sums = block_weight_sums(p.weights, 0, 1, shared);
  Constants c;
  c.scale = p.scale_tensor != nullptr ? real_value(p.scale_tensor, p.scale_type, 0) : p.scale;
  c.total = sums.total;
  double count = p.weights.normalizer;
  if (p.weights.normalizer_tensor != nullptr)
    count = real_value(p.weights.normalizer_tensor, p.weights.normalizer_type, 0);
  else if (count == 0)
    count = sums.total;
  const double N = p.weights.mean ? double(p.weights.m) * double(p.weights.D) * count : 1;
  c.inverse = 1 / N;
  const double share = sums.total == 0 || N == 0 ? 0 : 2 * c.inverse;  // NaN goes on
  c.factor = 1;
  c.unit = share;
  if (p.store_fp16) {
    const double largest = p.largest_omega * sums.largest;
    c.factor = share * largest;
    c.unit = largest == 0 || share == 0 ? 0 : 1 / largest;
  }
  return c;
}

ALP_DEVICE const char* row_of(const Layer& layer, int64_t r) {
  if (layer.inner == 0) return layer.data + r * layer.inner_stride;
  return layer.data + (r / layer.inner) * layer.outer_stride + (r % layer.inner) * layer.inner_stride;
}

// Zeros at any alignment, by the threads lane, lane + lanes, …
ALP_DEVICE void zero_bytes(char* at, int64_t bytes, int lane, int lanes) {
  lane = not_before(lane);
  bytes = not_before(bytes);
  if ((reinterpret_cast<uintptr_t>(at) | uintptr_t(bytes)) % 16 == 0) {
#pragma unroll 1
    for (int64_t k = lane; k < bytes / 16; k += lanes) store16_streaming(at + 16 * k, {0, 0, 0, 0});
  } else {
#pragma unroll 1
    for (int64_t k = lane; k < bytes / 2; k += lanes) reinterpret_cast<uint16_t*>(at)[k] = 0;
  }
}

// Zeros over the rows of a sequence but the one at `kept`, or over all where kept is seq.
ALP_DEVICE void zero_all_but(char* sequence, int64_t seq, int64_t kept, int64_t bytes, int lane, int lanes) {
  zero_bytes(sequence, kept * bytes, lane, lanes);
  if (kept < seq) zero_bytes(sequence + (kept + 1) * bytes, (seq - kept - 1) * bytes, lane, lanes);
}

// Where return_details shows the attention of a student layer in row r: (n)
template <class A, class P>
ALP_DEVICE A* attention_row(const P& p, int slot, int64_t r) {
  return static_cast<A*>(p.attention) + (int64_t(p.original[slot]) * p.weights.rows + r) * p.n;
}

// A row's sums are ms losses, ms entropies and the scale's gradient: how many there are, how many are wanted, and where
// a wanted one stands.
ALP_HOST_DEVICE constexpr int row_sums(int ms) { return 2 * ms + 1; }
template <class P>
ALP_HOST_DEVICE int wanted_sums(const P& p) {
  return (p.entropy != nullptr ? 2 : 1) * p.ms + (p.scale_grad ? 1 : 0);
}
// Sums that each dealt row has a place for
template <class P>
ALP_HOST_DEVICE int dealt_places(const P& p) {
  return wanted_sums(p) + (p.scale_grad ? p.scale_sums - 1 : 0);
}
template <class P>
ALP_DEVICE int place_of_sum(const P& p, int k) {
  return k < (p.entropy != nullptr ? 2 : 1) * p.ms ? k : 2 * p.ms;
}

// This lane's share of the sum of count doubles by a warp; kAtATime loads are under way at a time.
template <int kAtATime>
ALP_DEVICE double lane_sum_of(const double* from, int64_t count, int64_t stride) {
  double sum = 0;
  from += thread_index() % kWarpSize * stride;
#pragma unroll 1
  for (int64_t left = count - thread_index() % kWarpSize; left > 0; left -= kAtATime * kWarpSize) {
    double part[kAtATime];
#pragma unroll
    for (int k = 0; k < kAtATime; ++k, from += kWarpSize * stride)
      part[k] = k * kWarpSize < left ? load_uncached(from) : 0;
#pragma unroll
    for (int k = 0; k < kAtATime; ++k) sum += part[k];
  }
  return sum;
}

// Whether every other block has taken its ticket before. A block takes one, behind its sums.
template <class P>
ALP_DEVICE bool takes_last_ticket(const P& p) {
  return take_ticket(p.ticket, unsigned(grid_size())) == unsigned(grid_size()) - 1;
}

// Adds up the partial sums of all blocks and of all dealt rows, in the block of which one thread took the last ticket.
// shared: 2ms + 1 doubles, twice for each warp where rows are dealt. Sums are in a fixed order.
template <class A, int kAtATime, class P>
ALP_DEVICE void finish(const P& p, const Constants& c, double* shared, bool last) {
  if (!any_in_block(last)) return;
  if (thread_index() == 0) p.ticket[1] = 0;
  const int warps = block_size() / kWarpSize, warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  // Each sum goes over the blocks, by one warp, and over the dealt rows, by as many as there are.
  const int sums = wanted_sums(p), pitch = row_sums(p.ms), shares = p.dealt_count == 0 ? 1 : max(1, warps / sums);
#pragma unroll 1
  for (int k = warp; k < sums * shares; k += warps) {
    const int share = k / sums, which = k - share * sums, place = place_of_sum(p, which);
    double sum = 0;
    if (share == 0 && p.fixed_rows > 0) {
      const int of_block = place < p.ms ? place : place < 2 * p.ms ? p.m + place - p.ms : 2 * p.m;
      sum = lane_sum_of<kAtATime>(p.partials + of_block, grid_size(), 2 * p.m + 1);
    }
    const int64_t count = p.dealt_count * (place == 2 * p.ms ? p.scale_sums : 1);
    const int64_t part = shares == 1 ? count : (count + shares - 1) / shares, begin = min(count, share * part);
    sum += lane_sum_of<kAtATime>(p.dealt_sums + which * p.dealt_count + begin, min(part, count - begin), 1);
    sum = warp_sum(sum);
    if (lane == 0) shared[share * pitch + place] = sum;
  }
  sync_block();
  if (warp != 0) return;
  auto total = [&](int place) {
    double sum = shared[place];
    for (int share = 1; share < shares; ++share) sum += shared[share * pitch + place];
    return sum;
  };
  double loss = 0;
#pragma unroll 1
  for (int i = lane; i < p.m; i += kWarpSize) {
    const bool counts = i < p.ms && c.total != 0;
    const double share = counts ? p.omega[i] * total(i) * c.inverse : 0;
    loss += share;
    static_cast<A*>(p.layer_losses)[p.original[i]] = A(share);
    if (p.entropy != nullptr) static_cast<A*>(p.entropy)[p.original[i]] = A(counts ? total(p.ms + i) / c.total : 0);
  }
  loss = warp_sum(loss);
  if (lane != 0) return;
  *static_cast<A*>(p.loss) = A(loss);
  *static_cast<A*>(p.grad_factor) = A(c.factor);
  *static_cast<A*>(p.d_scale) = A(p.scale_grad ? total(2 * p.ms) * c.factor : 0);
}

}  // namespace alp::cuda
