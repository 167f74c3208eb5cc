// Several instruction sets in one binary; the processor's is chosen at run time, so that no -march=native is needed.
//
// A kernel is an always-inline template over the width of a vector register. SOAP_OPT_VERSIONS compiles it once for each
// instruction set and calls the one that this processor has. (GCC's target_clones would serve plain loops, but register
// tiles depend on the number of registers.)
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__GNUC__)
#define SOAP_OPT_INLINE inline __attribute__((always_inline))
#define SOAP_OPT_RESTRICT __restrict__
#define SOAP_OPT_UNROLL _Pragma("GCC unroll 16") // the whole of a short loop
#else
#define SOAP_OPT_INLINE inline
#define SOAP_OPT_RESTRICT
#define SOAP_OPT_UNROLL
#endif

#if defined(__GNUC__) && defined(__x86_64__) // clang too
#define SOAP_OPT_X86 1
#else
#define SOAP_OPT_X86 0
#endif

namespace soap_opt {

// An instruction set: the bytes of a vector register, and the number of registers.
template <int Bytes, int Registers>
struct Isa {
  static constexpr int bytes = Bytes, registers = Registers;
};
using Avx512 = Isa<64, 32>;
using Avx2 = Isa<32, 16>;
#if defined(__aarch64__)
using Baseline = Isa<16, 32>; // NEON
#else
using Baseline = Isa<16, 16>; // SSE2, or whatever the compiler makes of it
#endif

// The instruction sets, with the names of ATEN_CPU_CAPABILITY, each at the index of its level: avx512 is F, BW, DQ and VL, avx2
// includes FMA, default is the compiler's baseline.
inline constexpr const char* isa_names[] = {"default", "avx2", "avx512"};

// The level that the environment variable SOAP_OPT_CPU_CAPABILITY allows, read once: the highest where it is not set or empty,
// -1 for an unknown name (soap_opt._C does not load then, library.cpp).
inline int allowed_isa_level() {
  static const int level = [] {
    const char* name = std::getenv("SOAP_OPT_CPU_CAPABILITY");
    if (name == nullptr || *name == 0) return 2;
    for (int i = 0; i < 3; ++i)
      if (std::strcmp(name, isa_names[i]) == 0) return i;
    return -1;
  }();
  return level;
}

// The level that the engine runs with: the processor's, or the one that the environment allows where this is lower.
inline int isa_level() {
#if SOAP_OPT_X86
  static const int level = [] {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return std::max(0, std::min(allowed_isa_level(), avx512 ? 2 : avx2 ? 1 : 0));
  }();
  return level;
#else
  return 0;
#endif
}

// A register of an instruction set with its lanes of T: elementwise arithmetic.
template <typename T, typename I>
struct Vector {
  static constexpr int lanes = I::bytes / int(sizeof(T));
#if defined(__GNUC__)
  typedef T Type __attribute__((vector_size(I::bytes)));
  Type v;
  SOAP_OPT_INLINE void zero() { v = Type{}; }
  SOAP_OPT_INLINE void load(const T* x) { std::memcpy(&v, x, sizeof v); }
  SOAP_OPT_INLINE void store(T* x) const { std::memcpy(x, &v, sizeof v); }
  SOAP_OPT_INLINE void fma(T x, const Vector& y) { v += x * y.v; }
  SOAP_OPT_INLINE void add(const Vector& y) { v += y.v; }
#else
  T v[lanes];
  void zero() { std::memset(v, 0, sizeof v); }
  void load(const T* x) { std::memcpy(v, x, sizeof v); }
  void store(T* x) const { std::memcpy(x, v, sizeof v); }
  void fma(T x, const Vector& y) {
    for (int i = 0; i < lanes; ++i) v[i] += x * y.v[i];
  }
  void add(const Vector& y) {
    for (int i = 0; i < lanes; ++i) v[i] += y.v[i];
  }
#endif
};

} // namespace soap_opt

// Defines PREFIX TYPE NAME(parameters), which runs BODY<Isa>(arguments) for the best instruction set.
#if SOAP_OPT_X86
#define SOAP_OPT_VERSIONS(PREFIX, TYPE, NAME, BODY, PARAMETERS, ARGUMENTS)                                       \
  namespace {                                                                                                    \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) TYPE NAME##_avx512 PARAMETERS {         \
    return BODY<Avx512> ARGUMENTS;                                                                               \
  }                                                                                                              \
  __attribute__((target("avx2,fma"))) TYPE NAME##_avx2 PARAMETERS { return BODY<Avx2> ARGUMENTS; }               \
  }                                                                                                              \
  PREFIX TYPE NAME PARAMETERS {                                                                                  \
    const int level = isa_level();                                                                               \
    return level == 2 ? NAME##_avx512 ARGUMENTS : level == 1 ? NAME##_avx2 ARGUMENTS : BODY<Baseline> ARGUMENTS; \
  }
#else
#define SOAP_OPT_VERSIONS(PREFIX, TYPE, NAME, BODY, PARAMETERS, ARGUMENTS) \
  PREFIX TYPE NAME PARAMETERS { return BODY<Baseline> ARGUMENTS; }
#endif
