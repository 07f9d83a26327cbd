// The kernel for few rows, as [CLS] rows are. What they take is not bytes but waiting: for the launch, for code and
// parameters that no cache holds, for the rows, at barriers. So a block takes one student layer of one row and all of
// them are under way at a time; the code is short, its loops hardly unrolled; and what is cheap every warp computes for
// itself. The teacher layers are read for each student layer, all but the first time from the cache. There are up to 32
// of them, a lane to each.
//
//   z_j = ⟨s, t_j⟩                       a warp to a teacher layer
//   a_j = softmax_j(τ z_j)               every warp
//   e = s − Σ_j a_j t_j                  four columns to a thread
//   p_j = ⟨e, t_j⟩                       a warp to a teacher layer
//   c_j = a_j (p_j − Σ_k a_k p_k)        every warp
//   ∂s = 2w (e − τ Σ_j c_j t_j)          four columns to a thread
// Products and sums are fp32.
#pragma once

#include "generic_kernel.cuh"

namespace alp::cuda {

constexpr int kFewRowsThreads = 256, kFewRowsWarps = kFewRowsThreads / kWarpSize;

struct FewRowsLayout {
  // Offsets in shared memory. First: double [warps][2][row_sums], for sums over the block
  int constants, products, squares, coefficients, residual, tile;
  int64_t bytes;

  // n teacher layers of D columns of `element` bytes
  __host__ __device__ FewRowsLayout(int ms, int n, int D, int element) {
    constants = 8 * kFewRowsWarps * 2 * row_sums(ms);                // Constants
    products = constants + (int(sizeof(Constants)) + 15) / 16 * 16;  // float [2][32]: z_j, p_j
    squares = products + 4 * 2 * kWarpSize;                          // float [warps]: Σ e²
    coefficients = squares + 4 * kFewRowsWarps;                      // float [warps][32]: a_j, then τ c_j
    residual = coefficients + 4 * kFewRowsWarps * kWarpSize;         // float [D]
    tile = residual + 4 * D;  // [n + 1][D]: the teacher layers, the student layer
    bytes = tile + int64_t(n + 1) * D * element;
  }
};

template <Dtype kType, class P>
struct FewRowsKernel {
  const P& p;
  const FewRowsLayout& layout;
  char* const shared;
  const int i;    // the student layer's slot
  const Group g;  // of the student layers that attend to the same teacher layers
  const int64_t r;
  const Row row;
  const int thread = thread_index(), lane = thread % kWarpSize, warp = thread / kWarpSize, D = int(p.weights.D);
  static constexpr int kElement = int(dtype_size(kType));
  float* const z = reinterpret_cast<float*>(shared + layout.products);
  float* const residual_products = z + kWarpSize;
  float* const squares = reinterpret_cast<float*>(shared + layout.squares);
  float* const coefficients = reinterpret_cast<float*>(shared + layout.coefficients) + warp * kWarpSize;
  char* const residual = shared + layout.residual;

  __device__ char* teacher_row(int j) const { return shared + layout.tile + j * D * kElement; }
  __device__ char* student_row() const { return teacher_row(g.n); }

  // Begins to load, in the background.
  __device__ void start() const {
#pragma unroll 1
    for (int q = warp; q <= g.n; q += kFewRowsWarps) {
      const char* const from = row_of(p.layers[q < g.n ? p.m + p.index[g.teachers + q] : i], row.position);
#pragma unroll 1
      for (int at = 16 * lane; at < D * kElement; at += 16 * kWarpSize) copy16_async(teacher_row(q) + at, from + at);
    }
    commit_copies();
  }

