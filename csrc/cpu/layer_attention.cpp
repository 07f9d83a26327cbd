// The layer attention alone, and its gradients, by the row kernels of the loss.
#include "operators.h"
#include "rows.h"
#include "values.h"

namespace alp {
namespace {

// The options that both directions share.
struct Options {
  const std::optional<Tensor>& counted;
  const std::vector<int64_t>&map_counts, &map_layers;
  const std::optional<Tensor>& scale_tensor;
  double scale;
};

// Completes the problem's options and runs it; returns the scale's gradient. students: the queries, or the gradients
// that come in.
double run(Problem problem, const Tensors& student, const Side& students, const Tensors& teacher, const Side& teachers,
           const Tensor& attention, const Options& options) {
  const int m = int(student.size()), n = int(teacher.size());
  problem.D = student[0].size(1);
  problem.rows = student[0].size(0);
  problem.seq = 1;
  problem.m = m;
  problem.n = n;
  problem.pooling = Pooling::token;
  problem.student_dtype = hidden_dtype(student[0]);
  problem.teacher_dtype = hidden_dtype(teacher[0]);
  problem.student = students.layers.data();
  problem.teacher = teachers.layers.data();
  std::optional<Tensor> weights;
  if (options.counted) weights = torch::stable::contiguous(*options.counted);
  problem.weights = weights ? weights->data_ptr() : nullptr;
  problem.weight_type = weights ? weight_dtype(*weights) : WeightType::none;
  const std::vector<double> every_layer(m, 1.0);
  const Groups groups(m, n, options.map_counts, options.map_layers, every_layer, teachers.wanted);
  groups.hand_to(&problem);
  problem.scale = options.scale_tensor ? scalar_value(*options.scale_tensor) : options.scale;
  const std::vector<double> coefficients(m, -1.0);  // the loss has -2 omega / N where this has 1
  problem.gradient_coef = coefficients.data();
  problem.student_grad = students.wanted;
  problem.teacher_grad = teachers.wanted;
  suit_processor(&problem, students, teachers);
  problem.attention = attention.data_ptr();
  return run_rows(problem, attention.scalar_type() == ScalarType::Double).d_scale;
}

}  // namespace

std::tuple<Tensors, Tensor> layer_attention_cpu(Tensors queries, Tensors teacher, std::optional<Tensor> counted,
                                                std::vector<int64_t> map_counts, std::vector<int64_t> map_layers,
                                                std::optional<Tensor> scale_tensor, double scale) {
  const int64_t m = int64_t(queries.size()), n = int64_t(teacher.size());
  const Side students(queries, std::vector<bool>(m, true)), teachers(teacher, std::vector<bool>(n, false));
  const Tensor attention = new_tensor(queries[0], {m, queries[0].size(0), n}, queries[0].scalar_type());
  Problem problem{};
  problem.task = Task::attend;
  run(problem, queries, students, teacher, teachers, attention, {counted, map_counts, map_layers, scale_tensor, scale});
  return {students.gradients, attention};
}

std::tuple<Tensors, Tensors, Tensor> layer_attention_backward_cpu(
    Tensors grads, Tensors queries, Tensors teacher, Tensor attention, std::optional<Tensor> counted,
    std::vector<int64_t> map_counts, std::vector<int64_t> map_layers, std::optional<Tensor> scale_tensor, double scale,
    bool detach_attention, std::vector<bool> query_grad, std::vector<bool> teacher_grad, bool scale_grad) {
  const Side students(grads, query_grad), teachers(teacher, teacher_grad);
  const Side attending(queries, std::vector<bool>(queries.size(), false));
  Problem problem{};
  problem.task = Task::attend_back;
  problem.detach = detach_attention;
  problem.scale_grad = scale_grad;
  problem.query = teachers.wanted || scale_grad ? attending.layers.data() : nullptr;
  const double d_scale = run(problem, grads, students, teacher, teachers, attention,
                             {counted, map_counts, map_layers, scale_tensor, scale});
  Tensor d_scale_out = new_tensor(attention, {}, attention.scalar_type());
  fill(d_scale_out, attention.scalar_type() == ScalarType::Double, &d_scale, 1);
  return {students.gradients, teachers.gradients, d_scale_out};
}

}  // namespace alp
