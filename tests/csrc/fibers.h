// CUDA C++ on a CPU: enough of it for g++ to compile csrc/cuda/*.cuh and .cu as they are, and to run every thread of a block as
// a fiber. Blocks run one after another, in an order drawn from a seed; within a block a fiber runs until it meets a barrier
// or a warp collective, and the next to run is drawn too. A thread that should have waited has then, almost surely, overtaken.
//
// - Shared memory is filled with NaNs before every block, and lies between two pages that may not be touched.
// - __syncthreads: all threads of the block, at the same source line, or the launch fails ("divergent"). Warp collectives:
//   all lanes of the mask, at the same line.
// - options().skipped_place turns the barriers of a line off, for tests that a missing one is caught.
//
// What this cannot show: the GPU's memory model (a shuffle orders memory here), and data races that no order of the stretches
// between barriers turns into a wrong result.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define FIBERS_ASAN 1
#else
#define FIBERS_ASAN 0
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

namespace fibers {

struct Options {
  uint64_t seed = 1;
  int skipped_place = 0;
  int shared_limit = 232448; // cudaDevAttrMaxSharedMemoryPerBlockOptin: sm_90's
};
// A line of a file: hash of the file's name * 100,000 + line (tests/csrc/harness.py has the same).
constexpr int place_of(const char* file, int line) {
  const char* name = file;
  for (const char* c = file; *c; ++c)
    if (*c == '/') name = c + 1;
  int hash = 0;
  for (; *name; ++name) hash = (hash * 31 + *name) % 20011;
  return hash * 100000 + line;
}

inline std::string line_of(int place) { return std::to_string(place % 100000); }

inline Options& options() {
  static Options value;
  return value;
}

struct Counts {
  int64_t launches = 0, switches = 0, barriers = 0; // barriers: the most __syncthreads that any block met
};
inline Counts& counts() {
  static Counts value;
  return value;
}

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 0x2545f4914f6cdd1dull) {}
  uint32_t below(uint32_t n) {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    state_ ^= state_ << 17;
    return uint32_t((state_ >> 32) * n >> 32);
  }

 private:
  uint64_t state_;
};

constexpr int kLanes = 32, kMaxThreads = 1024;
constexpr size_t kStack = FIBERS_ASAN ? 256 << 10 : 64 << 10;

// Memory between two forbidden pages; its end is at the second one, so that the first byte beyond it faults.
class GuardedMemory {
 public:
  explicit GuardedMemory(size_t bytes) : page_(sysconf(_SC_PAGESIZE)) {
    inside_ = (bytes + page_ - 1) / page_ * page_;
    base_ = static_cast<char*>(mmap(nullptr, inside_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + page_, inside_, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    begin_ = base_ + page_ + inside_ - (bytes + 15) / 16 * 16;
  }
  GuardedMemory(const GuardedMemory&) = delete;
  ~GuardedMemory() { munmap(base_, inside_ + 2 * page_); }
  char* begin() const { return begin_; }

 private:
  size_t page_, inside_;
  char *base_, *begin_;
};

enum class State { kRunnable, kBlockBarrier, kCollective, kDone };

struct Fiber {
  ucontext_t context;
  jmp_buf jump;
  bool started = false;
  State state = State::kRunnable;
  int line = 0; // where it waits
  Index3 thread;
  std::unique_ptr<GuardedMemory> stack; // fault, not silent damage, on overflow
  void* sanitizer = nullptr;
};

struct Warp {
  unsigned arrived = 0, mask = 0, generation = 0;
  int line = 0;
  uint64_t values[2][kLanes]; // a lane cannot be two collectives ahead of another: two sets suffice
};

// The block that is running.
struct Block {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  std::vector<int> runnable;
  Index3 block, blocks, threads;
  char* shared = nullptr;
  Fiber* current = nullptr;
  int count = 0, at_barrier = 0, done = 0;
  std::function<void()> body;
  ucontext_t scheduler;
  jmp_buf scheduler_jump;
  void* scheduler_sanitizer = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  std::string failure;
};
inline Block& block() {
  static Block value;
  return value;
}

// Context switches. setjmp after the first entry: swapcontext makes a system call each time, 10 times the cost; under
// AddressSanitizer swapcontext, with the sanitizer told which stack is in use.
inline void to_scheduler(bool finished = false) {
  Block& b = block();
  Fiber& self = *b.current;
  ++counts().switches;
#if FIBERS_ASAN
  __sanitizer_start_switch_fiber(finished ? nullptr : &self.sanitizer, b.scheduler_stack, b.scheduler_size);
  swapcontext(&self.context, &b.scheduler);
  __sanitizer_finish_switch_fiber(self.sanitizer, nullptr, nullptr);
#else
  (void)finished;
  if (_setjmp(self.jump) == 0) _longjmp(b.scheduler_jump, 1);
#endif
}

inline void entry() {
  Block& b = block();
#if FIBERS_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &b.scheduler_stack, &b.scheduler_size);
#endif
  b.body();
  b.current->state = State::kDone;
  ++b.done;
  to_scheduler(true);
}

inline void resume(Fiber& fiber) {
  Block& b = block();
  b.current = &fiber;
#if FIBERS_ASAN
  if (!fiber.started) {
    fiber.started = true;
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack->begin(), 0, kStack};
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, entry, 0);
  }
  __sanitizer_start_switch_fiber(&b.scheduler_sanitizer, fiber.stack->begin(), kStack);
  swapcontext(&b.scheduler, &fiber.context);
  __sanitizer_finish_switch_fiber(b.scheduler_sanitizer, nullptr, nullptr);
#else
  if (_setjmp(b.scheduler_jump) != 0) return;
  if (fiber.started) _longjmp(fiber.jump, 1);
  fiber.started = true;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack->begin();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
  setcontext(&fiber.context);
#endif
}

