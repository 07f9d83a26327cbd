// The host side: tensors in, the plain Problem of the row kernels out, rows spread over threads.
#include "alp_cpu.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <string>

#include "../groups.h"
#include "problem.h"

namespace alp {
namespace {

float narrow_to_float(uint16_t bits, bool bf16) {
  if (bf16) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  const int exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
  const float sign = bits & 0x8000 ? -1.f : 1.f;
  if (exponent == 31) return mantissa ? std::numeric_limits<float>::quiet_NaN() : sign * HUGE_VALF;
  return sign * std::ldexp(float(exponent ? mantissa + 1024 : mantissa), (exponent ? exponent : 1) - 25);
}

template <class T>
void widen(const void* data, int64_t begin, int64_t count, double* out) {
  const T* values = static_cast<const T*>(data) + begin;
  for (int64_t k = 0; k < count; ++k) out[k] = double(values[k]);
}

// Elements begin … begin + count of a contiguous tensor of any real dtype, as doubles.
void widen(const void* data, WeightType type, int64_t begin, int64_t count, double* out) {
  switch (type) {
    case WeightType::none: std::fill(out, out + count, 1.0); return;
    case WeightType::boolean: return widen<bool>(data, begin, count, out);
    case WeightType::u8: return widen<uint8_t>(data, begin, count, out);
    case WeightType::i8: return widen<int8_t>(data, begin, count, out);
    case WeightType::i16: return widen<int16_t>(data, begin, count, out);
    case WeightType::i32: return widen<int32_t>(data, begin, count, out);
    case WeightType::i64: return widen<int64_t>(data, begin, count, out);
    case WeightType::f32: return widen<float>(data, begin, count, out);
    case WeightType::f64: return widen<double>(data, begin, count, out);
    case WeightType::f16:
    case WeightType::bf16:
      for (int64_t k = 0; k < count; ++k)
        out[k] = narrow_to_float(static_cast<const uint16_t*>(data)[begin + k], type == WeightType::bf16);
  }
}

double scalar_value(const Tensor& tensor) {
  double value = 0;
  widen(tensor.data_ptr(), weight_dtype(tensor), 0, 1, &value);
  return value;
}

// Whether gradients are written past the caches: they exceed these, every row starts on a cache line, and there are
// threads enough to fill the memory bus. A few are quicker through the caches: a streamed line holds one of the buffers
// through which a core reads, too, until it has reached memory.
bool worth_streaming(const Side& students, const Side& teachers) {
  constexpr int64_t kBeyondCaches = 8 << 20;
  constexpr uint32_t kFewThreads = 4;
  if (torch::stable::get_num_threads() <= kFewThreads) return false;
  int64_t total = 0;
  for (const Side* side : {&students, &teachers})
    for (const Tensor& gradient : side->gradients) {
      const int64_t size = dtype_size(hidden_dtype(gradient));
      if (reinterpret_cast<uintptr_t>(gradient.data_ptr()) % 64 != 0 ||
          gradient.size(gradient.dim() - 1) * size % 64 != 0)
        return false;
      total += gradient.numel() * size;
    }
  return total > kBeyondCaches;
}

// The layer map as dense blocks: student layers with one and the same set of teacher layers form a
// group; so do, for the teacher's gradients, teacher layers with one and the same set of students.
struct Groups {
  std::vector<std::vector<int>> indices;  // storage behind the pointers
  std::vector<Group> student, teacher;
  std::unique_ptr<bool[]> student_active, teacher_active;

