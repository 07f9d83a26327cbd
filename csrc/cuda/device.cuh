// The instructions that the kernels use, each as one function. The tests supply the same functions for the
// host's compiler (tests/cuda_emulation), so that the kernels can run without a GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#if !defined(__CUDACC__)
#include <emulated_device.h>
#else

namespace alp::cuda {

#define ALP_DEVICE __device__ __forceinline__
#define ALP_DYNAMIC_SHARED(name) extern __shared__ __align__(128) char name[]

ALP_DEVICE int thread_index() { return threadIdx.x; }
ALP_DEVICE int block_size() { return blockDim.x; }
ALP_DEVICE int block_index() { return blockIdx.x; }
ALP_DEVICE int grid_size() { return gridDim.x; }
ALP_DEVICE void sync_block() { __syncthreads(); }
ALP_DEVICE void sync_warp() { __syncwarp(); }
template <class T>
ALP_DEVICE T shuffle_xor(T value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
template <class T>
ALP_DEVICE T shuffle(T value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

ALP_DEVICE float bf16_to_float(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }
ALP_DEVICE float fp16_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
ALP_DEVICE uint16_t float_to_bf16(float value) {
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
ALP_DEVICE uint16_t float_to_fp16(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// Adds 1 modulo count, after everything that this thread wrote and its block wrote before the last barrier.
ALP_DEVICE unsigned take_ticket(unsigned* ticket, unsigned count) {
  __threadfence();
  return atomicInc(ticket, count - 1);
}
ALP_DEVICE void acquire() { __threadfence(); }
ALP_DEVICE double load_uncached(const double* from) { return __ldcg(from); }

struct Bytes16 {
  uint32_t x, y, z, w;
};
ALP_DEVICE Bytes16 load16(const void* from) {
  const uint4 v = __ldg(static_cast<const uint4*>(from));
  return {v.x, v.y, v.z, v.w};
}
ALP_DEVICE Bytes16 load16_mutable(const void* from) {  // of memory that the kernel itself writes
  const uint4 v = *static_cast<const uint4*>(from);
  return {v.x, v.y, v.z, v.w};
}
// Written once, not read again by this kernel: past the caches' hot lines.
ALP_DEVICE void store16_streaming(void* to, Bytes16 v) {
  __stcs(static_cast<uint4*>(to), make_uint4(v.x, v.y, v.z, v.w));
}

}  // namespace alp::cuda

#endif
