// Plain loops over arrays, vectorised by the compiler for several instruction sets and picked at load (no -march=native).
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace soap_opt {

// m <- m + (1 - b1)(g - m);  v <- b2 v + (1 - b2) g^2;  g <- m / (sqrt(v) + eps).  All [n].
void adam(float* m, float* v, float* g, int64_t n, double beta1, double beta2, double eps);
void adam(double* m, double* v, double* g, int64_t n, double beta1, double beta2, double eps);

// sum(x^2); inf or nan where the squared norm is not finite in x's own precision.
float sum_squares(const float* x, int64_t n);
double sum_squares(const double* x, int64_t n);

// p <- (p - step u) keep, computed in u's precision and rounded once.
void apply(float* p, const float* u, int64_t n, double step, double keep);
void apply(double* p, const double* u, int64_t n, double step, double keep);
void apply(c10::BFloat16* p, const float* u, int64_t n, double step, double keep);
void apply(c10::Half* p, const float* u, int64_t n, double step, double keep);

// x <- x + weight (y - x)
void lerp(float* x, const float* y, int64_t n, double weight);
void lerp(double* x, const double* y, int64_t n, double weight);

// c[i, j] (row stride ldc) <- beta c + alpha sum_k a[i, k] b[k, j], any strides: for products too small for a BLAS call.
void small_gemm(float* c, int64_t ldc, const float* a, int64_t ai, int64_t ak, const float* b, int64_t bk, int64_t bj,
                int64_t m, int64_t n, int64_t k, double alpha, double beta);
void small_gemm(double* c, int64_t ldc, const double* a, int64_t ai, int64_t ak, const double* b, int64_t bk, int64_t bj,
                int64_t m, int64_t n, int64_t k, double alpha, double beta);

} // namespace soap_opt
