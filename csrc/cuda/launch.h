// Calls of the CUDA runtime, each checked, with the kernel's name in the error.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>

namespace alp::cuda {

inline void check(cudaError_t error, const char* kernel, const char* call) {
  STD_TORCH_CHECK(error == cudaSuccess, "alpkd_fast: ", kernel, ": ", call, " failed: ", cudaGetErrorString(error));
}

// Makes the tensors' device the current one while it lives.
class OnDevice {
 public:
  explicit OnDevice(int32_t index) {
    if (index >= 0) guard.emplace(index);
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
};

#if defined(__CUDACC__)
// PyTorch's current stream. The function lives in libtorch_cuda, which a CPU build of PyTorch does not have and
// this library therefore does not link to: it is looked up in the process.
inline cudaStream_t current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return reinterpret_cast<Function>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  STD_TORCH_CHECK(function != nullptr, "alpkd_fast: this PyTorch has no CUDA support; install a CUDA build of it");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

template <class... P>
void launch(const char* name, void (*kernel)(P...), int64_t grid, int threads, size_t shared, cudaStream_t stream,
            const P&... arguments) {
  kernel<<<unsigned(grid), threads, shared, stream>>>(arguments...);
  check(cudaGetLastError(), name, "launch");
}
#else
inline cudaStream_t current_stream(int32_t) { return nullptr; }

template <class... P, class... Q>
void launch(const char* name, void (*kernel)(P...), int64_t grid, int threads, size_t shared, cudaStream_t,
            const Q&... arguments) {
  emulation::launches() += std::string(name) + ' ' + std::to_string(threads) + ' ';
  emulation::run(unsigned(grid), unsigned(threads), shared, [&] { kernel(arguments...); });
}
#endif

struct Device {
  int index, multiprocessors, shared_bytes, major;
};
inline Device current_device() {
  static std::mutex mutex;
  static std::map<int, Device> known;
  Device device{};
  check(cudaGetDevice(&device.index), "alp", "cudaGetDevice");
  const std::lock_guard<std::mutex> lock(mutex);
  auto [at, fresh] = known.try_emplace(device.index, device);
  if (fresh) {
    auto attribute = [&](int* value, cudaDeviceAttr which) {
      check(cudaDeviceGetAttribute(value, which, device.index), "alp", "cudaDeviceGetAttribute");
    };
    attribute(&at->second.multiprocessors, cudaDevAttrMultiProcessorCount);
    attribute(&at->second.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    attribute(&at->second.major, cudaDevAttrComputeCapabilityMajor);
  }
  return at->second;
}

// Blocks of a kernel that run on a multiprocessor at a time; allows the kernel its shared memory.
template <class Kernel>
int resident_blocks(const char* name, Kernel* kernel, const Device& device, int threads, int64_t shared) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int64_t>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  auto [at, fresh] = known.try_emplace({reinterpret_cast<const void*>(kernel), device.index, shared}, 0);
  if (fresh) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes), name,
          "cudaFuncSetAttribute");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at->second, kernel, threads, size_t(shared)), name,
          "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  }
  return std::max(at->second, 1);
}

}  // namespace alp::cuda
