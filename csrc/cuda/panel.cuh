// Products and panels of reflectors by one block: the parts of the blocked QR. Conventions: refresh_basis.cuh.
#pragma once

#include "reflector.cuh"

namespace soap_opt::cuda {

// sums[s][t] += sum_k a(s, k) b(k, t), k < depth: the part of a product that one lane makes.
template <int M, int N, typename A, typename B>
__device__ void add_products(int depth, A a, B b, float (&sums)[M][N]) {
  for (int k = 0; k < depth; ++k) {
    float left[M], right[N];
#pragma unroll
    for (int s = 0; s < M; ++s) left[s] = a(s, k);
#pragma unroll
    for (int t = 0; t < N; ++t) right[t] = b(k, t);
#pragma unroll
    for (int s = 0; s < M; ++s)
#pragma unroll
      for (int t = 0; t < N; ++t) sums[s][t] += left[s] * right[t];
  }
}

// store(i, j, sum_k a(i, k) b(k, j)) for i < m, j < n. A warp makes tiles of 16 x 32. A lane makes 4 x 4 entries of a tile, 4
// rows and 8 columns apart: a step of k then reads 8 numbers for 16 products, without bank conflicts in matrices of odd pitch.
template <typename A, typename B, typename Store>
__device__ void block_product(int m, int n, int k, A a, B b, Store store) {
  const int lane = threadIdx.x % kWarp, row_tiles = (m + 15) / 16, tiles = row_tiles * ((n + 31) / 32);
  for (int tile = threadIdx.x / kWarp; tile < tiles; tile += blockDim.x / kWarp) {
    const int row = tile % row_tiles * 16 + lane / 8, column = tile / row_tiles * 32 + lane % 8;
    int rows[4], columns[4]; // clamped: entries outside are read from the edge, and are not stored
    float sums[4][4] = {};
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      rows[s] = min(row + 4 * s, m - 1);
      columns[s] = min(column + 8 * s, n - 1);
    }
    add_products(k, [&](int s, int l) { return a(rows[s], l); }, [&](int l, int t) { return b(l, columns[t]); }, sums);
#pragma unroll
    for (int s = 0; s < 4; ++s)
#pragma unroll
      for (int t = 0; t < 4; ++t)
        if (row + 4 * s < m && column + 8 * t < n) store(row + 4 * s, column + 8 * t, sums[s][t]);
  }
}

// A column [m] in shared or global memory, for one warp: lane l has the entries l, l + 32, .. . A column of at most 32 Rows
// entries is read at once and kept in registers until store(), with zeros beyond m. Rows = 0 takes any length, and leaves the
// entries in memory. Each step of a panel waits for the step before, and mostly for memory: a kept column is read once in a
// step and not four times.
template <int Rows>
struct Column {
  int m;
  float kept[Rows];

  __device__ Column(const float* from, int length) : m(length) {
    each([&](int i, float& entry) { entry = i < m ? from[i] : 0; });
  }
  // visit(i, entry i), or visit(i, entry i, entry i of the other column)
  template <typename Visit>
  __device__ void each(const Visit& visit) {
#pragma unroll
    for (int s = 0; s < Rows; ++s) visit(int(threadIdx.x % kWarp) + s * kWarp, kept[s]);
  }
  template <typename Visit>
  __device__ void each(const Column& other, const Visit& visit) {
#pragma unroll
    for (int s = 0; s < Rows; ++s) visit(int(threadIdx.x % kWarp) + s * kWarp, kept[s], other.kept[s]);
  }
  __device__ void store(float* to) {
    each([&](int i, float entry) {
      if (i < m) to[i] = entry;
    });
  }
};

template <>
struct Column<0> {
  float* at;
  int m;

  __device__ Column(float* column, int length) : at(column), m(length) {}
  template <typename Visit>
  __device__ void each(const Visit& visit) {
    for (int i = threadIdx.x % kWarp; i < m; i += kWarp) visit(i, at[i]);
  }
  template <typename Visit>
  __device__ void each(const Column& other, const Visit& visit) {
    for (int i = threadIdx.x % kWarp; i < m; i += kWarp) visit(i, at[i], other.at[i]);
  }
  __device__ void store(float*) {} // the entries are in memory already
};

// Long enough for every column of the block kernel and of the tiles.
using ShortColumn = Column<kBlockLimit / kWarp>;

