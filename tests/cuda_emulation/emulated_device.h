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
inline bool any_in_block(bool value) {
  if (value) emulation::block().any = true;
  emulation::wait_for_block();
  const bool any = emulation::block().any;
  emulation::wait_for_block();
  emulation::block().any = false;
  return any;
}
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
inline T shuffle_xor(T value, int mask) {
  return from_lane(value, emulation::lane() ^ mask);
}
template <class T>
inline T shuffle(T value, int lane) {
  return from_lane(value, lane);
}

template <class T>
inline T not_before(T value) {
  return value;
}
inline float reciprocal(float value) { return 1 / value; }
inline float bits_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t float_bits(float value) { return std::bit_cast<uint32_t>(value); }
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
inline unsigned take_number(unsigned* next) { return (*next)++; }
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
inline void store16(void* to, Bytes16 v) {
  require_aligned(to, 16);
  *static_cast<Bytes16*>(to) = v;
}
inline void store16_streaming(void* to, Bytes16 v) { store16(to, v); }

inline void sync_warps(int id, int threads) { emulation::wait_at(emulation::block().barriers[id], threads); }

// A copy takes place as late as the program allows, or (order "backward") at once: it must be right either way.
inline void copy16_async(void* to, const void* from) {
  require_aligned(to, 16);
  require_aligned(from, 16);
  if (emulation::scheduler().backward) return void(std::memcpy(to, from, 16));
  emulation::block().copies[emulation::current_thread()].open.push_back({to, from});
}
inline void commit_copies() {
  emulation::Copies& copies = emulation::block().copies[emulation::current_thread()];
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
}
template <int kNewest>
inline void wait_copies() {
  emulation::Copies& copies = emulation::block().copies[emulation::current_thread()];
  for (; copies.groups.size() > size_t(kNewest); copies.groups.pop_front())
    for (const auto& [to, from] : copies.groups.front()) std::memcpy(to, from, 16);
}

// Whole layers: like the copies above, as late as the program allows or at once.
using Arrival = uint64_t;
inline bool bulk_copies() {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 9;
}
inline void start_arrival(Arrival* at) { emulation::block().arrivals[at] = {}; }
inline emulation::Arrivals& arrival_of(Arrival* at) {
  const auto found = emulation::block().arrivals.find(at);
  if (found == emulation::block().arrivals.end()) emulation::fail("an arrival was not started");
  return found->second;
}
inline void expect_bytes(Arrival* at, int bytes) {
  emulation::Arrivals& arrivals = arrival_of(at);
  if (arrivals.expected) emulation::fail("an arrival is expected twice in a phase");
  arrivals.expected = true;
  arrivals.bytes += bytes;
}
inline void copy_now(const emulation::BulkCopy& copy) { std::memcpy(copy.to, copy.from, copy.bytes); }
inline void require_whole_vectors(const void* to, const void* from, int bytes) {
  require_aligned(to, 16);
  require_aligned(from, 16);
  if (bytes % 16 != 0) emulation::fail("a copy is not of 16-byte steps");
}
inline void copy_bulk(void* to, const void* from, int bytes, Arrival* at) {
  require_whole_vectors(to, from, bytes);
  emulation::Arrivals& arrivals = arrival_of(at);
  arrivals.bytes -= bytes;
  if (emulation::scheduler().backward)
    copy_now({to, from, bytes});
  else
    arrivals.copies.push_back({to, from, bytes});
}
inline void wait_arrival(Arrival* at, int phase) {
  emulation::Arrivals& arrivals = arrival_of(at);
  while (arrivals.phase % 2 == phase) {
    if (arrivals.expected && arrivals.bytes == 0) {
      for (const auto& copy : arrivals.copies) copy_now(copy);
      arrivals = {false, 0, arrivals.phase + 1, {}};
    } else {
      emulation::leave();
    }
  }
}
inline void fence_copies() {}
inline void store_bulk(void* to, const void* from, int bytes) {
  require_whole_vectors(to, from, bytes);
  if (emulation::scheduler().backward)
    copy_now({to, from, bytes});
  else
    emulation::block().stores[emulation::current_thread()].push_back({to, from, bytes});
}
inline void wait_stores() {
  auto& stores = emulation::block().stores[emulation::current_thread()];
  for (const auto& store : stores) copy_now(store);
  stores.clear();
}

