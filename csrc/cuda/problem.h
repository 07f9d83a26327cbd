// What the host hands to the kernels, by value: plain data. The active layers of each side come first
// ("slots"); student slots that attend to the same teacher slots lie side by side and form a group.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../layers.h"

namespace alp::cuda {

// A dense block of the attention: slots first … first + m, teacher slots index[teachers …] n of them.
struct Group {
  uint16_t first, m, teachers, n;
};

struct Weights {
  const void* data;  // (*lead), contiguous; null = 1 everywhere
  WeightType type;
  Pooling pooling;
  int64_t rows, seq;  // pooled rows; positions per row, 1 for token
  int64_t D;
  int m;
  const double* sums;  // parts × (sum, maximum) of the pooled rows' weights, or null: the kernel adds them up
  int parts;
  // N = 1 for reduction "sum", else m D normalizer, or m D Σμ where that is 0
  bool mean;
  const void* normalizer_tensor;
  WeightType normalizer_type;
  double normalizer;
};

template <int kLayers, int kGroups, int kIndices>
struct Problem {
  static constexpr int kMaxLayers = kLayers, kMaxGroups = kGroups, kMaxIndices = kIndices;
  Weights weights;
  int m, n;    // layers
  int ms, ns;  // active layers (slots)
  int group_count;
  Dtype student_dtype, teacher_dtype;
  bool normalize, detach, student_grad, teacher_grad, scale_grad;
  bool store_fp16;  // gradients are stored without 2/N, which goes to grad_factor
  double scale;
  const void* scale_tensor;
  WeightType scale_type;
  double largest_omega;

  // outputs, in the compute dtype
  void *loss, *layer_losses, *attention, *entropy, *grad_factor, *d_scale;  // attention, entropy: null without details

  double* partials;  // (grid, 2m + 1): Σμ|e|² and Σμ·entropy of each slot, the scale's gradient
  unsigned* ticket;  // how many blocks have finished, how many rows were dealt; 0 before and after
  // Rows from fixed_rows on are dealt out as the kernels of whole rows go, or have blocks of their own: their sums are
  // (wanted, dealt_count), the scale's gradient scale_sums times
  int64_t fixed_rows, dealt_count;
  int scale_sums;
  double* dealt_sums;
  char* scratch;  // (grid, scratch_bytes) for what shared memory does not hold, or null
  int64_t scratch_bytes;
  int columns, parts;    // of a row that shared memory holds at a time, and how many times
  int team, stages;      // of whole rows: warps that share one, and parts of rows in shared memory at a time
  int pairs_m, pairs_n;  // layers of the largest group; vector kernel: padded to whole tiles

  Layer layers[kLayers];       // m student layers, then n teacher layers, active ones first
  double omega[kLayers];       // of student slots
  uint16_t original[kLayers];  // index of the layer as the caller counts, per side
  Group groups[kGroups];
  uint16_t index[kIndices];
};
// Kernel parameters may take 32764 bytes; the small ones keep the launch of a usual problem short.
using SmallProblem = Problem<48, 12, 160>;
using LargeProblem = Problem<256, 128, 8320>;
static_assert(sizeof(SmallProblem) <= 4096 && sizeof(LargeProblem) <= 32764);

}  // namespace alp::cuda
