// Registration of the compiled kernels. The schemas are defined in alpkd_fast/ops.py.
#include <torch/csrc/stable/library.h>

#include "cpu/alp_cpu.h"

STABLE_TORCH_LIBRARY_IMPL(alpkd_fast, CPU, library) { library.impl("alp_cpu", TORCH_BOX(&alp::alp_cpu)); }
