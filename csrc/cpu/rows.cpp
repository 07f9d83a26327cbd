#include "rows.h"

#include <algorithm>
#include <cstdlib>
#include <string>

#include "../groups.h"

namespace alp {

Groups::Groups(int m, int n, const std::vector<int64_t>& counts, const std::vector<int64_t>& layers,
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

Group Groups::group(const std::vector<int>& students, const std::vector<int>& teachers) {
  indices.push_back(students);
  indices.push_back(teachers);
  // Moving the outer vector moves the inner ones, whose elements stay where they are.
  const auto& s = indices[indices.size() - 2];
  return {s.data(), indices.back().data(), int(students.size()), int(teachers.size())};
}

void Groups::hand_to(Problem* problem) const {
  problem->groups = student.data();
  problem->group_count = int(student.size());
  problem->teacher_groups = teacher.data();
  problem->teacher_group_count = int(teacher.size());
  problem->student_active = student_active.get();
  problem->teacher_active = teacher_active.get();
}

namespace {

bool processor_is_amd() {
#if defined(__x86_64__)
  return __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// Whether gradients are written past the caches: they exceed these, and every row starts on a cache line. Elsewhere
// than on AMD a few threads, which do not fill the memory bus, are quicker through the caches: a streamed line holds
// one of the buffers through which a core reads, too, until it has reached memory.
bool worth_streaming(const Side& students, const Side& teachers, bool amd) {
  constexpr int64_t kBeyondCaches = 8 << 20;
  constexpr uint32_t kFewThreads = 4;
  if (!amd && torch::stable::get_num_threads() <= kFewThreads) return false;
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

}  // namespace

// Measured on Zen 5 and Cascade Lake.
void suit_processor(Problem* problem, const Side& students, const Side& teachers) {
  static const bool amd = processor_is_amd();
  problem->fetching = amd ? Fetching::lines : Fetching::pairs;
  problem->stream = worth_streaming(students, teachers, amd);
}

namespace {

Kernels choose_kernels() {
  const char* forced = std::getenv("ALPKD_FAST_CPU_ISA");
  const std::string isa = forced ? forced : "";
  STD_TORCH_CHECK(isa.empty() || isa == "avx512_bf16" || isa == "avx512" || isa == "avx2" || isa == "plain",
                  "ALPKD_FAST_CPU_ISA=", isa, " is not known; set avx512_bf16, avx512, avx2 or plain, or unset it");
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // F16C comes with AVX2
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#else
  const bool avx2 = false, avx512 = false, avx512_bf16 = false;
#endif
  STD_TORCH_CHECK((isa != "avx512_bf16" || avx512_bf16) && (isa != "avx512" || avx512) && (isa != "avx2" || avx2),
                  "ALPKD_FAST_CPU_ISA=", isa, ", but this processor has not these instructions; unset it");
#if defined(__x86_64__)
  if (avx512_bf16 && (isa.empty() || isa == "avx512_bf16")) return {kernel_avx512_bf16, kernels_avx512.f64};
  if (avx512 && (isa.empty() || isa == "avx512")) return kernels_avx512;
  if (avx2 && (isa.empty() || isa == "avx2")) return kernels_avx2;
#endif
  return kernels_plain;
}

// Rows a chunk: a function of the problem alone, so that the order of every sum is too.
int64_t rows_per_chunk(int64_t rows) { return std::clamp<int64_t>(rows / 64, 1, 64); }

}  // namespace

Sums run_rows(const Problem& problem, bool f64) {
  static const Kernels kernels = choose_kernels();
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

}  // namespace alp
