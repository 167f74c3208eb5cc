// Common parts of the eigen-refresh's kernels: reductions of a warp, scaling, a Householder reflector, the table of matrices.
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

// The matrices of one launch, passed by value. Arguments may take 32,764 bytes from CUDA 12.1 on, and 4,096 before. A launch
// passes the whole table however few rows are used. So there is also a small table, which is enough for a step of "staggered"
// refreshes.
#if !defined(__CUDACC__)
constexpr int kSmallTableRows = 4, kTableRows = 16; // every fiber has its own copy
#elif CUDART_VERSION >= 12010
constexpr int kSmallTableRows = 32, kTableRows = 740;
#else
constexpr int kSmallTableRows = 32, kTableRows = 90;
#endif
template <int Rows>
struct Table {
  Matrix rows[Rows];
  int32_t tiles[Rows]; // number of tiles of all matrices before this one, where products are made in tiles
};

constexpr unsigned kAllLanes = 0xffffffffu;

// Below this squared norm a column's squares start to lose their small terms to underflow, and the norm is taken again, scaled.
// (The matrix is scaled to a largest entry in [1, 2).)
constexpr float kTinySquare = 1e-24f;

__device__ inline float warp_sum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

__device__ inline float warp_max(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, offset));
  return x;
}

// The power of two that brings `largest` into [1, 2); 1 for 0, infinity and NaN. Scaling by it changes no bit of Q', and keeps
// the squares that matter from overflow and underflow: Grams of small gradients are of the order of 1e-20.
__device__ inline float power_of_two_scale(float largest) {
  if (!(largest > 0 && largest <= FLT_MAX)) return 1;
  const int exponent = -ilogbf(largest);
  return ldexpf(1.0f, exponent < 126 ? exponent : 126);
}

// A reflector H = I - tau v v^T, v = (1, x_2 inverse, ..), that takes (alpha, x_2, ..) to (beta, 0, ..): larfg. square: the
// sum of squares of x_2 ... A column whose squared norm is below kTinySquare is scaled before this, so that alpha - beta has a
// reciprocal.
struct Reflector {
  float tau, inverse;
};

__device__ inline Reflector make_reflector(float alpha, float square) {
  if (!(square > 0)) return {0, 0}; // zeros already: H = I
  const float beta = -copysignf(sqrtf(alpha * alpha + square), alpha);
  return {(beta - alpha) / beta, 1 / (alpha - beta)};
}

// Multiplies by the power of two that brings `largest` into [1, 2). There are two factors, because the power of two for a
// subnormal number is beyond the largest number.
struct TinyScale {
  float first, second;

  __device__ explicit TinyScale(float largest) {
    const int exponent = largest > 0 ? -ilogbf(largest) : 0, half = exponent / 2;
    first = ldexpf(1.0f, half);
    second = ldexpf(1.0f, exponent - half);
  }
  __device__ float operator()(float x) const { return x * first * second; }
};

// The test of a new basis (is_orthogonal, csrc/cpu/loops.h): probe(j) is entry j of a vector of numbers between 1 and 2 and
// their negatives. orthogonality_bound(d) bounds every entry of (Q^T Q - I) times this vector, and every column's squared norm
// less 1.
__device__ inline float probe(int j) {
  const float x = j * 0.6180339887f, entry = 1 + (x - floorf(x));
  return j % 2 == 0 ? entry : -entry;
}

__device__ inline float orthogonality_bound(int d) { return 512 * FLT_EPSILON * sqrtf(float(d)); }

__device__ inline bool is_kept(float off, float norm, float tolerance) {
  return tolerance >= 0 && (norm == 0 || sqrtf(off / norm) <= tolerance);
}

// Writes identities as order and rotation, for a matrix that keeps its basis or failed. All `threads` threads call it.
__device__ inline void write_identities(const Matrix& matrix, int thread, int threads) {
  const int d = matrix.size;
  for (int i = thread; i < d; i += threads) matrix.order[i] = i;
  for (int i = thread; i < d * d; i += threads) matrix.rotation[i] = i / d == i % d;
}

} // namespace soap_opt::cuda
