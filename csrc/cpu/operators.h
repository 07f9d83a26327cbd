// The operators on the CPU, with the schemas of alpkd_fast/ops.py and alpkd_fast/layer_attention_cpu.py.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "../tensors.h"

namespace alp {

// loss, layer_losses, attention, entropy, grad_factor, d_scale, d_student, d_teacher
using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensors, Tensors>;

Outputs alp_cpu(Tensors student, Tensors teacher, std::optional<Tensor> row_weights, int64_t pooling,
                std::vector<int64_t> map_counts, std::vector<int64_t> map_layers, std::optional<Tensor> scale_tensor,
                double scale, std::vector<double> layer_weights, bool normalize, bool detach_attention, bool mean,
                std::optional<Tensor> normalizer_tensor, double normalizer, bool details,
                std::vector<bool> student_grad, std::vector<bool> teacher_grad, bool scale_grad);

// combined, attention
std::tuple<Tensors, Tensor> layer_attention_cpu(Tensors queries, Tensors teacher, std::optional<Tensor> counted,
                                                std::vector<int64_t> map_counts, std::vector<int64_t> map_layers,
                                                std::optional<Tensor> scale_tensor, double scale);

// d_queries, d_teacher, d_scale
std::tuple<Tensors, Tensors, Tensor> layer_attention_backward_cpu(
    Tensors grads, Tensors queries, Tensors teacher, Tensor attention, std::optional<Tensor> counted,
    std::vector<int64_t> map_counts, std::vector<int64_t> map_layers, std::optional<Tensor> scale_tensor, double scale,
    bool detach_attention, std::vector<bool> query_grad, std::vector<bool> teacher_grad, bool scale_grad);

}  // namespace alp