// Ends the launch with a message: exceptions do not cross from a fiber's stack, so that the scheduler throws.
[[noreturn]] inline void fail(const std::string& message) {
  block().failure = message;
  to_scheduler();
  abort();
}

inline void block_barrier(int line) {
  if (line == options().skipped_place) return;
  Block& b = block();
  b.current->state = State::kBlockBarrier;
  b.current->line = line;
  ++b.at_barrier;
  to_scheduler();
}

// Every lane of `mask` gives a value and gets the array of all lanes' values.
inline const uint64_t* exchange(int line, unsigned mask, uint64_t value) {
  Block& b = block();
  const int thread = b.current->thread.x, lane = thread % kLanes;
  Warp& warp = b.warps[thread / kLanes];
  if (!(mask >> lane & 1)) fail("line " + line_of(line) + ": a lane outside the mask of its own collective");
  if (warp.arrived == 0) {
    warp.mask = mask;
    warp.line = line;
  } else if (warp.mask != mask || warp.line != line) {
    fail("divergent warp: lanes at lines " + line_of(warp.line) + " and " + line_of(line));
  }
  uint64_t* values = warp.values[warp.generation & 1];
  values[lane] = value;
  warp.arrived |= 1u << lane;
  if (warp.arrived != mask) {
    b.current->state = State::kCollective;
    b.current->line = line;
    to_scheduler();
    return values;
  }
  warp.arrived = 0;
  ++warp.generation;
  for (int l = 0; l < kLanes; ++l)
    if ((mask >> l & 1) && l != lane) {
      const int other = thread - lane + l;
      b.fibers[other]->state = State::kRunnable;
      b.runnable.push_back(other);
    }
  return values;
}

