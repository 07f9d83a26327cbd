// Sums of the row weights for problems so long that every block adding all of them up would cost.
#pragma once

#include "rows.cuh"

namespace alp::cuda {

constexpr int kWeightThreads = 256, kWeightParts = 64;

__global__ void __launch_bounds__(kWeightThreads) alp_row_weights(const __grid_constant__ Weights w, double* sums) {
  ALP_DYNAMIC_SHARED(shared);
  const WeightSums part = block_weight_sums(w, block_index(), grid_size(), reinterpret_cast<double*>(shared));
  if (thread_index() != 0) return;
  sums[2 * block_index()] = part.total;
  sums[2 * block_index() + 1] = part.largest;
}

}  // namespace alp::cuda