// PTX ISA, "Warp-level matrix load instruction: ldmatrix": thread l receives, of every matrix, the elements
// 2 (l % 4) and 2 (l % 4) + 1 of row l / 4; with .trans of column l / 4.
inline void load_rows(uint32_t (&out)[4], const void* row, bool transposed) {
  require_aligned(row, 16);
  emulation::Warp& warp = emulation::warp();
  std::memcpy(warp.exchange[emulation::lane()], &row, sizeof row);
  emulation::wait_for_warp();
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t elements[2];
    for (int k = 0; k < 2; ++k) {
      const int along = 2 * (emulation::lane() % 4) + k, across = emulation::lane() / 4;
      const uint16_t* from;
      std::memcpy(&from, warp.exchange[8 * matrix + (transposed ? along : across)], sizeof from);
      elements[k] = from[transposed ? across : along];
    }
    std::memcpy(&out[matrix], elements, 4);
  }
  emulation::wait_for_warp();
}
using SharedPointer = const char*;
inline SharedPointer shared_pointer(const char* at) { return at; }
inline void load_matrices(uint32_t (&out)[4], SharedPointer row) { load_rows(out, row, false); }
inline void load_matrices_transposed(uint32_t (&out)[4], SharedPointer row) { load_rows(out, row, true); }

// PTX ISA, "Warp-level matrix store instruction: stmatrix": the same elements, to the rows that the threads name.
inline void store_matrices(SharedPointer row, const uint32_t (&words)[4]) {
  require_aligned(row, 16);
  for (int matrix = 0; matrix < 4; ++matrix) {
    const SharedPointer of_lane = from_lane(row, 8 * matrix + emulation::lane() / 4);
    std::memcpy(const_cast<char*>(of_lane) + 4 * (emulation::lane() % 4), &words[matrix], 4);
  }
}

// PTX ISA, "Warp-level matrix transpose instruction: movmatrix": elements lie as for ldmatrix.
inline uint32_t transposed(uint32_t word) {
  uint16_t elements[2];
  for (int k = 0; k < 2; ++k) {
    const int row = 2 * (emulation::lane() % 4) + k, column = emulation::lane() / 4;
    const uint32_t given = from_lane(word, 4 * row + column / 2);
    elements[k] = uint16_t(given >> 16 * (column % 2));
  }
  std::memcpy(&word, elements, 4);
  return word;
}

// PTX ISA, "Matrix fragments for mma.m16n8k16 with floating-point type". With group = lane / 4, t = lane % 4:
// element i of A (8 per thread) is row group + 8·(i / 2 % 2), column 2t + i % 2 + 8·(i / 4);
// element i of B (4) is row 2t + i % 2 + 8·(i / 2), column group;
// element i of C (4) is row group + 8·(i / 2), column 2t + i % 2.
template <bool kBf16>
inline void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Given {
    uint16_t a[8], b[4];
  } given;
  std::memcpy(given.a, a, 16);
  std::memcpy(given.b, &b0, 4);
  std::memcpy(given.b + 2, &b1, 4);
  emulation::Warp& warp = emulation::warp();
  std::memcpy(warp.exchange[emulation::lane()], &given, sizeof given);
  emulation::wait_for_warp();
  auto widen = [](uint16_t bits) { return kBf16 ? bf16_to_float(bits) : fp16_to_float(bits); };
  auto of_lane = [&](int lane) -> const Given& { return *reinterpret_cast<const Given*>(warp.exchange[lane]); };
  for (int i = 0; i < 4; ++i) {
    const int row = emulation::lane() / 4 + 8 * (i / 2), column = 2 * (emulation::lane() % 4) + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int thread_of_k = k % 8 / 2;
      const Given& from_a = of_lane(row % 8 * 4 + thread_of_k);
      const Given& from_b = of_lane(column * 4 + thread_of_k);
      d[i] += widen(from_a.a[k % 2 + 2 * (row / 8) + 4 * (k / 8)]) * widen(from_b.b[k % 2 + 2 * (k / 8)]);
    }
  }
  emulation::wait_for_warp();
}

template <bool kBf16>
inline uint32_t pack(float low, float high) {
  const uint16_t l = kBf16 ? float_to_bf16(low) : float_to_fp16(low);
  const uint16_t h = kBf16 ? float_to_bf16(high) : float_to_fp16(high);
  return uint32_t(h) << 16 | l;
}

}  // namespace alp::cuda
