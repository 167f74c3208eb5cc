// Device code of the eigen-refresh: P = G Q, e = diag(Q^T P), Q' = qr(columns of P by falling e).Q, rotation = Q^T Q'.
//
// One warp refreshes a matrix up to kWarpLimit (warp.cuh). A larger matrix that fits in a block's shared memory takes three
// kernels: P in tiles, over the whole GPU (tile.cuh); the steps from P to Q', one long chain of reflectors, by one block
// (block.cuh, with the panels of panel.cuh); the rotation in tiles. For still larger matrices ATen makes the products, and
// factor_panel_kernel, in this file, factors the panels.
//
// These files are CUDA C++ and nothing else: nvcc compiles them for the GPU, and with tests/csrc/fibers.h g++ compiles them to
// run each block's threads as fibers. All QRs use Householder reflectors: CholeskyQR would bring in the square of the Gram's
// condition number.
//
// Conventions: a matrix in shared memory is stored by columns, (i, j) at [i + j * pitch] with an odd pitch, so that neither a
// warp along a column nor one across columns meets bank conflicts. R is never stored, because only Q is wanted. A
// reflector overwrites its whole column, with zeros above and 1 on the diagonal, so that products with V need no masks.
#pragma once

#include "block.cuh"
#include "warp.cuh"

namespace soap_opt::cuda {

// Matrices that outgrow shared memory: the panels of a blocked QR, with ATen's products between them.

constexpr int kSmallPanelShared = 2 * kLargePanel * kLargePanel + kLargePanel; // T, V^T V, taus

// Factors one panel of each matrix, in shared memory where the panel fits (in_shared), else in global memory.
__global__ void __launch_bounds__(kBlockThreads) factor_panel_kernel(float* transposed, float* triangles, int size, int first,
                                                                     int width, const int32_t* outcomes, bool in_shared) {
  DYNAMIC_SHARED(float, shared);
  if (outcomes[blockIdx.x] != kRefreshed) return;
  float* triangle = shared;                           // [kLargePanel, kLargePanel]
  float* dots = triangle + kLargePanel * kLargePanel; // [kLargePanel, kLargePanel]
  float* taus = dots + kLargePanel * kLargePanel;     // [kLargePanel]
  const int m = size - first, pitch = in_shared ? m : size;
  float* rows = transposed + (int64_t(blockIdx.x) * size + first) * size; // the panel's columns, [width, size]
  float* panel = in_shared ? taus + kLargePanel : rows + first;           // column c at panel + c * pitch
  if (in_shared) {
    // each thread fetches the entries that it uses first: no barrier
    for (int c = threadIdx.x / kWarp; c < width; c += blockDim.x / kWarp)
      for (int i = threadIdx.x % kWarp; i < m; i += kWarp) panel[c * pitch + i] = rows[int64_t(c) * size + first + i];
  }
  factor_columns<kLargePanel, 0>(panel, pitch, m, width, taus, dots);
  if (threadIdx.x < kWarp) make_triangle<kLargePanel>(width, taus, dots, triangle);
  __syncthreads();
  if (in_shared) {
    for (int c = threadIdx.x / kWarp; c < width; c += blockDim.x / kWarp)
      for (int i = threadIdx.x % kWarp; i < m; i += kWarp) rows[int64_t(c) * size + first + i] = panel[c * pitch + i];
  }
  float* out = triangles + int64_t(blockIdx.x) * kLargePanel * kLargePanel;
  for (int i = threadIdx.x; i < kLargePanel * kLargePanel; i += blockDim.x) out[i] = triangle[i];
}

} // namespace soap_opt::cuda
