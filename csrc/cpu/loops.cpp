#include "loops.h"

#include <cmath>

// GCC makes one clone per instruction set and an ifunc that picks one when the library is loaded. Elsewhere (clang, MSVC,
// other processors, musl) the baseline is what there is.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__gnu_linux__)
#define SOAP_OPT_CLONES __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define SOAP_OPT_CLONES
#endif
#if defined(__GNUC__)
#define SOAP_OPT_INLINE inline __attribute__((always_inline))
#define SOAP_OPT_RESTRICT __restrict__
#else
#define SOAP_OPT_INLINE inline
#define SOAP_OPT_RESTRICT
#endif

namespace soap_opt {
namespace {

template <typename T>
SOAP_OPT_INLINE void adam_body(T* SOAP_OPT_RESTRICT m, T* SOAP_OPT_RESTRICT v, T* SOAP_OPT_RESTRICT g, int64_t n,
                               double beta1, double beta2, double eps_) {
  const T w1 = T(1 - beta1), b2 = T(beta2), w2 = T(1 - beta2), eps = T(eps_);
  for (int64_t i = 0; i < n; ++i) {
    const T gi = g[i];
    const T mi = m[i] + w1 * (gi - m[i]);
    const T vi = b2 * v[i] + w2 * gi * gi;
    m[i] = mi;
    v[i] = vi;
    g[i] = mi / (std::sqrt(vi) + eps);
  }
}

template <typename T>
SOAP_OPT_INLINE T sum_squares_body(const T* SOAP_OPT_RESTRICT x, int64_t n) {
  constexpr int64_t lanes = 64; // independent sums: the compiler may not reorder a single one
  T sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int64_t j = 0; j < lanes; ++j) sums[j] += x[i + j] * x[i + j];
  for (int64_t j = 0; i + j < n; ++j) sums[j] += x[i + j] * x[i + j];
  T total = 0;
  for (int64_t j = 0; j < lanes; ++j) total += sums[j];
  return total;
}

template <typename P, typename T>
SOAP_OPT_INLINE void apply_body(P* SOAP_OPT_RESTRICT p, const T* SOAP_OPT_RESTRICT u, int64_t n, double step_, double keep_) {
  const T step = T(step_), keep = T(keep_);
  for (int64_t i = 0; i < n; ++i) p[i] = P((T(p[i]) - step * u[i]) * keep);
}

template <typename T>
SOAP_OPT_INLINE void lerp_body(T* SOAP_OPT_RESTRICT x, const T* SOAP_OPT_RESTRICT y, int64_t n, double weight_) {
  const T weight = T(weight_);
  for (int64_t i = 0; i < n; ++i) x[i] += weight * (y[i] - x[i]);
}

template <typename T>
SOAP_OPT_INLINE void small_gemm_body(T* SOAP_OPT_RESTRICT c, int64_t ldc, const T* SOAP_OPT_RESTRICT a, int64_t ai, int64_t ak,
                                     const T* SOAP_OPT_RESTRICT b, int64_t bk, int64_t bj, int64_t m, int64_t n, int64_t k,
                                     double alpha_, double beta_) {
  const T alpha = T(alpha_), beta = T(beta_);
  for (int64_t i = 0; i < m; ++i) {
    T* row = c + i * ldc;
    for (int64_t j = 0; j < n; ++j) row[j] = beta == T(0) ? T(0) : beta * row[j];
    for (int64_t l = 0; l < k; ++l) {
      const T x = alpha * a[i * ai + l * ak];
      const T* line = b + l * bk;
      if (bj == 1)
        for (int64_t j = 0; j < n; ++j) row[j] += x * line[j];
      else
        for (int64_t j = 0; j < n; ++j) row[j] += x * line[j * bj];
    }
  }
}

} // namespace

#define SOAP_OPT_FOR(T)                                                                                                   \
  SOAP_OPT_CLONES void adam(T* m, T* v, T* g, int64_t n, double beta1, double beta2, double eps) {                          \
    adam_body<T>(m, v, g, n, beta1, beta2, eps);                                                                            \
  }                                                                                                                         \
  SOAP_OPT_CLONES T sum_squares(const T* x, int64_t n) { return sum_squares_body<T>(x, n); }                                \
  SOAP_OPT_CLONES void lerp(T* x, const T* y, int64_t n, double weight) { lerp_body<T>(x, y, n, weight); }                  \
  SOAP_OPT_CLONES void small_gemm(T* c, int64_t ldc, const T* a, int64_t ai, int64_t ak, const T* b, int64_t bk,             \
                                  int64_t bj, int64_t m, int64_t n, int64_t k, double alpha, double beta) {                 \
    small_gemm_body<T>(c, ldc, a, ai, ak, b, bk, bj, m, n, k, alpha, beta);                                                  \
  }
SOAP_OPT_FOR(float)
SOAP_OPT_FOR(double)
#undef SOAP_OPT_FOR

#define SOAP_OPT_APPLY(P, T)                                                                                              \
  SOAP_OPT_CLONES void apply(P* p, const T* u, int64_t n, double step, double keep) { apply_body<P, T>(p, u, n, step, keep); }
SOAP_OPT_APPLY(float, float)
SOAP_OPT_APPLY(double, double)
SOAP_OPT_APPLY(c10::BFloat16, float)
SOAP_OPT_APPLY(c10::Half, float)
#undef SOAP_OPT_APPLY

} // namespace soap_opt
