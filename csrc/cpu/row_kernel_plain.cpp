// The kernels for any processor: 16-byte vectors, which every compiler lowers to what there is.
#define ALP_ISA plain
#define ALP_VECTOR_BYTES 16
#define ALP_TILE_I 2
#define ALP_TILE_J 4
#define ALP_TILE_D 2
#include "row_kernel.h"

namespace alp {
const Kernels kernels_plain = plain::kernels;
}  // namespace alp