template <typename T>
T shuffle(int line, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(line, mask, bits)[source & (kLanes - 1)];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned ballot(int line, unsigned mask, bool value) {
  const uint64_t* values = exchange(line, mask, value);
  unsigned result = 0;
  for (int l = 0; l < kLanes; ++l)
    if (mask >> l & 1) result |= unsigned(values[l] != 0) << l;
  return result;
}

inline void warp_barrier(int line, unsigned mask = 0xffffffffu) {
  if (line != options().skipped_place) exchange(line, mask, 0);
}

inline int lane_of_this() { return block().current->thread.x % kLanes; }

// Why the block cannot go on.
inline std::string deadlock() {
  Block& b = block();
  std::string message = "divergent: " + std::to_string(b.done) + " threads returned";
  std::vector<std::pair<int, int>> lines;
  for (int i = 0; i < b.count; ++i) {
    const Fiber& fiber = *b.fibers[i];
    if (fiber.state == State::kDone) continue;
    bool known = false;
    for (auto& [line, number] : lines) known |= line == fiber.line && ++number;
    if (!known) lines.push_back({fiber.line, 1});
  }
  for (auto& [line, number] : lines) message += ", " + std::to_string(number) + " wait at line " + line_of(line);
  return message;
}

inline void run_block(Random& random, size_t shared_bytes) {
  Block& b = block();
  GuardedMemory shared(shared_bytes);
  for (size_t i = 0; i + 4 <= (shared_bytes + 15) / 16 * 16; i += 4) {
    const uint32_t nan = 0x7fc00000u | (random.below(1 << 22));
    std::memcpy(shared.begin() + i, &nan, 4);
  }
  b.shared = shared.begin();
  while (int(b.fibers.size()) < b.count) {
    b.fibers.push_back(std::make_unique<Fiber>());
    b.fibers.back()->stack = std::make_unique<GuardedMemory>(kStack);
  }
  b.warps.assign((b.count + kLanes - 1) / kLanes, Warp());
  b.runnable.resize(b.count);
  b.at_barrier = b.done = 0;
  for (int i = 0; i < b.count; ++i) {
    Fiber& fiber = *b.fibers[i];
    fiber.started = false;
    fiber.state = State::kRunnable;
    fiber.thread = {unsigned(i), 0, 0};
    b.runnable[i] = i;
  }
  int64_t barriers = 0;
  while (b.done < b.count) {
    if (b.runnable.empty()) {
      // all that are left wait: for a barrier that everybody has reached, or in vain
      if (b.at_barrier != b.count) throw std::runtime_error(deadlock());
      for (int i = 0; i < b.count; ++i) {
        if (b.fibers[i]->line != b.fibers[0]->line) throw std::runtime_error(deadlock());
        b.fibers[i]->state = State::kRunnable;
        b.runnable.push_back(i);
      }
      b.at_barrier = 0;
      counts().barriers = std::max(counts().barriers, ++barriers);
    }
    const size_t pick = random.below(uint32_t(b.runnable.size()));
    const int next = b.runnable[pick];
    b.runnable[pick] = b.runnable.back();
    b.runnable.pop_back();
    resume(*b.fibers[next]);
    if (!b.failure.empty()) throw std::runtime_error(std::exchange(b.failure, {}));
  }
}

// kernel<<<blocks, threads, shared_bytes>>>
inline void launch(int blocks, int threads, size_t shared_bytes, std::function<void()> body) {
  if (threads < 1 || threads > kMaxThreads) throw std::runtime_error("launch of " + std::to_string(threads) + " threads");
  if (blocks < 1) throw std::runtime_error("launch of " + std::to_string(blocks) + " blocks");
  if (int64_t(shared_bytes) > options().shared_limit)
    throw std::runtime_error("launch with " + std::to_string(shared_bytes) + " bytes of shared memory");
  Random random(options().seed + counts().launches++);
  Block& b = block();
  b.body = std::move(body);
  b.count = threads;
  b.threads = {unsigned(threads), 1, 1};
  b.blocks = {unsigned(blocks), 1, 1};
  std::vector<int> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  for (int i = blocks - 1; i > 0; --i) std::swap(order[i], order[random.below(i + 1)]);
  for (int i : order) {
    b.block = {unsigned(i), 0, 0};
    run_block(random, shared_bytes);
  }
}

} // namespace fibers

#define threadIdx (::fibers::block().current->thread)
#define blockIdx (::fibers::block().block)
#define blockDim (::fibers::block().threads)
#define gridDim (::fibers::block().blocks)
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(::fibers::block().shared)
#define GRID_CONSTANT
#define LAUNCH(kernel, blocks, threads, shared, stream, ...) \
  ((void)(stream), ::fibers::launch(blocks, threads, shared, [=] { kernel(__VA_ARGS__); }))

#define FIBERS_PLACE ([] { constexpr int place = ::fibers::place_of(__FILE__, __LINE__); return place; }())
#define __syncthreads() ::fibers::block_barrier(FIBERS_PLACE)
#define __syncwarp(...) ::fibers::warp_barrier(FIBERS_PLACE __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(mask, value, source) ::fibers::shuffle(FIBERS_PLACE, mask, value, source)
#define __shfl_xor_sync(mask, value, bits) ::fibers::shuffle(FIBERS_PLACE, mask, value, ::fibers::lane_of_this() ^ (bits))
#define __ballot_sync(mask, value) ::fibers::ballot(FIBERS_PLACE, mask, value)
#define __any_sync(mask, value) (::fibers::ballot(FIBERS_PLACE, mask, value) != 0)
#define __all_sync(mask, value) (::fibers::ballot(FIBERS_PLACE, mask, value) == (mask))

using std::max;
using std::min;

// The little of the CUDA runtime that the launchers call
using cudaError_t = int;
using cudaStream_t = void*;
enum { cudaSuccess = 0, cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaFuncAttributeMaxDynamicSharedMemorySize };
inline cudaError_t cudaGetDevice(int* device) { return *device = 0; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int, int) {
  *value = fibers::options().shared_limit;
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, int, int bytes) { return bytes > fibers::options().shared_limit; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "more shared memory than the device has"; }
