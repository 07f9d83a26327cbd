// What the host hands to the row kernels: plain data, no torch types, so that each instruction set's
// translation unit includes nothing whose inline code could be merged across units.
#pragma once

#include <cstdint>

#include "../layers.h"

namespace alp {

// Student layers that attend to the same teacher layers: a dense block of the attention.
struct Group {
  const int* student;  // indices of its m student layers
  const int* teacher;  // indices of its n teacher layers
  int m, n;
};

// What is computed of a row.
enum class Task : int8_t {
  loss,        // the loss and its gradients
  attend,      // u_i = sum_j a_ij t_j, the layer attention alone: a projection lies between it and the loss
  attend_back  // its gradients, from those of u_i
};

// How the processor fetches what is prefetched.
enum class Fetching : int8_t {
  pairs,  // a line brings its neighbour, and the end of a row that follows on the last one is foreseen
  lines   // a line comes alone, and a row only as far as it is asked for
};

// student, its gradients and attention are, by task:
//   loss         s_i; its gradient; a_ij, written where it is wanted
//   attend       the queries; u_i; a_ij, written
//   attend_back  the gradients of u_i; those of the queries; a_ij, read
struct Problem {
  Task task;
  int64_t rows;  // pooled rows; a row is a sequence for every pooling but token
  int64_t seq;   // S: positions per row; 1 for token
  int64_t D;
  int m, n;
  Pooling pooling;
  Dtype student_dtype, teacher_dtype;
  const Layer* student;  // [m]
  const Layer* teacher;  // [n]
  const Layer* query;   // [m] attend_back: what the teacher's and the scale's gradients need; null where none is wanted
  const void* weights;  // (*lead), contiguous
  WeightType weight_type;

  const Group* groups;  // of student layers
  int group_count;
  const Group* teacher_groups;  // teacher layers that the same student layers attend to; only for teacher gradients
  int teacher_group_count;
  const bool* student_active;  // [m] in a group
  const bool* teacher_active;  // [n] in a group

  double scale;                 // tau
  const double* gradient_coef;  // [m] 2 omega_i / N, or what of it is stored
  bool normalize, detach;
  bool student_grad, teacher_grad, scale_grad;  // whether any such gradient is wanted
  bool stream;                                  // gradients exceed the caches: write past them
  Fetching fetching;
  void* attention;  // (m, rows, n) in the compute dtype, or null
};

// What one chunk of rows adds up to, summed over chunks in a fixed order by the host.
struct Partial {
  double* loss;     // [m] sum of mu ||e||^2
  double* entropy;  // [m] sum of mu H(a)
  double* d_scale;  // [1]
};

// One instruction set's kernel.
struct Kernel {
  int64_t (*scratch_bytes)(const Problem&);  // what one thread needs
  // Rows begin … end; the thread goes on with those up to last, which are worth a prefetch.
  void (*run)(const Problem&, int64_t begin, int64_t end, int64_t last, char* scratch, Partial);
};
// By the dtype it computes in.
struct Kernels {
  Kernel f32, f64;
};
extern const Kernels kernels_plain;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernel kernel_avx512_bf16;  // in float32
#endif

// static for the same reason as dtype_size
static inline const char* row_of(const Layer& layer, int64_t r) {
  if (layer.inner == 0) return layer.data + r * layer.inner_stride;
  return layer.data + (r / layer.inner) * layer.outer_stride + (r % layer.inner) * layer.inner_stride;
}

}  // namespace alp
