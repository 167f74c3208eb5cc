// Plain loops over arrays, which the compiler vectorises.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace soap_opt {

// m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  g <- m / (sqrt(v) + eps), 0 where the denominator is 0.  All [n].
void adam(float* m, float* v, float* g, int64_t n, double beta1, double beta2, double eps);
void adam(double* m, double* v, double* g, int64_t n, double beta1, double beta2, double eps);

// sum(x^2) of x [n]; inf or nan where the squared norm is not finite in x's own precision.
float sum_squares(const float* x, int64_t n);
double sum_squares(const double* x, int64_t n);

// The largest squared norm of a usable gradient. It bounds every entry of the projected gradient's square, of v and of the
// Grams, which are then finite with room for rounding.
template <typename T>
constexpr T kLargestSquaredNorm = std::numeric_limits<T>::max() / 4;

// p <- (p - step u) keep, both [n], computed in u's precision and rounded once. An entry stays where p's type cannot hold the
// new one.
void apply(float* p, const float* u, int64_t n, double step, double keep);
void apply(double* p, const double* u, int64_t n, double step, double keep);
void apply(c10::BFloat16* p, const float* u, int64_t n, double step, double keep);
void apply(c10::Half* p, const float* u, int64_t n, double step, double keep);

// The bound on two errors of Q: on every entry of (Q^T Q - I) x, for one vector x of numbers between 1 and 2 and their
// negatives, and on every column's squared norm less 1. In LAPACK's own Q the errors reach 110 eps sqrt(d) for Grams whose rows
// are multiples of each other (float64, d = 1000), and a few eps sqrt(d) for other Grams.
template <typename T>
inline T orthogonality_bound(int64_t d) {
  return 512 * std::numeric_limits<T>::epsilon() * std::sqrt(T(d));
}

// Whether q [d, d] is finite, and orthogonal within orthogonality_bound: O(d^2). room [3 d].
bool is_orthogonal(const float* q, int64_t d, float* room);
bool is_orthogonal(const double* q, int64_t d, double* room);

// The lower triangle of gram [d, d] <- beta gram + (1 - beta) sum, sum [d, d] with row stride ld.
void average_triangle(float* gram, const float* sum, int64_t ld, int64_t d, double beta);
void average_triangle(double* gram, const double* sum, int64_t ld, int64_t d, double beta);

// c [m, n] (row stride ldc) <- beta c + alpha a b for a [m, k] and b [k, n] of any strides: products too small for a BLAS call.
void small_gemm(float* c, int64_t ldc, const float* a, int64_t ai, int64_t ak, const float* b, int64_t bk, int64_t bj,
                int64_t m, int64_t n, int64_t k, double alpha, double beta);
void small_gemm(double* c, int64_t ldc, const double* a, int64_t ai, int64_t ak, const double* b, int64_t bk, int64_t bj,
                int64_t m, int64_t n, int64_t k, double alpha, double beta);

} // namespace soap_opt
