// The operators alpkd_fast::alp_cuda and alpkd_fast::scale_gradients_cuda: tensors in, one launch, tensors out.
// Nothing here waits for the device or reads its memory.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "device.cuh"
#include "few_rows_kernel.cuh"
#include "generic_kernel.cuh"
#include "launch.h"
#include "layer_map.h"
#include "matrix_kernel.cuh"
#include "scale_kernel.cuh"
#include "vector_kernel.cuh"
#include "weights_kernel.cuh"

namespace alp::cuda {

// Pairs of counters that are 0 whenever no kernel is using them, one set per device.
constexpr int kTickets = 16384;
#if defined(__CUDACC__)
__device__ unsigned tickets[2 * kTickets];
#else
unsigned tickets[2 * kTickets];
#endif

namespace {

// loss, layer_losses, attention, entropy, grad_factor, d_scale, d_student, d_teacher
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensors, Tensors>;

// A ticket that no kernel in flight shares: launches on one stream follow each other and share one; a
// captured launch, which replays anywhere, has its own. Where they have run out, zeroed workspace serves.
unsigned* find_ticket(const char* name, const Device& device, cudaStream_t stream, unsigned* fallback) {
  static std::mutex mutex;
  static std::map<std::pair<int, cudaStream_t>, int> of_stream;
  static std::map<int, int> used;
  cudaStreamCaptureStatus capturing;
  check(cudaStreamIsCapturing(stream, &capturing), name, "cudaStreamIsCapturing");
  int slot;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto known = of_stream.find({device.index, stream});
    if (capturing == cudaStreamCaptureStatusNone && known != of_stream.end()) {
      slot = known->second;
    } else {
      int& next = used[device.index];
      slot = next < kTickets ? next++ : -1;
      if (capturing == cudaStreamCaptureStatusNone && slot >= 0) of_stream[{device.index, stream}] = slot;
    }
  }
  if (slot < 0) {
    check(cudaMemsetAsync(fallback, 0, 2 * sizeof *fallback, stream), name, "cudaMemsetAsync");
    return fallback;
  }
  void* base = nullptr;
  check(cudaGetSymbolAddress(&base, tickets), name, "cudaGetSymbolAddress");
  return static_cast<unsigned*>(base) + 2 * slot;
}

template <class T>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// The call's arguments in plain form, before a kernel is chosen.
struct Call {
  const Tensor& first;
  const Side &students, &teachers;
  const LayerMap& map;
  const std::vector<double>& omega;
  bool details;
  Tensor loss, layer_losses, attention, entropy, grad_factor, d_scale;
};

// A kernel and what it needs for a problem.
template <class P>
struct Plan {
  const char* name;
  void (*kernel)(const P);
  int threads, columns;
  int64_t shared, scratch;
  int team = 0, stages = 0;      // of the kernels that take whole rows
  int pairs_m = 0, pairs_n = 0;  // of the largest group
  int64_t blocks = 0;            // 0: as many as are resident, and each takes several rows
};

template <class A, class P>
Plan<P> plan_generic(const Device& device, int ms, int ns, int64_t D) {
  Arrays<A> unused;
  char* const none = nullptr;
  char dummy;  // any address: arrays of m·n go to scratch memory where they would leave the columns little or no room
  constexpr int64_t kLargest = 48 << 10;
  const int64_t arrays = 3 * int64_t(ms) * ns * int64_t(sizeof(A));
  bool in_scratch = arrays > kLargest;
  auto bytes = [&](int columns) {
    return Arrays<A>::lay_out(&unused, none, in_scratch ? &dummy : nullptr, ms, ns, columns);
  };
  const int whole = int(std::min<int64_t>((D + 3) / 4 * 4, 1 << 20));
  int columns = std::min(whole, 32);
  in_scratch = in_scratch || bytes(columns) > device.shared_bytes;
  if (bytes(whole) <= device.shared_bytes) {
    columns = whole;
  } else {
    // Half of the shared memory, so that one block computes while another loads.
    const int64_t budget = device.shared_bytes / 2 - 1024;
    while (bytes(2 * columns) <= budget) columns *= 2;
    // With hundreds of layers even those are too many.
    while (columns > 4 && bytes(columns) > device.shared_bytes) columns = (columns / 2 + 3) / 4 * 4;
  }
  STD_TORCH_CHECK(bytes(columns) <= device.shared_bytes, "alpkd_fast: ", ms, " student and ", ns, " teacher layers in ",
                  sizeof(A) == 8 ? "float64" : "float32", " take ", bytes(columns),
                  " bytes of shared memory at the least, this GPU has ", device.shared_bytes,
                  "; pass fewer layers, or backend=\"reference\"");
  return {"alp_generic", &alp_generic<A, P>, kGenericThreads,
          columns,       bytes(columns),     in_scratch ? (arrays + 15) / 16 * 16 : 0};
}

template <class P>
using MatrixEntry = void (*)(const P);
template <class P, bool kBf16>
MatrixEntry<P> matrix_entry(int kM, int kN) {
  if (kM == 1) return kN == 1 ? &alp_matrix<kBf16, 1, 1, P> : &alp_matrix<kBf16, 1, 2, P>;
  return kN == 1 ? &alp_matrix<kBf16, 2, 1, P> : &alp_matrix<kBf16, 2, 2, P>;
}

bool rows_aligned(const std::vector<Layer>& layers) {
  for (const Layer& layer : layers)
    if ((reinterpret_cast<uintptr_t>(layer.data) | uintptr_t(layer.inner_stride) | uintptr_t(layer.outer_stride) |
         reinterpret_cast<uintptr_t>(layer.grad)) %
            16 !=
        0)
      return false;
  return true;
}

struct Largest {
  int m, n;
};
// Layers of the largest groups.
Largest largest_group(const LayerMap& map) {
  Largest most{1, 1};
  for (const Group& g : map.groups) most.m = std::max<int>(most.m, g.m), most.n = std::max<int>(most.n, g.n);
  return most;
}

// Whether ALPKD_FAST_CUDA_KERNEL asks for a kind of kernel: "generic", or "rows", the kernels of many rows for few too.
bool forced(const char* kind) {
  const char* asked = std::getenv("ALPKD_FAST_CUDA_KERNEL");
  return asked != nullptr && std::string(asked) == kind;
}

// What the kernels that take whole rows ask of a problem: rows of one dtype at 16-byte steps, some layer that counts,
// and no option that needs more than student gradients.
template <class P>
bool takes_rows(const P& p, const Call& call) {
  return !forced("generic") && p.ms > 0 && p.teacher_dtype == p.student_dtype && !p.normalize && !p.teacher_grad &&
         p.weights.pooling != Pooling::mean && rows_aligned(call.students.layers) && rows_aligned(call.teachers.layers);
}

// Up to 32 teacher layers to a group, and as many rows as are all under way together.
template <class P>
std::optional<Plan<P>> plan_few_rows(const Device& device, const P& p, const Call& call) {
  const int64_t rows = p.weights.rows, D = p.weights.D, size = dtype_size(p.student_dtype);
  const int n = largest_group(call.map).n;
  if (forced("rows") || rows == 0 || n > kWarpSize || D * size % 16 != 0 || (n + 1) * D * size > device.shared_bytes)
    return std::nullopt;
  const int64_t bytes = FewRowsLayout(p.ms, n, int(D), int(size)).bytes, blocks = rows * p.m;
  void (*const kernel)(const P) = p.student_dtype == Dtype::f32    ? &alp_few_rows<Dtype::f32, P>
                                  : p.student_dtype == Dtype::bf16 ? &alp_few_rows<Dtype::bf16, P>
                                                                   : &alp_few_rows<Dtype::f16, P>;
  const char* const name = "alp_few_rows";
  if (bytes > device.shared_bytes ||
      blocks > int64_t(device.multiprocessors) * resident_blocks(name, kernel, device, kFewRowsThreads, bytes))
    return std::nullopt;
  Plan<P> plan{name, kernel, kFewRowsThreads, int(D), bytes, 0};
  plan.pairs_n = n;
  plan.blocks = blocks;
  return plan;
}

// For bf16 and fp16: D a multiple of 32, up to 16 student and 32 teacher layers to a group.
template <class P>
std::optional<Plan<P>> plan_matrix(const Device& device, const P& p, const Call& call) {
  const int64_t D = p.weights.D;
  const Largest most = largest_group(call.map);
  const size_t groups = call.map.groups.size();
  if (D % kUnit != 0 || most.m > 16 || most.n > 32 || groups > 4) return std::nullopt;
  const int kM = (most.m + 7) / 8, kN = (most.n + 15) / 16;
  auto bytes = [&](int64_t columns, int warps, int team, int stages) {
    return RowLayout(p.ms, p.ns, int(columns), 2, warps, team, stages, matrix_scratch(kM, kN, team)).bytes;
  };

  int teams = kMatrixWarps;  // of one warp
  while (teams > 0 && bytes(D, teams, 1, 1) > device.shared_bytes) --teams;
  int team, warps, stages = 1;
  int64_t columns = D;
  if (teams >= 2) {
    // Enough rows at a time that copies never stop, but not so many that their copies hinder each other.
    constexpr int kEnough = 6;
    constexpr int64_t kMostBytes = 176 << 10;
    team = teams >= kEnough ? 1 : 2;
    warps = team == 1 ? teams : kMatrixWarps;
    while (team == 1 && warps > kEnough && warps * 2 * D * (p.ms + p.ns) > kMostBytes) --warps;
    while (warps > 0 && bytes(D, warps, team, 1) > device.shared_bytes) warps -= team;
    if (warps == 0) return std::nullopt;
  } else {
    if (groups > 1) return std::nullopt;
    team = warps = 4;
    stages = 2;
    int64_t parts = 2;
    auto columns_of = [&] { return ((D + parts - 1) / parts + kUnit - 1) / kUnit * kUnit; };
    while (columns_of() > kUnit && bytes(columns_of(), warps, team, stages) > device.shared_bytes) ++parts;
    columns = columns_of();
    if (bytes(columns, warps, team, stages) > device.shared_bytes) return std::nullopt;
  }
  return Plan<P>{"alp_matrix",
                 p.student_dtype == Dtype::bf16 ? matrix_entry<P, true>(kM, kN) : matrix_entry<P, false>(kM, kN),
                 warps * kWarpSize,
                 int(columns),
                 bytes(columns, warps, team, stages),
                 0,
                 team,
                 stages};
}

// For fp32, where D is a multiple of 4 and a row fits in shared memory.
template <class P>
std::optional<Plan<P>> plan_vector(const Device& device, const P& p, const Call& call) {
  const int64_t D = p.weights.D, vectors = D / 4;
  if (D % 4 != 0) return std::nullopt;
  const Largest most = largest_group(call.map);
  // The tile of student layers that leaves the fewest empty.
  const int students = most.m % 4 == 0 ? 4 : most.m <= 2 ? 2 : most.m % 3 == 0 || most.m == 5 ? 3 : 4;
  auto padded = [](int layers, int tile) { return (layers + tile - 1) / tile * tile; };
  const int pairs_m = padded(most.m, students), pairs_n = padded(most.n, kTeachers);
  auto bytes = [&](int warps, int team) {
    return RowLayout(p.ms, p.ns, int(D), 4, warps, team, 1, vector_scratch(pairs_m, pairs_n)).bytes;
  };
  int team = 0, warps = 0;
  double best = 0;
  for (int size : {1, 2, 3, 4, 6, 8}) {
    const int64_t turns = (vectors + size * kWarpSize - 1) / (size * kWarpSize);
    for (int teams = kVectorWarps / size; teams > 0; --teams) {
      if (bytes(teams * size, size) > device.shared_bytes) continue;
      // Threads that have work; of two alike the one with more rows at a time
      const double busy = double(vectors) / double(turns) * teams;
      if (busy > 1.01 * best) best = busy, team = size, warps = teams * size;
      break;
    }
  }
  if (warps == 0) return std::nullopt;
  using Entry = void (*)(const P);
  const Entry entry = students == 2   ? Entry(&alp_vector<2, P>)
                      : students == 3 ? Entry(&alp_vector<3, P>)
                                      : Entry(&alp_vector<4, P>);
  return Plan<P>{"alp_vector", entry, warps * kWarpSize, int(D), bytes(warps, team), 0, team, 1, pairs_m, pairs_n};
}

// The kernel that is made for the problem, if there is one.
template <class P>
std::optional<Plan<P>> plan_rows(const Device& device, const P& p, const Call& call) {
  if (!takes_rows(p, call)) return std::nullopt;
  if (p.student_dtype == Dtype::f64) return std::nullopt;
  if (std::optional<Plan<P>> plan = plan_few_rows(device, p, call)) return plan;
  return p.student_dtype == Dtype::f32 ? plan_vector(device, p, call) : plan_matrix(device, p, call);
}

template <class P>
void run(Call& call, P& p, const Device& device, cudaStream_t stream, const Plan<P>& plan) {
  const LayerMap& map = call.map;
  p.columns = plan.columns;
  p.parts = int((p.weights.D + plan.columns - 1) / plan.columns);
  p.team = plan.team;
  p.stages = plan.stages;
  p.pairs_m = plan.pairs_m;
  p.pairs_n = plan.pairs_n;
  for (int i = 0; i < p.m; ++i) {
    p.layers[i] = call.students.layers[map.students[i]];
    p.omega[i] = call.omega[map.students[i]];
    p.original[i] = uint16_t(map.students[i]);
  }
  for (int j = 0; j < p.n; ++j) {
    p.layers[p.m + j] = call.teachers.layers[map.teachers[j]];
    p.original[p.m + j] = uint16_t(map.teachers[j]);
  }
  p.group_count = int(map.groups.size());
  std::copy(map.groups.begin(), map.groups.end(), p.groups);
  std::copy(map.index.begin(), map.index.end(), p.index);

  const int resident = resident_blocks(plan.name, plan.kernel, device, plan.threads, plan.shared);
  const int64_t grid = plan.blocks > 0
                           ? plan.blocks
                           : std::clamp<int64_t>(p.weights.rows, 1, int64_t(resident) * device.multiprocessors);
  // Rows take different times: the last fifth is dealt out to the teams that are ahead.
  const int64_t rows = p.weights.rows;
  const bool deals = plan.team > 0 && rows > 4 * grid * (plan.threads / kWarpSize / plan.team);
  p.fixed_rows = plan.blocks > 0 ? 0 : deals ? rows - rows / 5 : rows;
  p.scale_sums = plan.blocks > 0 ? p.ms : 1;
  p.dealt_count = rows - p.fixed_rows;
  const int64_t sums = 2 * kWeightParts, partials = grid * (2 * int64_t(p.m) + 1);
  const int64_t dealt = dealt_places(p) * p.dealt_count;
  const int64_t doubles = 2 + sums + partials + dealt + grid * plan.scratch / 8;
  Tensor workspace = new_tensor(call.first, {doubles}, ScalarType::Double);
  double* memory = pointer<double>(workspace);
  p.ticket = find_ticket(plan.name, device, stream, reinterpret_cast<unsigned*>(memory));
  p.dealt_sums = memory + 2 + sums;
  p.partials = p.dealt_sums + dealt + grid * plan.scratch / 8;
  p.scratch = plan.scratch > 0 ? reinterpret_cast<char*>(p.dealt_sums + dealt) : nullptr;
  p.scratch_bytes = plan.scratch;

  // Up to 2 Ki weights every block adds up by itself; more are worth a launch of their own.
  constexpr int64_t kWeightsPerBlock = 2 << 10;
  const int64_t weights_read = p.weights.pooling == Pooling::cls ? p.weights.rows : p.weights.rows * p.weights.seq;
  if (p.weights.data != nullptr && weights_read > kWeightsPerBlock) {
    launch("alp_row_weights", &alp_row_weights, kWeightParts, kWeightThreads,
           2 * kWeightThreads / kWarpSize * sizeof(double), stream, p.weights, memory + 2);
    p.weights.sums = memory + 2;
    p.weights.parts = kWeightParts;
  }
  launch(plan.name, plan.kernel, grid, plan.threads, size_t(plan.shared), stream, p);
}

template <class P>
bool fits(const Call& call) {
  return call.map.students.size() + call.map.teachers.size() <= P::kMaxLayers &&
         call.map.groups.size() <= P::kMaxGroups && call.map.index.size() <= P::kMaxIndices;
}

Outputs alp_cuda(Tensors student, Tensors teacher, std::optional<Tensor> row_weights, int64_t pooling_index,
                 std::vector<int64_t> map_counts, std::vector<int64_t> map_layers, std::optional<Tensor> scale_tensor,
                 double scale, std::vector<double> layer_weights, bool normalize, bool detach_attention, bool mean,
                 std::optional<Tensor> normalizer_tensor, double normalizer, bool details,
                 std::vector<bool> student_grad, std::vector<bool> teacher_grad, bool scale_grad) {
  const Tensor& first = student[0];
  const OnDevice guard(first.get_device_index());
  const Device device = current_device();
  const cudaStream_t stream = current_stream(device.index);
  const int m = int(student.size()), n = int(teacher.size());
  const int64_t dims = first.dim(), D = first.size(dims - 1);
  const Pooling pooling = Pooling(pooling_index);
  const int64_t seq = pooling == Pooling::token ? 1 : first.size(dims - 2);
  const int64_t rows = first.numel() / D / std::max<int64_t>(seq, 1);

  std::optional<Tensor> weights;
  if (row_weights) weights = torch::stable::contiguous(*row_weights);
  const std::vector<double> omega = layer_weights.empty() ? std::vector<double>(m, 1.0) : layer_weights;
  const LayerMap map(m, n, map_counts, map_layers, omega);
  const Side students(student, student_grad), teachers(teacher, teacher_grad);
  const Dtype student_dtype = hidden_dtype(first), teacher_dtype = hidden_dtype(teacher[0]);
  const bool f64 = student_dtype == Dtype::f64 || teacher_dtype == Dtype::f64;
  const ScalarType compute = f64 ? ScalarType::Double : ScalarType::Float;
  auto make = [&](const std::vector<int64_t>& shape) { return new_tensor(first, shape, compute); };

  std::vector<int64_t> attention_shape{m};
  attention_shape.insert(attention_shape.end(), first.sizes().begin(),
                         first.sizes().end() - (pooling == Pooling::token ? 1 : 2));
  attention_shape.push_back(n);
  Call call{first,
            students,
            teachers,
            map,
            omega,
            details,
            make({}),
            make({m}),
            make(details ? attention_shape : std::vector<int64_t>{0}),
            make({details ? m : 0}),
            make({}),
            make({})};

  auto describe = [&](auto& p) {
    p.weights = {weights ? weights->data_ptr() : nullptr,
                 weights ? weight_dtype(*weights) : WeightType::none,
                 pooling,
                 rows,
                 seq,
                 D,
                 m,
                 nullptr,
                 0,
                 mean,
                 normalizer_tensor ? normalizer_tensor->data_ptr() : nullptr,
                 normalizer_tensor ? weight_dtype(*normalizer_tensor) : WeightType::none,
                 normalizer};
    p.m = m;
    p.n = n;
    p.ms = map.ms;
    p.ns = map.ns;
    p.student_dtype = student_dtype;
    p.teacher_dtype = teacher_dtype;
    p.normalize = normalize;
    p.detach = detach_attention;
    p.student_grad = students.wanted;
    p.teacher_grad = teachers.wanted;
    p.scale_grad = scale_grad;
    p.store_fp16 = (students.wanted && student_dtype == Dtype::f16) || (teachers.wanted && teacher_dtype == Dtype::f16);
    p.scale = scale;
    p.scale_tensor = scale_tensor ? scale_tensor->data_ptr() : nullptr;
    p.scale_type = scale_tensor ? weight_dtype(*scale_tensor) : WeightType::none;
    p.largest_omega = *std::max_element(omega.begin(), omega.end());
    p.loss = call.loss.data_ptr();
    p.layer_losses = call.layer_losses.data_ptr();
    p.attention = details ? call.attention.data_ptr() : nullptr;
    p.entropy = details ? call.entropy.data_ptr() : nullptr;
    p.grad_factor = call.grad_factor.data_ptr();
    p.d_scale = call.d_scale.data_ptr();
  };
  auto run_as = [&]<class P>(P p) {
    describe(p);
    std::optional<Plan<P>> plan;
    if constexpr (std::is_same_v<P, SmallProblem>) plan = plan_rows(device, p, call);
    if (!plan)
      plan =
          f64 ? plan_generic<double, P>(device, map.ms, map.ns, D) : plan_generic<float, P>(device, map.ms, map.ns, D);
    run(call, p, device, stream, *plan);
  };
  STD_TORCH_CHECK(fits<LargeProblem>(call), "alpkd_fast: the cuda backend takes up to ", LargeProblem::kMaxLayers,
                  " layers, student and teacher together, got ", m + n, "; use backend=\"reference\"");
  if (fits<SmallProblem>(call))
    run_as(SmallProblem{});
  else
    run_as(LargeProblem{});
  return {call.loss,        call.layer_losses, call.attention,     call.entropy,
          call.grad_factor, call.d_scale,      students.gradients, teachers.gradients};
}

Dtype factor_dtype(const char* name, const Tensor& factor, const Tensor& like) {
  STD_TORCH_CHECK(factor.numel() == 1, "scale_gradients_cuda: ", name, " has ", factor.numel(),
                  " elements; pass a tensor of one");
  STD_TORCH_CHECK(factor.get_device_index() == like.get_device_index(), "scale_gradients_cuda: ", name,
                  " is on another device than the gradients");
  return hidden_dtype(factor);
}

// gradients *= factor · grad_factor, in place; nothing is touched where that is 1. With pooling "cls" and "last" only
// the pooled row of each sequence is: the others are zeros. Else a whole tensor is one row.
void scale_gradients_cuda(Tensors gradients, Tensor factor, std::optional<Tensor> grad_factor, int64_t pooling_index,
                          std::optional<Tensor> row_weights) {
  if (gradients.empty()) return;
  const OnDevice guard(gradients[0].get_device_index());
  const Device device = current_device();
  const cudaStream_t stream = current_stream(device.index);
  const Pooling pooling = Pooling(pooling_index);
  ScaleProblem p{};
  p.factor = factor.data_ptr();
  p.factor_dtype = factor_dtype("factor", factor, gradients[0]);
  if (grad_factor) {
    p.grad_factor = grad_factor->data_ptr();
    p.grad_factor_dtype = factor_dtype("grad_factor", *grad_factor, gradients[0]);
  }
  if (row_weights) {
    p.weights.data = row_weights->data_ptr();
    p.weights.type = weight_dtype(*row_weights);
  }
  for (size_t begin = 0; begin < gradients.size();) {
    const Tensor& like = gradients[begin];
    p.dtype = hidden_dtype(like);
    const bool one_row = pooling == Pooling::cls || pooling == Pooling::last;
    p.weights.pooling = one_row ? pooling : Pooling::token;
    p.weights.seq = one_row ? like.size(like.dim() - 2) : 1;
    p.weights.D = one_row ? like.size(like.dim() - 1) : like.numel();
    p.weights.rows = like.numel() / std::max<int64_t>(p.weights.seq * p.weights.D, 1);
    p.count = 0;
    for (; begin < gradients.size() && p.count < ScaleProblem::kMaxTensors; ++begin) {
      const Tensor& gradient = gradients[begin];
      if (hidden_dtype(gradient) != p.dtype || gradient.sizes() != like.sizes()) break;
      STD_TORCH_CHECK(gradient.is_contiguous(), "scale_gradients_cuda: gradients must be contiguous");
      p.data[p.count++] = static_cast<char*>(gradient.data_ptr());
    }
    const int64_t resident = int64_t(device.multiprocessors) * kScaleBlocks;
    const int64_t per_block = 16 / dtype_size(p.dtype) * kScaleThreads;
    p.blocks = std::clamp<int64_t>((p.weights.D + per_block - 1) / per_block, 1, resident);
    const int64_t at_a_time = std::clamp<int64_t>(p.weights.rows * p.count, 1, resident / p.blocks);
    launch("alp_scale_gradients", &alp_scale_gradients, p.blocks * at_a_time, kScaleThreads, 0, stream, p);
  }
}

}  // namespace

#if defined(__CUDACC__)
STABLE_TORCH_LIBRARY_IMPL(alpkd_fast, CUDA, library) {
#else
STABLE_TORCH_LIBRARY_IMPL(alpkd_fast, CPU, library) {
#endif
  library.impl("alp_cuda", TORCH_BOX(&alp_cuda));
  library.impl("scale_gradients_cuda", TORCH_BOX(&scale_gradients_cuda));
}

}  // namespace alp::cuda