  // Whether this thread took the last ticket of all blocks
  __device__ bool run(const Constants& constants) const {
    const float scale = float(constants.scale), weight = float(constants.unit * p.omega[i]) * float(row.mu);  // τ, 2w
    const bool scores = g.n > 1 && (constants.scale != 0 || p.scale_grad);
    const bool varies = scores && !p.detach && (p.student_grad || p.scale_grad);
    bool last = false;
    float a = 0, c = 0;
    wait_copies<0>();
    sync_block();
    // Two turns of the same code, which takes longer to fetch than to run: for a and e, then for c and the gradient
#pragma unroll 1
    for (int turn = 0; turn < (varies ? 2 : 1); ++turn) {
      const char* const x = turn == 0 ? student_row() : residual;
      const Dtype type = turn == 0 ? kType : Dtype::f32;
      if (scores) {
        multiply(x, type, turn == 0 ? z : residual_products);
        sync_block();
      }
      if (turn == 0) {
        a = attend(scores, scale);
      } else {
        c = differentiate_softmax(a, scale);
        if (warp == kFewRowsWarps - 1) last = add_up(a, c, weight);
      }
      float sum = subtract(x, type, varies && turn == 0, weight);
      if (turn > 0) continue;
      sum = warp_sum(sum);
      if (lane == 0) squares[warp] = sum;
      sync_block();
    }
    if (!varies && warp == kFewRowsWarps - 1) last = add_up(a, c, weight);
    return last;
  }

  // ⟨x, t_j⟩, a warp two teacher layers at a time
  __device__ void multiply(const char* x, Dtype type, float* result) const {
#pragma unroll 1
    for (int j = warp; j < g.n; j += 2 * kFewRowsWarps) {
      const char *const t0 = teacher_row(j), *const t1 = teacher_row(min(j + kFewRowsWarps, g.n - 1));
      float sum0 = 0, sum1 = 0;
#pragma unroll 1
      for (int d = 4 * lane; d < D; d += 4 * kWarpSize) {
        float x_d[4], t0_d[4], t1_d[4];
        load4(x, type, d, x_d);
        load4(t0, kType, d, t0_d);
        load4(t1, kType, d, t1_d);
#pragma unroll
        for (int k = 0; k < 4; ++k) sum0 += x_d[k] * t0_d[k], sum1 += x_d[k] * t1_d[k];
      }
      sum0 = warp_sum(sum0);
      sum1 = warp_sum(sum1);
      if (lane != 0) continue;
      result[j] = sum0;
      if (j + kFewRowsWarps < g.n) result[j + kFewRowsWarps] = sum1;
    }
  }

  // x − Σ_j b_j t_j, kept, or times 2w the gradient; returns the thread's share of its square
  __device__ float subtract(const char* x, Dtype type, bool kept, float weight) const {
    char* const grad = p.layers[i].grad;
    float sum = 0;
#pragma unroll 1
    for (int d = 4 * thread; d < D; d += 4 * kFewRowsThreads) {
      float e[4];
      load4(x, type, d, e);
#pragma unroll 1
      for (int j = 0; j < g.n; j += 4) {  // layers behind the last one repeat it, times 0
        float b[4], t[4][4];
        load4(reinterpret_cast<const char*>(coefficients), Dtype::f32, j, b);
#pragma unroll
        for (int q = 0; q < 4; ++q) load4(teacher_row(min(j + q, g.n - 1)), kType, d, t[q]);
#pragma unroll
        for (int q = 0; q < 4; ++q)
#pragma unroll
          for (int k = 0; k < 4; ++k) e[k] -= b[q] * t[q][k];
      }
      sum += e[0] * e[0] + e[1] * e[1] + (e[2] * e[2] + e[3] * e[3]);
      if (kept) {
        store4(residual, Dtype::f32, d, e);
      } else if (grad != nullptr) {
#pragma unroll
        for (int k = 0; k < 4; ++k) e[k] *= weight;
        store4(grad + row.position * D * kElement, kType, d, e);
      }
    }
    return sum;
  }

