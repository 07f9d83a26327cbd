// csrc/cuda/device.cuh for a host compiler: the same functions, written from the PTX manual alone.
// A block's threads are fibers on one host thread. A fiber runs until it waits for its warp or its block.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "fibers.h"

namespace alp::cuda {

#define ALP_DEVICE inline
#define ALP_DYNAMIC_SHARED(name) char* const name = emulation::shared_memory()

inline int thread_index() { return emulation::current_thread(); }
inline int block_size() { return emulation::block().threads; }
inline int block_index() { return emulation::block().index; }
inline int grid_size() { return emulation::block().grid; }
inline void sync_block() { emulation::wait_for_block(); }
inline void sync_warp() { emulation::wait_for_warp(); }

// What every lane of the warp gave, seen by every lane.
template <class T>
inline T from_lane(T value, int lane) {
  emulation::Warp& warp = emulation::warp();
  static_assert(sizeof(T) <= sizeof warp.exchange[0]);
  std::memcpy(warp.exchange[emulation::lane()], &value, sizeof value);
  emulation::wait_for_warp();
  std::memcpy(&value, warp.exchange[lane], sizeof value);
  emulation::wait_for_warp();
  return value;
}
template <class T>
inline T shuffle_xor(T value, int mask) { return from_lane(value, emulation::lane() ^ mask); }
template <class T>
inline T shuffle(T value, int lane) { return from_lane(value, lane); }

inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }
inline float fp16_to_float(uint16_t bits) { return float(std::bit_cast<_Float16>(bits)); }
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return 0x7fff;
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}
inline uint16_t float_to_fp16(float value) { return std::bit_cast<uint16_t>(_Float16(value)); }

inline unsigned take_ticket(unsigned* ticket, unsigned count) {
  const unsigned before = *ticket;
  *ticket = before >= count - 1 ? 0 : before + 1;
  return before;
}
inline void acquire() {}
inline double load_uncached(const double* from) { return *from; }

struct Bytes16 {
  uint32_t x, y, z, w;
};
inline void require_aligned(const void* address, int bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) emulation::fail("an access is not aligned to its size");
}
inline Bytes16 load16(const void* from) {
  require_aligned(from, 16);
  return *static_cast<const Bytes16*>(from);
}
inline Bytes16 load16_mutable(const void* from) { return load16(from); }
inline void store16_streaming(void* to, Bytes16 v) {
  require_aligned(to, 16);
  *static_cast<Bytes16*>(to) = v;
}

}  // namespace alp::cuda
