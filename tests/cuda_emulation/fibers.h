// Runs a grid block by block, a block's threads as fibers that take turns where they wait. The order of the
// warps is that of ALPKD_EMULATION_ORDER (forward, backward): a missing barrier shows in one of them.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace emulation {

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

constexpr int kWarp = 32;
constexpr size_t kStack = 192 << 10;

struct Warp {
  int arrived = 0, finished = 0;
  unsigned generation = 0;
  alignas(16) char exchange[kWarp][64];
};

struct Barrier {
  int arrived = 0;
  unsigned generation = 0;
};

// Copies in the background that a thread has asked for.
struct Copies {
  using Group = std::vector<std::pair<void*, const void*>>;
  Group open;
  std::deque<Group> groups;
};

// Whole layers that are on their way to shared memory, or from there.
struct BulkCopy {
  void* to;
  const void* from;
  int bytes;
};
struct Arrivals {
  bool expected = false;
  int bytes = 0;  // that were announced and have not come
  int phase = 0;
  std::vector<BulkCopy> copies;
};

struct Block {
  Barrier barriers[16];
  std::map<const void*, Arrivals> arrivals;     // by the address of the barrier in shared memory
  std::map<int, std::vector<BulkCopy>> stores;  // by thread
  std::vector<Copies> copies;
  int index = 0, grid = 1, threads = 1;
  std::vector<char> shared;
  std::vector<Warp> warps;
  int finished = 0;
  bool any = false;  // of the values that threads gave to any_in_block
};

struct Fiber {
  jmp_buf state;
  ucontext_t start;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool started = false, done = false;
};

struct Scheduler {
  Block block;
  std::vector<std::unique_ptr<Fiber>> fibers;
  jmp_buf home;
  int current = 0;
  bool backward = false;
  std::function<void()> body;
};
inline Scheduler& scheduler() {
  static Scheduler one;
  return one;
}
inline Block& block() { return scheduler().block; }
// Names and block sizes of the kernels launched since it was last cleared.
inline std::string& launches() {
  static std::string names;
  return names;
}
inline char* shared_memory() {
  const auto at = reinterpret_cast<uintptr_t>(block().shared.data());
  return block().shared.data() + (128 - at % 128) % 128;
}
inline int current_thread() { return scheduler().current; }
inline int lane() { return current_thread() % kWarp; }
inline Warp& warp() { return block().warps[current_thread() / kWarp]; }

inline void leave() {
  Fiber& fiber = *scheduler().fibers[scheduler().current];
  if (_setjmp(fiber.state) == 0) _longjmp(scheduler().home, 1);
}

inline void wait_for_warp() {
  Warp& w = warp();
  const unsigned generation = w.generation;
  if (++w.arrived == kWarp) {
    w.arrived = 0;
    ++w.generation;
    return;
  }
  if (w.finished > 0) fail("a warp waits for lanes that have returned");
  while (w.generation == generation) leave();
}

inline void wait_at(Barrier& barrier, int threads) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  if (block().finished > 0) fail("a barrier waits while other threads have returned");
  while (barrier.generation == generation) leave();
}
inline void wait_for_block() { wait_at(block().barriers[0], block().threads); }

inline void run_fiber() {
  Scheduler& s = scheduler();
  s.body();
  s.fibers[s.current]->done = true;
  ++s.block.finished;
  ++s.block.warps[s.current / kWarp].finished;
  _longjmp(s.home, 1);
}

inline void resume(int thread) {
  Scheduler& s = scheduler();
  s.current = thread;
  Fiber& fiber = *s.fibers[thread];
  if (_setjmp(s.home) != 0) return;
  if (fiber.started) _longjmp(fiber.state, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  makecontext(&fiber.start, run_fiber, 0);
  setcontext(&fiber.start);
}

inline void run(unsigned grid, unsigned threads, size_t shared_bytes, std::function<void()> body) {
  Scheduler& s = scheduler();
  s.body = std::move(body);
  while (s.fibers.size() < threads) s.fibers.push_back(std::make_unique<Fiber>());
  const char* order = std::getenv("ALPKD_EMULATION_ORDER");
  s.backward = order != nullptr && std::strcmp(order, "backward") == 0;
  const int warps = (int(threads) + kWarp - 1) / kWarp;
  for (unsigned index = 0; index < grid; ++index) {
    Block& b = s.block;
    b.index = int(index);
    b.grid = int(grid);
    b.threads = int(threads);
    b.shared.assign(shared_bytes + 128, char(0xff));  // NaN in every dtype: what is read must have been written
    b.warps.assign(warps, Warp());
    b.copies.assign(threads, Copies());
    b.arrivals.clear();
    b.stores.clear();
    b.finished = 0;
    for (unsigned t = 0; t < threads; ++t) s.fibers[t]->started = s.fibers[t]->done = false;
    while (b.finished < b.threads)
      for (int w = 0; w < warps; ++w) {
        const int chosen = s.backward ? warps - 1 - w : w;
        // A warp goes on until every lane has returned or waits for the block.
        for (unsigned before = ~0u; before != b.warps[chosen].generation;) {
          before = b.warps[chosen].generation;
          for (int l = 0; l < kWarp; ++l)
            if (!s.fibers[chosen * kWarp + l]->done) resume(chosen * kWarp + l);
        }
      }
  }
}

}  // namespace emulation

// What has been launched since the last call, for the tests.
extern "C" __attribute__((visibility("default"), used)) inline const char* alpkd_emulation_launches() {
  static std::string taken;
  taken = std::move(emulation::launches());
  emulation::launches().clear();
  return taken.c_str();
}
