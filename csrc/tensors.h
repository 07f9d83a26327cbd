// Tensors in, plain data out: dtypes and rows. For the host side of every compiled backend.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <vector>

#include "layers.h"

namespace alp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

inline Dtype hidden_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: STD_TORCH_CHECK(false, "alpkd_fast: hidden states must be float16, bfloat16, float32 or float64");
  }
  return Dtype::f32;
}

inline WeightType weight_dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Bool: return WeightType::boolean;
    case ScalarType::Byte: return WeightType::u8;
    case ScalarType::Char: return WeightType::i8;
    case ScalarType::Short: return WeightType::i16;
    case ScalarType::Int: return WeightType::i32;
    case ScalarType::Long: return WeightType::i64;
    case ScalarType::Half: return WeightType::f16;
    case ScalarType::BFloat16: return WeightType::bf16;
    case ScalarType::Float: return WeightType::f32;
    case ScalarType::Double: return WeightType::f64;
    default: STD_TORCH_CHECK(false, "alpkd_fast: weights, scale and normalizer must be bool, u8, i8 to i64 or floats");
  }
  return WeightType::none;
}

// Contiguous, with whatever the memory holds. torch::stable::new_empty would look its operator up by name, for every
// tensor anew: a quarter of the operator's time where there are few rows.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t k = sizes.size(); k-- > 0; stride *= std::max<int64_t>(sizes[k], 1)) strides[k] = stride;
  int32_t device_type = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle tensor = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type,
                               like.get_device_index(), &tensor));
  return Tensor(tensor);
}

// Rows as the kernels want them: D contiguous elements, leading dimensions merged into at most two strides.
// False where the tensor's own strides do not allow that.
inline bool as_rows(const Tensor& tensor, Layer* layer) {
  const int64_t last = tensor.dim() - 1, size = dtype_size(hidden_dtype(tensor));
  if (tensor.size(last) > 1 && tensor.stride(last) != 1) return false;
  int64_t sizes[2] = {1, 1}, strides[2] = {0, 0};
  int used = 0;  // merged dimensions found so far, innermost first
  for (int64_t k = last - 1; k >= 0; --k) {
    const int64_t length = tensor.size(k), stride = tensor.stride(k) * size;
    if (length == 1) continue;
    if (used > 0 && stride == strides[used - 1] * sizes[used - 1]) {
      sizes[used - 1] *= length;
    } else if (used < 2) {
      sizes[used] = length;
      strides[used++] = stride;
    } else {
      return false;
    }
  }
  layer->data = static_cast<const char*>(tensor.data_ptr());
  layer->inner_stride = strides[0];
  layer->inner = used == 2 ? sizes[0] : 0;
  layer->outer_stride = strides[1];
  return true;
}

struct Side {
  std::vector<Layer> layers;
  Tensors copies;  // of layers whose strides rows cannot follow; they live as long as the call
  Tensors gradients;
  bool wanted = false;

  Side(const Tensors& tensors, const std::vector<bool>& want) : layers(tensors.size()) {
    for (size_t k = 0; k < tensors.size(); ++k) {
      Layer& layer = layers[k];
      if (!as_rows(tensors[k], &layer)) {
        copies.push_back(torch::stable::contiguous(tensors[k]));
        as_rows(copies.back(), &layer);
      }
      layer.grad = nullptr;
      if (!want[k]) continue;
      wanted = true;
      gradients.push_back(new_tensor(tensors[k], tensors[k].sizes().vec(), tensors[k].scalar_type()));
      layer.grad = static_cast<char*>(gradients.back().data_ptr());
    }
  }
};

}  // namespace alp
