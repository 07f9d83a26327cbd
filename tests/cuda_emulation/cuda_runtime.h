// The part of the CUDA runtime that the launcher calls, for the emulation: one small device without memory
// of its own.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__

using std::max;
using std::min;
struct uint2 {
  uint32_t x, y;
};
struct float4 {
  float x, y, z, w;
};

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1;
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
};

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid"; }
// ALPKD_EMULATION_DEVICE picks one: with less shared memory, rows are shared by more warps and taken in parts.
inline cudaError_t cudaGetDevice(int* device) {
  const char* chosen = std::getenv("ALPKD_EMULATION_DEVICE");
  return *device = chosen == nullptr ? 0 : std::atoi(chosen), cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  constexpr int kShared[] = {232448, 20 << 10, 14 << 10, 12 << 10, 60 << 10, 40 << 10,
                             232448, 14 << 10, 40 << 10, 99 << 10, 24 << 10, 10 << 10, 232448};
  constexpr int kMajor[] = {9, 9, 9, 9, 9, 9, 8, 8, 8, 8, 9, 9, 9};
  constexpr int kMultiprocessors[] = {3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 512};
  *value = attribute == cudaDevAttrMultiProcessorCount      ? kMultiprocessors[device]
           : attribute == cudaDevAttrComputeCapabilityMajor ? kMajor[device]
                                                            : kShared[device];
  return cudaSuccess;
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  return *status = cudaStreamCaptureStatusNone, cudaSuccess;
}
template <class F>
cudaError_t cudaFuncSetAttribute(F*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <class F>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, F*, int, size_t shared) {
  int device, most;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *blocks = 1;
  return shared > size_t(most) ? cudaErrorInvalidValue : cudaSuccess;  // a real one fails at the launch
}
template <class T>
cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {
  return *address = &symbol, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}
