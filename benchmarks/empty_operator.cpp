// The operator's schema around no work at all: what any fused loss pays for its arguments. It allocates the outputs
// that a loss over the students needs, and reads nothing. Compiled by test_overhead.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>
#include <vector>

using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensors, Tensors> empty(
    Tensors student, Tensors teacher, std::optional<Tensor>, int64_t, std::vector<int64_t>, std::vector<int64_t>,
    std::optional<Tensor>, double, std::vector<double>, bool, bool, bool, std::optional<Tensor>, double, bool,
    std::vector<bool>, std::vector<bool>, bool) {
  auto make = [&](std::vector<int64_t> shape) { return torch::stable::new_empty(student[0], shape); };
  Tensors gradients;
  for (const Tensor& layer : student) gradients.push_back(torch::stable::new_empty(layer, layer.sizes()));
  return {make({}), make({int64_t(student.size())}), make({0}), make({0}), make({}), make({}), gradients, Tensors{}};
}

STABLE_TORCH_LIBRARY_IMPL(alpkd_fast_benchmarks, CPU, library) { library.impl("empty", TORCH_BOX(&empty)); }
