// The kernels for x86-64 processors with AVX2, FMA and F16C.
#if defined(__x86_64__)
#define ALP_ISA avx2
#define ALP_VECTOR_BYTES 32
#define ALP_TILE_I 3
#define ALP_TILE_J 4
#define ALP_TILE_D 4
#include "row_kernel.h"

namespace alp {
const Kernels kernels_avx2 = avx2::kernels;
}  // namespace alp
#endif
