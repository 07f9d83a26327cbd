// Registration of the compiled kernels. Their schemas are in alpkd_fast/ops.py and alpkd_fast/layer_attention_cpu.py.
#include <torch/csrc/stable/library.h>

#include "cpu/operators.h"

STABLE_TORCH_LIBRARY_IMPL(alpkd_fast, CPU, library) {
  library.impl("alp_cpu", TORCH_BOX(&alp::alp_cpu));
  library.impl("layer_attention_cpu", TORCH_BOX(&alp::layer_attention_cpu));
  library.impl("layer_attention_backward_cpu", TORCH_BOX(&alp::layer_attention_backward_cpu));
}
