// The elementwise stages of a step and the checks of a basis, as loops that the compiler vectorises for each instruction set.
#include "loops.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "simd.h"

namespace soap_opt {
namespace {

template <typename I, typename T>
SOAP_OPT_INLINE void adam_body(T* SOAP_OPT_RESTRICT m, T* SOAP_OPT_RESTRICT v, T* SOAP_OPT_RESTRICT g, int64_t n, double beta1,
                               double beta2, double eps_) {
  const T b1 = T(beta1), w1 = T(1 - beta1), b2 = T(beta2), w2 = T(1 - beta2), eps = T(eps_);
  for (int64_t i = 0; i < n; ++i) {
    const T gi = g[i];
    const T mi = b1 * m[i] + w1 * gi; // m + w1 (g - m) loses digits of g where w1 is near 1
    const T vi = b2 * v[i] + w2 * gi * gi;
    m[i] = mi;
    v[i] = vi;
    const T denominator = std::sqrt(vi) + eps;
    g[i] = denominator > 0 ? mi / denominator : T(0); // eps may be 0
  }
}

template <typename I, typename T>
SOAP_OPT_INLINE T sum_squares_body(const T* SOAP_OPT_RESTRICT x, int64_t n) {
  constexpr int64_t lanes = 64; // independent sums, because the compiler may not reorder a single sum
  T sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int64_t j = 0; j < lanes; ++j) sums[j] += x[i + j] * x[i + j];
  for (int64_t j = 0; i + j < n; ++j) sums[j] += x[i + j] * x[i + j];
  T total = 0;
  for (int64_t j = 0; j < lanes; ++j) total += sums[j];
  return total;
}

template <typename I, typename P, typename T>
SOAP_OPT_INLINE void apply_body(P* SOAP_OPT_RESTRICT p, const T* SOAP_OPT_RESTRICT u, int64_t n, double step_, double keep_) {
  const T step = T(step_), keep = T(keep_);
  constexpr T largest = std::numeric_limits<T>::max();
  for (int64_t i = 0; i < n; ++i) {
    const P next = P((T(p[i]) - step * u[i]) * keep);
    p[i] = std::abs(T(next)) <= largest ? next : p[i]; // (a float16 overflows at 65504)
  }
}

// Entry j of the vector x that is_orthogonal multiplies by. Magnitudes are between 1 and 2 and all different, so that errors of
// an ordinary kind do not cancel.
template <typename T>
SOAP_OPT_INLINE T probe(int64_t j) {
  const double x = double(j) * 0.6180339887498949;
  return T(j % 2 == 0 ? 1 + (x - int64_t(x)) : -1 - (x - int64_t(x)));
}

template <typename I, typename T>
SOAP_OPT_INLINE bool is_orthogonal_body(const T* SOAP_OPT_RESTRICT q, int64_t d, T* SOAP_OPT_RESTRICT room) {
  T *SOAP_OPT_RESTRICT x = room, *SOAP_OPT_RESTRICT norms = room + d, *SOAP_OPT_RESTRICT back = room + 2 * d;
  for (int64_t j = 0; j < d; ++j) x[j] = probe<T>(j);
  std::fill(norms, norms + 2 * d, T(0));
  constexpr int64_t lanes = 64 / sizeof(T);
  for (int64_t i = 0; i < d; ++i) {
    const T* SOAP_OPT_RESTRICT row = q + i * d;
    T sums[lanes] = {}, y = 0; // y = (Q x)_i
    int64_t j = 0;
    for (; j + lanes <= d; j += lanes)
      for (int64_t l = 0; l < lanes; ++l) sums[l] += row[j + l] * x[j + l];
    for (int64_t l = 0; j + l < d; ++l) sums[l] += row[j + l] * x[j + l];
    for (int64_t l = 0; l < lanes; ++l) y += sums[l];
    for (j = 0; j < d; ++j) {
      norms[j] += row[j] * row[j];
      back[j] += row[j] * y;
    }
  }
  const T bound = orthogonality_bound<T>(d);
  bool good = true;
  for (int64_t j = 0; j < d; ++j) good &= std::abs(norms[j] - 1) <= bound && std::abs(back[j] - x[j]) <= bound; // false for NaN
  return good;
}

template <typename I, typename T>
SOAP_OPT_INLINE void average_triangle_body(T* SOAP_OPT_RESTRICT gram, const T* SOAP_OPT_RESTRICT sum, int64_t ld, int64_t d,
                                           double beta_) {
  const T beta = T(beta_), weight = T(1 - beta_);
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j <= i; ++j) gram[i * d + j] = beta * gram[i * d + j] + weight * sum[i * ld + j];
}

