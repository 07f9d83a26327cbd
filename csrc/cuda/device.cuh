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
// Also a barrier of the block
ALP_DEVICE bool any_in_block(bool value) { return __syncthreads_or(value); }
ALP_DEVICE void sync_warp() { __syncwarp(); }
template <class T>
ALP_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
ALP_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}

// A value that is not known before this point: what only rare rows need shall not be computed ahead and kept for all.
ALP_DEVICE int not_before(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
ALP_DEVICE int64_t not_before(int64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}

ALP_DEVICE float bits_float(uint32_t bits) { return __uint_as_float(bits); }
ALP_DEVICE uint32_t float_bits(float value) { return __float_as_uint(value); }
// 1 / value, for one that is neither tiny nor huge
ALP_DEVICE float reciprocal(float value) {
  float close;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(close) : "f"(value));
  return close * (2 - value * close);
}
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

// Adds 1 modulo count, after everything that this thread wrote and its block wrote before the last barrier; what the
// takers before wrote is there for this thread, and for its block behind the next barrier.
ALP_DEVICE unsigned take_ticket(unsigned* ticket, unsigned count) {
  unsigned taken;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(taken) : "l"(ticket), "r"(count - 1) : "memory");
  return taken;
}
ALP_DEVICE unsigned take_number(unsigned* next) { return atomicAdd(next, 1u); }
ALP_DEVICE double load_uncached(const double* from) { return __ldcg(from); }

struct Bytes16 {
  uint32_t x, y, z, w;
};
ALP_DEVICE Bytes16 load16(const void* from) {
  const uint4 v = *static_cast<const uint4*>(from);
  return {v.x, v.y, v.z, v.w};
}
ALP_DEVICE void store16(void* to, Bytes16 v) { *static_cast<uint4*>(to) = make_uint4(v.x, v.y, v.z, v.w); }
// Written once, not read again by this kernel: past the caches' hot lines.
ALP_DEVICE void store16_streaming(void* to, Bytes16 v) {
  __stcs(static_cast<uint4*>(to), make_uint4(v.x, v.y, v.z, v.w));
}

// A barrier among some warps of the block; id 1 … 15.
ALP_DEVICE void sync_warps(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

ALP_DEVICE uint32_t shared_address(const void* at) { return uint32_t(__cvta_generic_to_shared(at)); }

// 16 bytes from global to shared memory, in the background; a thread waits for all but its newest groups.
ALP_DEVICE void copy16_async(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
ALP_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kNewest>
ALP_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

// Whole layers at a time, in the background: what sm_90 adds. An arrival, in shared memory, counts the bytes that came;
// it is awaited once per phase, in phases 0, 1, 0, ….
using Arrival = uint64_t;
#if __CUDA_ARCH__ >= 900
ALP_DEVICE constexpr bool bulk_copies() { return true; }
ALP_DEVICE void start_arrival(Arrival* at) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(at)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
ALP_DEVICE void expect_bytes(Arrival* at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(at)), "r"(bytes)
               : "memory");
}
ALP_DEVICE void copy_bulk(void* to, const void* from, int bytes, Arrival* at) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(at))
               : "memory");
}
ALP_DEVICE void wait_arrival(Arrival* at, int phase) {
  uint32_t arrived = 0;
  while (arrived == 0)
    asm volatile(
        "{\n"
        ".reg .pred arrived;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 arrived, [%1], %2;\n"
        "selp.u32 %0, 1, 0, arrived;\n"
        "}"
        : "=r"(arrived)
        : "r"(shared_address(at)), "r"(phase)
        : "memory");
}
// What this thread wrote to shared memory is there for copies that start behind the next barrier.
ALP_DEVICE void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
ALP_DEVICE void store_bulk(void* to, const void* from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
               "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Until this thread's stores have read what they store.
ALP_DEVICE void wait_stores() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
#else
ALP_DEVICE constexpr bool bulk_copies() { return false; }
ALP_DEVICE void start_arrival(Arrival*) {}
ALP_DEVICE void expect_bytes(Arrival*, int) {}
ALP_DEVICE void copy_bulk(void*, const void*, int, Arrival*) {}
ALP_DEVICE void wait_arrival(Arrival*, int) {}
ALP_DEVICE void fence_copies() {}
ALP_DEVICE void store_bulk(void*, const void*, int) {}
ALP_DEVICE void wait_stores() {}
#endif

// Where matrices are loaded from: a shared address, to which the instruction adds constants by itself.
using SharedPointer = uint32_t;
ALP_DEVICE SharedPointer shared_pointer(const void* at) { return shared_address(at); }

// Four 8×8 matrices of 16-bit elements; lane l names row l % 8 of matrix l / 8.
ALP_DEVICE void load_matrices(uint32_t (&out)[4], SharedPointer row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}
ALP_DEVICE void load_matrices_transposed(uint32_t (&out)[4], SharedPointer row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(row)
               : "memory");
}

// The reverse: lane l names where row l % 8 of matrix l / 8 goes, each somewhere else.
ALP_DEVICE void store_matrices(SharedPointer row, const uint32_t (&words)[4]) {
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
#else
  const int lane = thread_index() % 32;
#pragma unroll
  for (int k = 0; k < 4; ++k)
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(shuffle(row, 8 * k + lane / 4) + 4 * (lane % 4)), "r"(words[k])
                 : "memory");
#endif
}

// An 8×8 matrix, of which lane l holds elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4, by columns in place of rows.
ALP_DEVICE uint32_t transposed(uint32_t word) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(word));
  return out;
}

// d (16×8) += a (16×16) b (16×8), in fp32
template <bool kBf16>
ALP_DEVICE void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kBf16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Two 16-bit values in a word, the first in its low half.
template <bool kBf16>
ALP_DEVICE uint32_t pack(float low, float high) {
  uint32_t word;
  if constexpr (kBf16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

}  // namespace alp::cuda

#endif