  // a_j: lane j's, and all of them in shared memory
  __device__ float attend(bool scores, float scale) const {
    const bool there = lane < g.n;
    float a = 1;
    if (scores) {
      const float score = there ? scale * z[lane] : -INFINITY;
      a = exponential(score - warp_max(score));
    }
    const float total = warp_sum(there ? a : 0.f);
    a = there ? a * reciprocal(total) : 0;
    coefficients[lane] = a;
    sync_warp();
    return a;
  }

  // c_j: lane j's, and τ c_j of all of them over a_j
  __device__ float differentiate_softmax(float a, float scale) const {
    const bool there = lane < g.n;
    const float p_j = there ? residual_products[lane] : 0, mean = warp_sum(a * p_j), c = there ? a * (p_j - mean) : 0;
    coefficients[lane] = scale * c;
    sync_warp();
    return c;
  }

  // The row's sums, and what return_details shows of it, over zeros; by the last warp, which has the fewest columns.
  // The ticket is on its way to memory and back while the others still write the gradient.
  __device__ bool add_up(float a, float c, float weight) const {
    const float loss = warp_sum(lane < kFewRowsWarps ? squares[lane] : 0.f);
    const float along = p.scale_grad ? warp_sum(lane < g.n ? c * z[lane] : 0.f) : 0.f;
    double entropy = 0;
    if (p.attention != nullptr) {
      if (lane < g.n) attention_row<float>(p, i, r)[p.original[p.m + p.index[g.teachers + lane]]] = a;
      entropy = warp_sum(a <= 0 ? 0.0 : -double(a) * double(logf(a)));
    }
    return lane == 0 && put_sums(p, i, r, row.mu * double(loss), row.mu * entropy, -double(weight) * double(along));
  }

  // By one thread, which then takes the block's ticket
  __device__ static bool put_sums(const P& p, int i, int64_t r, double loss, double entropy, double scale_gradient) {
    double* at = p.dealt_sums + i * p.dealt_count + r;
    const int64_t step = p.ms * p.dealt_count;
    *at = loss;
    if (p.entropy != nullptr) *(at += step) = entropy;
    if (p.scale_grad) *(at += step) = scale_gradient;
    return takes_last_ticket(p);
  }
};

template <Dtype kType, class P>
__global__ void __launch_bounds__(kFewRowsThreads, 3) alp_few_rows(const __grid_constant__ P p) {
  ALP_DYNAMIC_SHARED(shared);
  const int i = block_index() % p.m, thread = thread_index();
  const int64_t r = block_index() / p.m, seq = p.weights.seq, bytes = p.weights.D * dtype_size(kType);
  const Row row = find_row(p.weights, r);
  const bool counts = i < p.ms && row.mu != 0;
  int group = 0;
  while (group + 1 < p.group_count && p.groups[group + 1].first <= i) ++group;
  const FewRowsLayout layout(p.ms, p.pairs_n, int(p.weights.D), int(dtype_size(kType)));
  const FewRowsKernel<kType, P> kernel{p, layout, shared, i, p.groups[group], r, row};
  if (counts) kernel.start();
  if (p.attention != nullptr)
    for (int k = thread; k < p.n; k += kFewRowsThreads) attention_row<float>(p, i, r)[k] = 0;
  if (p.layers[i].grad != nullptr)
    zero_all_but(p.layers[i].grad + r * seq * bytes, seq, counts ? row.position - r * seq : seq, bytes, thread,
                 kFewRowsThreads);
  const Constants constants = find_constants(p, reinterpret_cast<double*>(shared));
  Constants* const kept = reinterpret_cast<Constants*>(shared + layout.constants);  // registers are few
  if (thread == 0) *kept = constants;
  bool last = false;
  if (counts)
    last = kernel.run(constants);
  else if (thread == 0)
    last = i < p.ms ? FewRowsKernel<kType, P>::put_sums(p, i, r, 0, 0, 0) : takes_last_ticket(p);
  finish<float, 4>(p, *kept, reinterpret_cast<double*>(shared), last);
}

}  // namespace alp::cuda