  Groups(int m, int n, const std::vector<int64_t>& counts, const std::vector<int64_t>& layers,
         const std::vector<double>& omega, bool with_teacher)
      : student_active(new bool[m]()), teacher_active(new bool[n]()) {
    const std::vector<std::vector<int>> attended = attended_layers(n, counts, layers, omega);
    std::vector<std::vector<int>> attending(n);  // per teacher layer, in order
    for (int i = 0; i < m; ++i) {
      student_active[i] = !attended[i].empty();
      for (int j : attended[i]) {
        teacher_active[j] = true;
        attending[j].push_back(i);
      }
    }
    for (const auto& [teachers, students] : groups_of_equal(attended)) student.push_back(group(students, teachers));
    if (!with_teacher) return;
    for (const auto& [students, teachers] : groups_of_equal(attending)) teacher.push_back(group(students, teachers));
  }

 private:
  Group group(const std::vector<int>& students, const std::vector<int>& teachers) {
    indices.push_back(students);
    indices.push_back(teachers);
    // Moving the outer vector moves the inner ones, whose elements stay where they are.
    const auto& s = indices[indices.size() - 2];
    return {s.data(), indices.back().data(), int(students.size()), int(teachers.size())};
  }
};

// Sum and maximum of the pooled rows' weights; throws for weights that are not allowed.
struct RowWeights {
  double total = 0, largest = 0;

  RowWeights(const void* data, WeightType type, Pooling pooling, int64_t rows, int64_t seq) {
    constexpr int64_t kChunk = 1024;
    double values[kChunk];
    if (type == WeightType::none) {
      total = double(rows);
      largest = 1;
      return;
    }
    bool counted = false;  // the current sequence has a weight above 0
    for (int64_t begin = 0; begin < rows * seq; begin += kChunk) {
      const int64_t count = std::min(kChunk, rows * seq - begin);
      widen(data, type, begin, count, values);
      for (int64_t k = 0; k < count; ++k) {
        const double weight = values[k];
        STD_TORCH_CHECK(weight >= 0 && weight < HUGE_VAL, "attention_mask holds ", weight,
                        ", but weights must be finite and >= 0; an additive mask (0 for kept, -inf or a large negative "
                        "number for masked tokens) becomes a weight with (mask == 0)");
        const int64_t place = (begin + k) % seq;
        if (pooling == Pooling::token || (pooling == Pooling::cls && place == 0)) add(weight);
        if (pooling == Pooling::last || pooling == Pooling::mean) {
          counted = (place > 0 && counted) || weight > 0;
          if (place == seq - 1) add(counted);
        }
      }
    }
  }

 private:
  void add(double weight) {
    total += weight;
    largest = std::max(largest, weight);
  }
};

const Kernels& choose_kernels() {
  const char* forced = std::getenv("ALPKD_FAST_CPU_ISA");
  const std::string isa = forced ? forced : "";
  STD_TORCH_CHECK(isa.empty() || isa == "avx512" || isa == "avx2" || isa == "plain", "ALPKD_FAST_CPU_ISA=", isa,
                  " is not known; set avx512, avx2 or plain, or unset it");
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // F16C comes with AVX2
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  const bool avx2 = false, avx512 = false;
#endif
  STD_TORCH_CHECK((isa != "avx512" || avx512) && (isa != "avx2" || avx2), "ALPKD_FAST_CPU_ISA=", isa,
                  ", but this processor has not these instructions; unset it");
#if defined(__x86_64__)
  if (avx512 && (isa.empty() || isa == "avx512")) return kernels_avx512;
  if (avx2 && (isa.empty() || isa == "avx2")) return kernels_avx2;
#endif
  return kernels_plain;
}

// Rows a chunk: a function of the problem alone, so that the order of every sum is too.
int64_t rows_per_chunk(int64_t rows) { return std::clamp<int64_t>(rows / 64, 1, 64); }

struct Sums {
  std::vector<double> loss, entropy;
  double d_scale = 0;
};

Sums run_rows(const Problem& problem, bool f64) {
  static const Kernels& kernels = choose_kernels();
  const Kernel& kernel = f64 ? kernels.f64 : kernels.f32;
  const int64_t rows = problem.rows, step = rows_per_chunk(rows), chunks = (rows + step - 1) / step;
  const int64_t pitch = 2 * int64_t(problem.m) + 1;
  std::vector<double> partials(chunks * pitch);
  const int64_t bytes = kernel.scratch_bytes(problem);
  // A thread is worth waking for about 64 Ki multiply-adds.
  const double work = 4.0 * problem.m * problem.n * problem.D * double(step * std::max<int64_t>(problem.seq, 1));
  const int64_t grain = std::max<int64_t>(1, int64_t(65536 / work));
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    std::unique_ptr<char, decltype(&std::free)> scratch(
        static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)), &std::free);
    STD_TORCH_CHECK(scratch != nullptr, "alpkd_fast: out of memory for ", bytes, " bytes of scratch");
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      double* sums = partials.data() + chunk * pitch;
      kernel.run(problem, chunk * step, std::min(rows, (chunk + 1) * step), std::min(rows, end * step), scratch.get(),
                 {sums, sums + problem.m, sums + 2 * problem.m});
    }
  });
  Sums sums{std::vector<double>(problem.m), std::vector<double>(problem.m)};
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const double* partial = partials.data() + chunk * pitch;
    for (int i = 0; i < problem.m; ++i) {
      sums.loss[i] += partial[i];
      sums.entropy[i] += partial[problem.m + i];
    }
    sums.d_scale += partial[2 * problem.m];
  }
  return sums;
}

