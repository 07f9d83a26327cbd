// The kernels for x86-64 processors with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#define ALP_ISA avx512
#define ALP_VECTOR_BYTES 64
#define ALP_TILE_I 6
#define ALP_TILE_J 4
#define ALP_TILE_D 4
#include "row_kernel.h"

namespace alp {
const Kernels kernels_avx512 = avx512::kernels;
}  // namespace alp
#endif
