// at::parallel_for for the step: its threads take subnormal numbers for zeros.
//
// A Gram's block, or a moment, whose gradients stay 0 decays by a constant factor a step. After some 1,700 steps it reaches the
// subnormal numbers, where rounding to nearest holds it for ever (0.95 of ten times the smallest number is ten times the
// smallest number again), and every product that meets it takes ten times as long. Flushed numbers are below 1.2e-38 (float64:
// 2.2e-308): the square root of such a v is 1e-19, far below any useful eps, and an entry of that size is far below the
// rounding of every Gram whose products do not vanish themselves.
#pragma once

#include <ATen/Context.h>
#include <ATen/Parallel.h>

#include "simd.h"

#if SOAP_OPT_X86
#include <xmmintrin.h>
#endif

namespace soap_opt {

// While such an object lives, its thread reads and writes zeros for subnormal numbers. Its end restores the thread's setting.
class FlushSubnormals {
 public:
  FlushSubnormals(const FlushSubnormals&) = delete;
#if SOAP_OPT_X86
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); } // results (bit 15) and operands (bit 6)
  ~FlushSubnormals() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#elif defined(__aarch64__) && defined(__GNUC__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" : : "r"(before_ | (uint64_t(1) << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" : : "r"(before_)); }

 private:
  uint64_t before_;
#else
  FlushSubnormals() {}
#endif
};

template <typename Function>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Function& function) {
  at::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
    const FlushSubnormals flush;
    function(from, to);
  });
}

// With torch.use_deterministic_algorithms(True): one thread for calls into BLAS or LAPACK, which split a sum into as many parts
// as there are threads. Ranks with different numbers of threads would otherwise get different bases.
class SameForAllThreads {
 public:
  SameForAllThreads() {
    if (!at::globalContext().deterministicAlgorithms() || at::in_parallel_region() || at::get_num_threads() == 1) return;
    before_ = at::get_num_threads();
    at::set_num_threads(1);
  }
  SameForAllThreads(const SameForAllThreads&) = delete;
  ~SameForAllThreads() {
    if (before_ > 0) at::set_num_threads(before_);
  }

 private:
  int before_ = 0;
};

} // namespace soap_opt