// Turns a column into the reflector that clears it below its entry c, by one warp; returns tau to every lane. No barrier is
// needed: every lane reads and writes only its own entries, here and in the updates around this call, and entry c goes by
// shuffle.
template <int Rows>
__device__ float reflect_column(Column<Rows>& x, int c) {
  float below = 0, alpha = 0;
  x.each([&](int i, float entry) {
    below += i > c ? entry * entry : 0;
    if (i == c) alpha = entry;
  });
  below = warp_sum(below);
  alpha = __shfl_sync(kAllLanes, alpha, c % kWarp);
  if (below + alpha * alpha < kTinySquare) { // the same for every lane
    float largest = 0;
    x.each([&](int i, float entry) { largest = fmaxf(largest, i >= c ? fabsf(entry) : 0); });
    const TinyScale scaled(warp_max(largest));
    below = 0;
    x.each([&](int i, float& entry) {
      entry = i >= c ? scaled(entry) : 0;
      below += i > c ? entry * entry : 0;
    });
    below = warp_sum(below);
    alpha = scaled(alpha);
  }
  const Reflector reflector = make_reflector(alpha, below);
  x.each([&](int i, float& entry) { entry = i < c ? 0 : i == c ? 1 : entry * reflector.inverse; });
  return reflector.tau;
}

// Factors a panel of `width` <= N columns of length m, column c at panel + c * pitch, whose diagonal starts at its row 0.
// Writes the vectors V over the panel, taus [N] and, above the diagonal, dots [N, N] = V^T V. A warp owns the columns c = warp
// (mod warps). The owner of the next column updates it first and makes its reflector at once, so that there is one barrier for
// each column.
template <int N, int Rows>
__device__ void factor_columns(float* panel, int pitch, int m, int width, float* taus, float* dots) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  if (warp == 0) {
    Column<Rows> x(panel, m);
    const float tau = reflect_column(x, 0);
    x.store(panel);
    if (lane == 0) taus[0] = tau;
  }
  __syncthreads();
  for (int c = 0; c < width; ++c) {
    const Column<Rows> v(panel + c * pitch, m); // zeros before entry c
    const auto times_v = [&](Column<Rows>& x) {
      float dot = 0;
      x.each(v, [&](int, float entry, float of_v) { dot += of_v * entry; });
      return warp_sum(dot);
    };
    // The warp's columns after c, in order: c + 1 first if the warp owns it. (warps is a power of two: no division.)
    for (int j = c + 1 + ((warp - c - 1) & (warps - 1)); j < width; j += warps) {
      Column<Rows> x(panel + j * pitch, m);
      const float factor = taus[c] * times_v(x);
      x.each(v, [&](int, float& entry, float of_v) { entry -= factor * of_v; });
      if (j == c + 1) {
        const float next = reflect_column(x, j);
        if (lane == 0) taus[j] = next;
      }
      x.store(panel + j * pitch);
    }
    for (int j = warp; j < c; j += warps) { // V^T V, for T
      Column<Rows> x(panel + j * pitch, m);
      const float dot = times_v(x);
      if (lane == 0) dots[j * N + c] = dot;
    }
    __syncthreads();
  }
}

// T [N, N] of H_0 .. H_{width-1} = I - V T V^T, from taus and dots of factor_columns; 0 below the diagonal and beyond width.
// T[:, c] = -tau_c T (V^T v_c), T[c, c] = tau_c: larft. One warp makes it, a lane for each row of T: N short sums, for which
// the lane reads only its own row.
template <int N>
__device__ void make_triangle(int width, const float* taus, const float* dots, float* triangle) {
  const int i = threadIdx.x % kWarp;
  if (i >= N) return;
  for (int c = 0; c < N; ++c) {
    float sum = 0;
    for (int l = i; l < c && c < width; ++l) sum += triangle[i * N + l] * dots[l * N + c];
    triangle[i * N + c] = c >= width || i > c ? 0 : i == c ? taus[c] : -taus[c] * sum;
  }
}

// Sum (or maximum) over the block, returned to every thread. partial [32]: not in other use since the last barrier.
template <bool kMaximum>
__device__ float block_reduce(float x, float* partial) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  x = kMaximum ? warp_max(x) : warp_sum(x);
  if (lane == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = lane < warps ? partial[lane] : 0;
  return kMaximum ? warp_max(x) : warp_sum(x);
}

} // namespace soap_opt::cuda
