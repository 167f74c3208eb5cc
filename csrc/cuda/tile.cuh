// Products of whole matrices in tiles, over the whole GPU: P = G Q before the QR of block.cuh, the rotation Q^T Q' after it.
//
// G Q and Q^T Q' are 4 of a refresh's 6.7 d^3 multiplications and additions, and unlike the others they need not wait for each
// other: a block makes one tile of a product, and a launch makes all tiles of all matrices. Every size above kWarpLimit takes
// this path. Counted, not measured, in warps' reads of shared memory, one for each clock: in a single block the two products
// would take 8,000 at d = 64, about as long as two launches, and 220,000 at d = 192. A path of its own for 33 .. 64 is not
// worth it.
#pragma once

#include "panel.cuh"

namespace soap_opt::cuda {

constexpr int kTile = 32;         // rows and columns of a tile; a strip is so many rows, or columns, of a matrix
constexpr int kTileThreads = 128; // a warp makes 8 rows of a tile, a lane 2 x 4 entries, 4 and 8 apart
constexpr int kTilePitch = kTile + 1;
constexpr int kTileWarps = kTileThreads / kWarp;

__host__ __device__ inline int strips_of(int d) { return (d + kTile - 1) / kTile; }
__host__ __device__ inline int tiles_of(int d) { return strips_of(d) * strips_of(d); }

// Floats of shared memory for a tile of a product of two matrices [d, d]: a strip [d, kTilePitch] of each, partial results
// [32].
__host__ __device__ inline int64_t tile_shared_floats(int64_t d) { return 2 * d * kTilePitch + kWarp; }

// The data of one matrix that the three kernels hand on, besides P^T [d, d], which lies in the rotation's memory. The launch's
// workspace has kTileWorkspace floats for each tile of the matrix, which is enough for this data.
constexpr int kTileWorkspace = kTile * kTile + kTile + 1;

struct Workspace {
  float* basis;     // [d, d] Q^T, because the basis is Q' already when the rotation is made
  float* estimates; // [strips, d] the part of e from the rows of each strip, in the strip's scale
  float* largest;   // [strips] the largest |G| in the rows of each strip, which decides the strip's scale