constexpr int64_t kNarrowDepth = 64; // rows of b that narrow_gemm has room for

// small_gemm for at most N columns: a row of c in registers. b is copied where it does not lie in rows of N.
template <int N, typename T>
SOAP_OPT_INLINE void narrow_gemm(T* SOAP_OPT_RESTRICT c, int64_t ldc, const T* SOAP_OPT_RESTRICT a, int64_t ai, int64_t ak,
                                 const T* SOAP_OPT_RESTRICT b, int64_t bk, int64_t bj, int64_t m, int64_t n, int64_t k, T alpha,
                                 T beta) {
  using V = Vector<T, Isa<N* int(sizeof(T)), 16>>;
  T room[kNarrowDepth * N];
  if (bj != 1 || n < N) {
    for (int64_t l = 0; l < k; ++l)
      for (int64_t j = 0; j < N; ++j) room[l * N + j] = j < n ? b[l * bk + j * bj] : T(0);
    b = room;
    bk = N;
  }
  for (int64_t i = 0; i < m; ++i) {
    T row[N] = {};
    for (int64_t j = 0; j < n && beta != T(0); ++j) row[j] = beta * c[i * ldc + j];
    V sum, line;
    sum.load(row);
    for (int64_t l = 0; l < k; ++l) {
      line.load(b + l * bk);
      sum.fma(alpha * a[i * ai + l * ak], line);
    }
    if (n == N) {
      sum.store(c + i * ldc);
    } else {
      sum.store(row);
      for (int64_t j = 0; j < n; ++j) c[i * ldc + j] = row[j];
    }
  }
}

template <typename I, typename T>
SOAP_OPT_INLINE void small_gemm_body(T* SOAP_OPT_RESTRICT c, int64_t ldc, const T* SOAP_OPT_RESTRICT a, int64_t ai, int64_t ak,
                                     const T* SOAP_OPT_RESTRICT b, int64_t bk, int64_t bj, int64_t m, int64_t n, int64_t k,
                                     double alpha_, double beta_) {
  const T alpha = T(alpha_), beta = T(beta_);
  if (n <= 8 && m > 1 && k <= kNarrowDepth) {
    if (n <= 4)
      narrow_gemm<4>(c, ldc, a, ai, ak, b, bk, bj, m, n, k, alpha, beta);
    else
      narrow_gemm<8>(c, ldc, a, ai, ak, b, bk, bj, m, n, k, alpha, beta);
    return;
  }
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

#define SOAP_OPT_FOR(T)                                                                                                     \
  SOAP_OPT_VERSIONS(, void, adam, adam_body, (T * m, T * v, T * g, int64_t n, double beta1, double beta2, double eps),      \
                    (m, v, g, n, beta1, beta2, eps))                                                                        \
  SOAP_OPT_VERSIONS(, T, sum_squares, sum_squares_body, (const T* x, int64_t n), (x, n))                                    \
  SOAP_OPT_VERSIONS(, bool, is_orthogonal, is_orthogonal_body, (const T* q, int64_t d, T* room), (q, d, room))              \
  SOAP_OPT_VERSIONS(, void, average_triangle, average_triangle_body,                                                        \
                    (T * gram, const T* sum, int64_t ld, int64_t d, double beta), (gram, sum, ld, d, beta))                 \
  SOAP_OPT_VERSIONS(, void, small_gemm, small_gemm_body,                                                                    \
                    (T * c, int64_t ldc, const T* a, int64_t ai, int64_t ak, const T* b, int64_t bk, int64_t bj, int64_t m, \
                     int64_t n, int64_t k, double alpha, double beta),                                                      \
                    (c, ldc, a, ai, ak, b, bk, bj, m, n, k, alpha, beta))
SOAP_OPT_FOR(float)
SOAP_OPT_FOR(double)
#undef SOAP_OPT_FOR

#define SOAP_OPT_APPLY(P, T) \
  SOAP_OPT_VERSIONS(, void, apply, apply_body, (P * p, const T* u, int64_t n, double step, double keep), (p, u, n, step, keep))
SOAP_OPT_APPLY(float, float)
SOAP_OPT_APPLY(double, double)
SOAP_OPT_APPLY(c10::BFloat16, float)
SOAP_OPT_APPLY(c10::Half, float)
#undef SOAP_OPT_APPLY

} // namespace soap_opt
