// The loss: tensors in, the plain Problem of the row kernels out.
#include <algorithm>
#include <cmath>

#include "operators.h"
#include "rows.h"
#include "values.h"

namespace alp {
namespace {

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
  groups.hand_to(&problem);
  problem.scale = scale;
  problem.gradient_coef = gradient_coef.data();
  problem.normalize = normalize;
  problem.detach = detach_attention;
  problem.student_grad = students.wanted;
  problem.teacher_grad = teachers.wanted;
  problem.scale_grad = scale_grad;
  suit_processor(&problem, students, teachers);
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
