// What the kernels of the eigen-refresh share: reductions of a warp, scaling, one Householder reflector, the table of matrices.
#pragma once

#include <float.h>
#include <math.h>

#include "refresh_basis.h"

#ifdef __CUDACC__
#define DYNAMIC_SHARED(type, name) extern __shared__ __align__(16) type name[]
#define GRID_CONSTANT __grid_constant__
#endif

namespace soap_opt::cuda {

constexpr int kWarp = 32;

// Matrices of one launch, by value. Arguments may take 32,764 bytes from CUDA 12.1 on, 4,096 before.
#if !defined(__CUDACC__)
constexpr int kTableRows = 16; // every fiber has its own copy
#elif CUDART_VERSION >= 12010
constexpr int kTableRows = 800;
#else
constexpr int kTableRows = 100;
#endif
struct Table {
  Matrix rows[kTableRows];
};

constexpr unsigned kAllLanes = 0xffffffffu;

// Squares of a column whose norm is below this (the matrix is scaled to a largest entry in [1, 2)) start to lose their small
// terms to underflow: its norm is taken again, scaled.
constexpr float kTinySquare = 1e-24f;

__device__ inline float warp_sum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// The power of two that brings `largest` into [1, 2); 1 for 0, infinity and NaN. Scaling by it changes no bit of Q', and no
// square over- or underflows that matters: Grams of small gradients are of the order of 1e-20.
__device__ inline float power_of_two_scale(float largest) {
  if (!(largest > 0 && largest <= FLT_MAX)) return 1;
  const int exponent = -ilogbf(largest);
  return ldexpf(1.0f, exponent < 126 ? exponent : 126);
}

// A reflector H = I - tau v v^T, v = (1, x_2 / divisor, ..), that takes (alpha, x_2, ..) to (beta, 0, ..): larfg. square: the
// sum of squares of x_2 .., of everything multiplied by `scale`.
struct Reflector {
  float tau, inverse; // v_i = x_i * inverse
};

__device__ inline Reflector make_reflector(float alpha, float square, float scale) {
  if (!(square > 0)) return {0, 0}; // zeros already: H = I
  alpha *= scale;
  const float beta = -copysignf(sqrtf(alpha * alpha + square), alpha);
  return {(beta - alpha) / beta, scale / (alpha - beta)};
}

__device__ inline float scale_of_tiny(float largest) { return fminf(1 / largest, 1e37f); }

__device__ inline bool is_kept(float off, float norm, float tolerance) {
  return tolerance >= 0 && (norm == 0 || sqrtf(off / norm) <= tolerance);
}

// The result of a matrix that keeps its basis: identities. Called by all `threads` threads.
__device__ inline void write_identities(const Matrix& matrix, int thread, int threads) {
  const int d = matrix.size;
  for (int i = thread; i < d; i += threads) matrix.order[i] = i;
  for (int i = thread; i < d * d; i += threads) matrix.rotation[i] = i / d == i % d;
}

} // namespace soap_opt::cuda
