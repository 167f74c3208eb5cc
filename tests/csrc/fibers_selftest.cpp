// Kernels with faults that fibers.h has to report: fibers_selftest CASE [seed]. Returns 0 for a right result, 1 for a wrong
// one, 3 with the reason where the launch fails; a shared-memory fault ends it with SIGSEGV (or AddressSanitizer's report).

#include "fibers.h"

#include <cstdlib>
#include <iostream>

namespace {

constexpr int kThreads = 96;

// out[i] = in[i + 1], through shared memory
__global__ void rotate(const float* in, float* out, bool with_barrier) {
  DYNAMIC_SHARED(float, shared);
  const int i = threadIdx.x;
  shared[i] = in[i];
  if (with_barrier) __syncthreads();
  out[i] = shared[(i + 1) % kThreads];
}

__global__ void sum_of_warps(const float* in, float* out) {
  float x = in[threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  if (!__all_sync(0xffffffffu, x == __shfl_sync(0xffffffffu, x, 0))) x = -1;
  if (__ballot_sync(0xffffffffu, threadIdx.x % 2) != 0xaaaaaaaau) x = -1;
  out[threadIdx.x] = x;
}

__global__ void two_barriers() {
  if (threadIdx.x % 2) __syncthreads();
  else
    __syncthreads();
}

__global__ void barrier_of_some() {
  if (threadIdx.x < 40) __syncthreads();
}

__global__ void half_a_warp() {
  if (threadIdx.x % 32 < 16) __syncwarp();
}

__global__ void foreign_mask() { __syncwarp(0x0000ffffu); }

__global__ void write_beyond(int offset) {
  DYNAMIC_SHARED(float, shared);
  if (threadIdx.x == 5) shared[offset] = 1;
}

__global__ void read_unset(float* out) {
  DYNAMIC_SHARED(float, shared);
  out[threadIdx.x] = shared[threadIdx.x];
}

} // namespace

int main(int argc, char** argv) try {
  const std::string name = argc > 1 ? argv[1] : "";
  if (argc > 2) fibers::options().seed = atoi(argv[2]);
  const size_t bytes = kThreads * sizeof(float);
  std::vector<float> in(kThreads), out(kThreads, -1.0f), wanted(kThreads);
  std::iota(in.begin(), in.end(), 0.0f);
  float *from = in.data(), *to = out.data();
  for (int i = 0; i < kThreads; ++i) wanted[i] = in[(i + 1) % kThreads];
  if (name == "barrier") {
    LAUNCH(rotate, 3, kThreads, bytes, nullptr, from, to, true);
  } else if (name == "missing_barrier") {
    LAUNCH(rotate, 3, kThreads, bytes, nullptr, from, to, false);
  } else if (name == "collectives") {
    LAUNCH(sum_of_warps, 1, kThreads, 0, nullptr, from, to);
    for (int i = 0; i < kThreads; ++i) wanted[i] = 32 * (i / 32 * 32 + 15.5f);
  } else if (name == "two_barriers") {
    LAUNCH(two_barriers, 1, kThreads, 0, nullptr);
  } else if (name == "barrier_of_some") {
    LAUNCH(barrier_of_some, 1, kThreads, 0, nullptr);
  } else if (name == "half_a_warp") {
    LAUNCH(half_a_warp, 1, kThreads, 0, nullptr);
  } else if (name == "foreign_mask") {
    LAUNCH(foreign_mask, 1, kThreads, 0, nullptr);
  } else if (name == "beyond_the_end") {
    LAUNCH(write_beyond, 1, kThreads, bytes, nullptr, kThreads);
  } else if (name == "before_the_beginning") {
    LAUNCH(write_beyond, 1, kThreads, 4096, nullptr, -1);
  } else if (name == "unset_shared_memory") {
    LAUNCH(read_unset, 1, kThreads, bytes, nullptr, to);
  } else if (name == "too_much_shared_memory") {
    LAUNCH(read_unset, 1, kThreads, fibers::options().shared_limit + 1, nullptr, to);
  } else {
    throw std::runtime_error("no case " + name);
  }
  return out == wanted ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 3;
}