  __device__ Workspace(float* memory, int tiles_before, int d)
      : basis(memory + int64_t(tiles_before) * kTileWorkspace),
        estimates(basis + d * d),
        largest(estimates + strips_of(d) * d) {}
};

// strip[k, r] = from[k, first + r], k < d, r < kTile. Beyond the matrix, here and in fetch_rows, the edge is read: its results
// are not stored, and nvcc issues loads together where no branch divides them (16 in both, by the machine code for sm_90).
__device__ inline void fetch_columns(const float* from, int d, int first, float* strip) {
  const int lane = threadIdx.x % kWarp, column = min(first + lane, d - 1);
#pragma unroll 16
  for (int k = threadIdx.x / kWarp; k < d; k += kTileWarps) strip[k * kTilePitch + lane] = from[k * d + column];
}

// strip[k, r] = from[first + r, k]; returns the largest magnitude that the thread saw
__device__ inline float fetch_rows(const float* from, int d, int first, float* strip) {
  float largest = 0;
#pragma unroll 2
  for (int r = threadIdx.x / kWarp; r < kTile; r += kTileWarps) {
    ShortColumn row(from + min(first + r, d - 1) * d, d);
    row.each([&](int k, float entry) {
      if (k < d) strip[k * kTilePitch + r] = entry;
      largest = fmaxf(largest, fabsf(entry));
    });
  }
  return largest;
}

// The row and column, in its tile, of a thread's entry (s, t), s < 2, t < 4.
__device__ inline int tile_row(int s) { return threadIdx.x / kWarp * 8 + threadIdx.x % kWarp / 8 + 4 * s; }
__device__ inline int tile_column(int t) { return threadIdx.x % 8 + 8 * t; }

// sums[s][t] += sum_k left[k, tile_row(s)] scale right[k, tile_column(t)]
__device__ inline void tile_product(const float* left, const float* right, int d, float scale, float (&sums)[2][4]) {
  const int row = tile_row(0), column = tile_column(0);
  add_products(
      d, [=](int s, int k) { return left[k * kTilePitch + row + 4 * s]; },
      [=](int k, int t) { return scale * right[k * kTilePitch + column + 8 * t]; }, sums);
}

// The row of the table that a tile of the launch belongs to.
template <int Rows>
__device__ int row_of_tile(const Table<Rows>& table, int count, int tile) {
  int row = 0;
  for (int end = count; end - row > 1;) {
    const int middle = (row + end) / 2;
    (table.tiles[middle] <= tile ? row : end) = middle;
  }
  return row;
}

// P^T, the old basis and the estimates. A power of two scales G as in refresh_in_warp, but each strip of rows by its own
// largest entry, so that no block reads more than it multiplies. The next kernel brings the strips to one scale, which rounds
// nothing.
template <int Rows>
__global__ void __launch_bounds__(kTileThreads)
    multiply_tiles_kernel(GRID_CONSTANT const Table<Rows> table, int count, const bool* due, float* workspace) {
  DYNAMIC_SHARED(float, shared);
  const int place = row_of_tile(table, count, blockIdx.x), tile = blockIdx.x - table.tiles[place];
  const Matrix& matrix = table.rows[place];
  if (due != nullptr && !due[matrix.index]) return;
  const int d = matrix.size, strip = tile % strips_of(d);
  const int first_row = strip * kTile, first_column = tile / strips_of(d) * kTile; // of P
  float* columns = shared;                                                         // [d, kTilePitch] Q[k, first_column + r]
  float* rows = columns + d * kTilePitch;                                          // [d, kTilePitch] G[first_row + r, k]
  float* partial = rows + d * kTilePitch;                                          // [32]
  const Workspace work(workspace, table.tiles[place], d);

  fetch_columns(matrix.basis, d, first_column, columns);
  const float largest = block_reduce<true>(fetch_rows(matrix.gram, d, first_row, rows), partial);
  float sums[2][4] = {}; // of P^T
  tile_product(columns, rows, d, power_of_two_scale(largest), sums);
#pragma unroll
  for (int s = 0; s < 2; ++s) {
    const int j = first_column + tile_row(s);
    float estimate = 0;
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int i = first_row + tile_column(t);
      if (i >= d || j >= d) continue;
      const float entry = columns[i * kTilePitch + tile_row(s)];
      estimate += entry * sums[s][t];
      matrix.rotation[j * d + i] = sums[s][t];
      work.basis[j * d + i] = entry;
    }
    // eight lanes hold column j of the tile of P
    for (int offset = 4; offset > 0; offset /= 2) estimate += __shfl_xor_sync(kAllLanes, estimate, offset);
    if (j < d && tile_column(0) == 0) work.estimates[strip * d + j] = estimate;
  }
  if (first_column == 0 && threadIdx.x == 0) work.largest[strip] = largest;
}

// The rotations Q^T Q'.
template <int Rows>
__global__ void __launch_bounds__(kTileThreads)
    rotate_tiles_kernel(GRID_CONSTANT const Table<Rows> table, int count, const int32_t* outcomes, float* workspace) {
  DYNAMIC_SHARED(float, shared);
  const int place = row_of_tile(table, count, blockIdx.x), tile = blockIdx.x - table.tiles[place];
  const Matrix& matrix = table.rows[place];
  if (outcomes[matrix.index] != kRefreshed) return;
  const int d = matrix.size, first_row = tile / strips_of(d) * kTile, first_column = tile % strips_of(d) * kTile;
  float* before = shared;                 // [d, kTilePitch] Q[k, first_row + r]
  float* after = before + d * kTilePitch; // [d, kTilePitch] Q'[k, first_column + r]
  fetch_columns(matrix.basis, d, first_column, after);
  fetch_rows(Workspace(workspace, table.tiles[place], d).basis, d, first_row, before);
  __syncthreads();
  float sums[2][4] = {};
  tile_product(before, after, d, 1, sums);
#pragma unroll
  for (int s = 0; s < 2; ++s)
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int i = first_row + tile_row(s), j = first_column + tile_column(t);
      if (i < d && j < d) matrix.rotation[i * d + j] = sums[s][t];
    }
}

} // namespace soap_opt::cuda