void fill(Tensor& tensor, bool f64, const double* values, int64_t count) {
  for (int64_t k = 0; k < count; ++k) {
    if (f64)
      static_cast<double*>(tensor.data_ptr())[k] = values[k];
    else
      static_cast<float*>(tensor.data_ptr())[k] = float(values[k]);
  }
}

}  // namespace

Outputs alp_cpu(Tensors student, Tensors teacher, std::optional<Tensor> row_weights, int64_t pooling_index,
                std::vector<int64_t> map_counts, std::vector<int64_t> map_layers, std::optional<Tensor> scale_tensor,
                double scale, std::vector<double> layer_weights, bool normalize, bool detach_attention, bool mean,
                std::optional<Tensor> normalizer_tensor, double normalizer, bool details,
                std::vector<bool> student_grad, std::vector<bool> teacher_grad, bool scale_grad) {
  const Tensor& first = student[0];
  const int m = int(student.size()), n = int(teacher.size());
  const int64_t dims = first.dim(), D = first.size(dims - 1);
  const Pooling pooling = Pooling(pooling_index);
  const int64_t seq = pooling == Pooling::token ? 1 : first.size(dims - 2);
  const int64_t rows = first.numel() / D / std::max<int64_t>(seq, 1);

  // Values, which the compiler of a graph cannot see, are checked before anything is allocated.
  if (scale_tensor) scale = scalar_value(*scale_tensor);
  STD_TORCH_CHECK(scale >= 0 && scale < HUGE_VAL, "scale must be finite and >= 0, got ", scale,
                  "; clamp it, or learn its logarithm");
  if (normalizer_tensor) {
    normalizer = scalar_value(*normalizer_tensor);
    STD_TORCH_CHECK(normalizer > 0 && normalizer < HUGE_VAL, "normalizer must be finite and > 0, got ", normalizer,
                    "; pass the number of rows that count over all accumulation steps and ranks");
  }
  std::optional<Tensor> weights;
  if (row_weights) weights = torch::stable::contiguous(*row_weights);
  const WeightType weight_type = weights ? weight_dtype(*weights) : WeightType::none;
  const void* weight_data = weights ? weights->data_ptr() : nullptr;
  const RowWeights mu(weight_data, weight_type, pooling, rows, seq);
  const double N = !mean ? 1.0 : double(m) * double(D) * (normalizer > 0 ? normalizer : mu.total);

  Side students(student, student_grad), teachers(teacher, teacher_grad);
  const Dtype student_dtype = hidden_dtype(first), teacher_dtype = hidden_dtype(teacher[0]);
  const bool f64 = student_dtype == Dtype::f64 || teacher_dtype == Dtype::f64;
  const ScalarType compute = f64 ? ScalarType::Double : ScalarType::Float;

  std::vector<double> omega = layer_weights.empty() ? std::vector<double>(m, 1.0) : layer_weights;
  const double largest_omega = *std::max_element(omega.begin(), omega.end());
  const Groups groups(m, n, map_counts, map_layers, omega, teachers.wanted);

  // fp16 cannot hold 1/N: its gradients are stored for weights scaled to at most 1, and the factor
  // that is left out is handed to the backward.
  const bool in_fp16 =
      (students.wanted && student_dtype == Dtype::f16) || (teachers.wanted && teacher_dtype == Dtype::f16);
  const double share = mu.total > 0 && N > 0 ? 2 / N : 0;
  const double factor = in_fp16 ? share * largest_omega * mu.largest : 1;
  std::vector<double> gradient_coef(m);
  for (int i = 0; i < m; ++i)
    gradient_coef[i] = !in_fp16 ? share * omega[i] : factor > 0 ? omega[i] / (largest_omega * mu.largest) : 0;

  std::vector<int64_t> lead(first.sizes().begin(), first.sizes().end() - (pooling == Pooling::token ? 1 : 2));
  std::vector<int64_t> attention_shape{m};
  attention_shape.insert(attention_shape.end(), lead.begin(), lead.end());
  attention_shape.push_back(n);
  Tensor attention = new_tensor(first, details ? attention_shape : std::vector<int64_t>{0}, compute);

  Problem problem{};
  problem.rows = rows;
  problem.seq = seq;
  problem.D = D;
  problem.m = m;
  problem.n = n;
  problem.pooling = pooling;
  problem.student_dtype = student_dtype;
  problem.teacher_dtype = teacher_dtype;
  problem.student = students.layers.data();
  problem.teacher = teachers.layers.data();
  problem.weights = weight_data;
  problem.weight_type = weight_type;
  problem.groups = groups.student.data();
  problem.group_count = int(groups.student.size());
  problem.teacher_groups = groups.teacher.data();
  problem.teacher_group_count = int(groups.teacher.size());
  problem.student_active = groups.student_active.get();
  problem.teacher_active = groups.teacher_active.get();
  problem.scale = scale;
  problem.gradient_coef = gradient_coef.data();
  problem.normalize = normalize;
  problem.detach = detach_attention;
  problem.student_grad = students.wanted;
  problem.teacher_grad = teachers.wanted;
  problem.scale_grad = scale_grad;
  problem.stream = worth_streaming(students, teachers);
  problem.attention = details ? attention.data_ptr() : nullptr;
  Sums sums = run_rows(problem, f64);

  double loss = 0;
  for (int i = 0; i < m; ++i) {
    sums.loss[i] = mu.total > 0 && omega[i] > 0 ? omega[i] * sums.loss[i] / N : 0;
    sums.entropy[i] = mu.total > 0 ? sums.entropy[i] / mu.total : 0;
    loss += sums.loss[i];
  }
  const double d_scale = sums.d_scale * factor;
  Tensor loss_out = new_tensor(first, {}, compute), layer_losses = new_tensor(first, {m}, compute);
  Tensor entropy = new_tensor(first, {details ? m : 0}, compute);
  Tensor factor_out = new_tensor(first, {}, compute), d_scale_out = new_tensor(first, {}, compute);
  fill(loss_out, f64, &loss, 1);
  fill(layer_losses, f64, sums.loss.data(), m);
  fill(entropy, f64, sums.entropy.data(), details ? m : 0);
  fill(factor_out, f64, &factor, 1);
  fill(d_scale_out, f64, &d_scale, 1);
  return {loss_out, layer_losses, attention, entropy, factor_out, d_scale_out, students.gradients, teachers.gradients};
}

}  // namespace alp
