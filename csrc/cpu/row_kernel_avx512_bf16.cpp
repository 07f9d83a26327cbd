// The kernel for x86-64 processors with AVX-512's products of bf16 too (BF16).
#if defined(__x86_64__)
#define ALP_ISA avx512_bf16
#define ALP_VECTOR_BYTES 64
#define ALP_TILE_I 6
#define ALP_TILE_J 4
#define ALP_TILE_D 4
#include "row_kernel.h"

namespace alp {
const Kernel kernel_avx512_bf16 = avx512_bf16::kernels.f32;
}  // namespace alp
#endif
