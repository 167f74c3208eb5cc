// Device code of the eigen-refresh: P = G Q, e = diag(Q^T P), Q' = qr(columns of P by falling e).Q, rotation = Q^T Q'.
//
// Up to kWarpLimit a warp does all of it. Up to what fits in a block's shared memory there are three kernels: P in tiles, over
// the whole GPU; the rest up to Q', which is one long chain of reflectors, by one block a matrix; the rotation in tiles. Larger
// ones: ATen's products and factor_panel_kernel.
//
// The file is CUDA C++ and nothing else; nvcc compiles it for the GPU, and tests/csrc/fibers.h gives g++ what it needs to run
// each block's threads as fibers. Householder reflectors throughout: CholeskyQR would need the Gram's condition number squared.
//
// Conventions: a matrix in shared memory is stored by columns, (i, j) at [i + j * pitch] with an odd pitch, so that neither a
// warp along a column nor one across columns meets bank conflicts. R is never stored: only Q is wanted, so a reflector
// overwrites its column whole, zeros above, 1 on the diagonal, and products with V need no masks.
#pragma once

#include "reflector.cuh"

namespace soap_opt::cuda {

// ---------------------------------------------------------------------------------------------------------- d <= 32: a warp

// Floats of shared memory of a warp
constexpr int kWarpShared = kWarpLimit * kWarpLimit + 3 * kWarpLimit;

constexpr int kWarpThreads = 128; // four matrices a block

// The whole refresh of one matrix, d <= D <= 32, by one warp. Lane j has column j in registers, padded with zeros to D; what
// all lanes need (G, reflectors, the old Q) goes through `rows` [D, D] and is read as a broadcast. Every lane has the whole
// reflector, so that its norm and its products with the lane's column need no shuffles.
template <int D>
__device__ void refresh_in_warp(const Matrix& matrix, float tolerance, int32_t* outcome, float* rows) {
  float* estimates = rows + D * D; // [D] e
  float* taus = estimates + D;     // [D]
  float* inverses = taus + D;      // [D]
  const int lane = threadIdx.x % kWarp, d = matrix.size;
  const bool mine = lane < d;

  // Global memory <-> rows, each lane its column: loops that are not unrolled whole. Between global memory and registers they
  // would be, and 32 addresses that the first and the last of them share would cost as many registers throughout.
  const auto fetch = [&](const float* from) {
    float largest = 0;
    if (lane >= D) return largest;
#pragma unroll 8
    for (int i = 0; i < D; ++i) {
      const float entry = mine && i < d ? from[i * d + lane] : 0;
      rows[i * D + lane] = entry;
      largest = fmaxf(largest, fabsf(entry));
    }
    return largest;
  };

  // P = G Q
  float old[D], x[D];
  fetch(matrix.basis);
#pragma unroll
  for (int i = 0; i < D; ++i) old[i] = lane < D ? rows[i * D + lane] : 0;
  const float scale = power_of_two_scale(warp_max(fetch(matrix.gram)));
  if (lane < D) {
#pragma unroll 8
    for (int i = 0; i < D; ++i) rows[i * D + lane] *= scale;
  }
  __syncwarp();
  float estimate = 0, square = 0, off = 0;
#pragma unroll
  for (int i = 0; i < D; ++i) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < D; ++k) sum += rows[i * D + k] * old[k];
    x[i] = sum;
    estimate += old[i] * sum;
    square += sum * sum;
  }
#pragma unroll
  for (int i = 0; i < D; ++i) off += (x[i] - old[i] * estimate) * (x[i] - old[i] * estimate);
  const float norm = warp_sum(square);
  const bool finite = norm <= FLT_MAX;
  if (!finite || is_kept(warp_sum(off), norm, tolerance)) {
    write_identities(matrix, lane, kWarp);
    if (lane == 0) *outcome = finite ? kKept : kFailed;
    return;
  }

  // Columns stay where they are; a lane's rank is its column's place.
  if (lane < D) estimates[lane] = estimate;
  __syncwarp();
  int rank = 0;
  for (int j = 0; j < d; ++j) rank += estimates[j] > estimate || (estimates[j] == estimate && j < lane);
  if (mine) matrix.order[rank] = lane;

  // Householder, column by column; rows[k] keeps column k as it was met
  for (int k = 0; k < d; ++k) {
    if (mine && rank == k) {
#pragma unroll
      for (int i = 0; i < D; ++i) rows[k * D + i] = x[i];
    }
    __syncwarp();
    float v[D];
    float below, alpha;
    for (bool scaled = false;; scaled = true) {
      alpha = rows[k * D + k];
      below = 0;
#pragma unroll
      for (int i = 0; i < D; ++i) {
        v[i] = i < k ? 0 : rows[k * D + i];
        below += i > k ? v[i] * v[i] : 0;
      }
      // The same for every lane; and when a lane has its maximum, all have read the column
      if (scaled || !(below + alpha * alpha < kTinySquare)) break;
      const TinyScale scale_up(warp_max(lane >= k && lane < D ? fabsf(rows[k * D + lane]) : 0));
      if (lane < D) rows[k * D + lane] = scale_up(rows[k * D + lane]);
      __syncwarp();
    }
    const Reflector reflector = make_reflector(alpha, below);
    float dot = 0;
#pragma unroll
    for (int i = 0; i < D; ++i) {
      v[i] = i == k ? 1 : v[i] * reflector.inverse;
      dot += v[i] * x[i];
    }
    dot *= reflector.tau;
#pragma unroll
    for (int i = 0; i < D; ++i) x[i] -= dot * v[i];
    if (lane == 0) {
      taus[k] = reflector.tau;
      inverses[k] = reflector.inverse;
    }
  }

  // Q' = H_0 .. H_{d-1}: the reflectors on the identity, last to first. Lane j makes column j.
  __syncwarp();
#pragma unroll
  for (int i = 0; i < D; ++i) x[i] = i == lane;
  for (int k = d - 1; k >= 0; --k) {
    const float inverse = inverses[k];
    float v[D];
    float dot = 0;
#pragma unroll
    for (int i = 0; i < D; ++i) {
      v[i] = i < k ? 0 : i == k ? 1 : rows[k * D + i] * inverse;
      dot += v[i] * x[i];
    }
    dot *= taus[k];
#pragma unroll
    for (int i = 0; i < D; ++i) x[i] -= dot * v[i];
  }

  // Whatever the Gram was: nothing but an orthogonal Q' is written. y = Q' probe, a row a lane (each begins elsewhere: their
  // places in `rows` are D apart), then Q'^T y, a column a lane.
  __syncwarp();
  if (lane < D) {
#pragma unroll
    for (int i = 0; i < D; ++i) rows[i * D + lane] = x[i];
  }
  __syncwarp();
  if (mine) {
    float y = 0;
#pragma unroll 1
    for (int j = 0; j < d; ++j) {
      const int column = j + lane < d ? j + lane : j + lane - d;
      y += rows[lane * D + column] * probe(column);
    }
    estimates[lane] = y;
  }
  __syncwarp();
  float back = 0, length = 0;
  if (mine) {
#pragma unroll 1
    for (int i = 0; i < d; ++i) {
      const float entry = rows[i * D + lane];
      back += entry * estimates[i];
      length += entry * entry;
    }
  }
  const float bound = orthogonality_bound(d);
  const bool good = !mine || (fabsf(length - 1) <= bound && fabsf(back - probe(lane)) <= bound); // false for NaN
  if (warp_max(good ? 0 : 1) > 0) {
    write_identities(matrix, lane, kWarp);
    if (lane == 0) *outcome = kFailed;
    return;
  }

  // Q^T Q'. The old Q is read again, and the new one: 64 registers less since then. (No barrier before `rows` is written again:
  // every lane's sums, which are all that it read of it, went into the maximum.)
#pragma unroll
  for (int i = 0; i < D; ++i) x[i] = lane < D ? rows[i * D + lane] : 0;
  fetch(matrix.basis);
  __syncwarp();
#pragma unroll 2
  for (int i = 0; i < d; ++i) {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < D; ++k) sum += rows[k * D + i] * x[k];
    if (mine) matrix.rotation[i * d + lane] = sum;
  }
  __syncwarp();
  if (mine) {
#pragma unroll
    for (int i = 0; i < D; ++i) rows[i * D + lane] = x[i];
    for (int i = 0; i < d; ++i) matrix.basis[i * d + lane] = rows[i * D + lane];
  }
  if (lane == 0) *outcome = kRefreshed;
}

// Four blocks on an SM: left alone, ptxas takes so many registers for sm_100 that two fit.
template <int Rows>
__global__ void __launch_bounds__(kWarpThreads, 4)
    refresh_in_warps_kernel(GRID_CONSTANT const Table<Rows> table, int count, const bool* due, float tolerance,
                            int32_t* outcomes) {
  DYNAMIC_SHARED(float, shared);
  const int warp = threadIdx.x / kWarp, position = blockIdx.x * (blockDim.x / kWarp) + warp;
  if (position >= count) return;
  const Matrix& matrix = table.rows[position]; // (a copy would cost ten registers)
  int32_t* outcome = outcomes + matrix.index;
  float* rows = shared + warp * kWarpShared;
  if (due != nullptr && !due[matrix.index]) {
    const bool written = *outcome == kKept; // by an earlier call, which a CUDA graph replays again and again
    __syncwarp();
    if (written) return;
    write_identities(matrix, threadIdx.x % kWarp, kWarp);
    if (threadIdx.x % kWarp == 0) *outcome = kKept;
  } else if (matrix.size <= 8) {
    refresh_in_warp<8>(matrix, tolerance, outcome, rows);
  } else if (matrix.size <= 16) {
    refresh_in_warp<16>(matrix, tolerance, outcome, rows);
  } else {
    refresh_in_warp<32>(matrix, tolerance, outcome, rows);
  }
}

// ----------------------------------------------------------------------------------------------------- products and panels

// sums[s][t] += sum_k a(s, k) b(k, t), k < depth: a lane's share of a product.
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

// store(i, j, sum_k a(i, k) b(k, j)) for i < m, j < n: a warp makes tiles of 16 x 32, a lane 4 x 4 entries of one, 4 and 8
// apart, so that a step of k reads 8 numbers for 16 products, without bank conflicts in matrices of odd pitch.
template <typename A, typename B, typename Store>
__device__ void block_product(int m, int n, int k, A a, B b, Store store) {
  const int lane = threadIdx.x % kWarp, row_tiles = (m + 15) / 16, tiles = row_tiles * ((n + 31) / 32);
  for (int tile = threadIdx.x / kWarp; tile < tiles; tile += blockDim.x / kWarp) {
    const int row = tile % row_tiles * 16 + lane / 8, column = tile / row_tiles * 32 + lane % 8;
    int rows[4], columns[4]; // clamped: what lies outside is read from the edge, and not stored
    float sums[4][4] = {};
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      rows[s] = min(row + 4 * s, m - 1);
      columns[s] = min(column + 8 * s, n - 1);
    }
    add_products(
        k, [&](int s, int l) { return a(rows[s], l); }, [&](int l, int t) { return b(l, columns[t]); }, sums);
#pragma unroll
    for (int s = 0; s < 4; ++s)
#pragma unroll
      for (int t = 0; t < 4; ++t)
        if (row + 4 * s < m && column + 8 * t < n) store(row + 4 * s, column + 8 * t, sums[s][t]);
  }
}

// A column [m] in shared or global memory, a warp's: lane l has entries l, l + 32, .. . Up to 32 Rows of them are read together
// and kept in registers, zeros beyond m, until store(); Rows = 0: of any number, and where they are. Each step of a panel waits
// for the one before it, and what it waits for most is memory: kept, a column is read once in a step and not four times.
template <int Rows>
struct Column {
  int m;
  float kept[Rows];

  __device__ Column(const float* from, int length) : m(length) {
    each([&](int i, float& entry) { entry = i < m ? from[i] : 0; });
  }
  // visit(i, entry i), or visit(i, entry i, entry i of another)
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
  __device__ void store(float*) {} // it is there
};

// Of every column that the block kernel and the tiles have
using ShortColumn = Column<kBlockLimit / kWarp>;

// Turns a column into the reflector that clears it below its entry c. By one warp; returns tau to every lane. Every lane reads
// and writes its own entries alone, here as in the updates around it, and entry c goes by shuffle: no barrier is needed.
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

// Factors a panel of `width` <= N columns of length m, column c at panel + c * pitch, whose diagonal starts at its row 0:
// leaves the vectors V, taus [N] and, above the diagonal, dots [N, N] = V^T V. A warp owns the columns c = warp (mod warps). It
// brings the next column up to date first and makes its reflector at once: one barrier a column.
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
    const Column<Rows> v(panel + c * pitch, m); // 0 before c
    const auto times_v = [&](Column<Rows>& x) {
      float dot = 0;
      x.each(v, [&](int, float entry, float of_v) { dot += of_v * entry; });
      return warp_sum(dot);
    };
    // The warp's columns behind c, from the first on: c + 1 if that is one. (warps is a power of two: no division.)
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
// T[:, c] = -tau_c T (V^T v_c), T[c, c] = tau_c: larft. N short sums by one warp, a lane a row, which reads only its own row of
// T: no exchange.
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

// Sum (or maximum) over the block, to every thread. partial [32], not used otherwise since the last barrier.
template <bool kMaximum>
__device__ float block_reduce(float x, float* partial) {
  const int lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp;
  x = kMaximum ? warp_max(x) : warp_sum(x);
  if (lane == 0) partial[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = lane < warps ? partial[lane] : 0;
  return kMaximum ? warp_max(x) : warp_sum(x);
}

// -------------------------------------------------------------------------------------- products in tiles, over all the GPU

// G Q and Q^T Q' are 4 of a refresh's 6.7 d^3 multiplications and additions, and nothing in them has to wait, as the rest does:
// a block makes one tile of a product, a launch all tiles of all matrices, over the whole GPU. So for every size above
// kWarpLimit. Counted, not measured, in warps' reads of shared memory, one a clock: of a block the two products would take
// 8,000 at d = 64, about what two launches cost, and 220,000 at d = 192. A path of its own for 33 .. 64 is not worth it.

constexpr int kTile = 32;         // rows and columns of a tile; 32 rows, or columns, of a matrix are a strip
constexpr int kTileThreads = 128; // a warp makes 8 rows of a tile, a lane 2 x 4 entries, 4 and 8 apart
constexpr int kTilePitch = kTile + 1;
constexpr int kTileWarps = kTileThreads / kWarp;

__host__ __device__ inline int strips_of(int d) { return (d + kTile - 1) / kTile; }
__host__ __device__ inline int tiles_of(int d) { return strips_of(d) * strips_of(d); }

// Floats of shared memory of a tile of a product of matrices [d, d]: a strip of each, [d, kTilePitch], partial results [32].
__host__ __device__ inline int64_t tile_shared_floats(int64_t d) { return 2 * d * kTilePitch + kWarp; }

// What the three kernels pass on of one matrix, besides P^T [d, d], which lies where the rotation will be. Each tile of the
// matrix brings so many floats to the launch's workspace that it has room.
constexpr int kTileWorkspace = kTile * kTile + kTile + 1;

struct Workspace {
  float* basis;     // [d, d] Q^T: the basis itself is Q' when the rotation is made
  float* estimates; // [strips, d] e, of the rows of each strip and in its scale
  float* largest;   // [strips] the largest |G| of each strip's rows, which decides its scale

  __device__ Workspace(float* memory, int tiles_before, int d)
      : basis(memory + int64_t(tiles_before) * kTileWorkspace),
        estimates(basis + d * d),
        largest(estimates + strips_of(d) * d) {}
};

// strip[k, r] = from[k, first + r], k < d, r < kTile. Beyond the matrix, here as below, its edge: what comes of that is not
// stored, and nvcc sends off together loads that no branch divides (16 in both, by the machine code for sm_90).
__device__ inline void fetch_columns(const float* from, int d, int first, float* strip) {
  const int lane = threadIdx.x % kWarp, column = min(first + lane, d - 1);
#pragma unroll 16
  for (int k = threadIdx.x / kWarp; k < d; k += kTileWarps) strip[k * kTilePitch + lane] = from[k * d + column];
}

// strip[k, r] = from[first + r, k]; returns the largest of what the thread saw
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
  for (int behind = count; behind - row > 1;) {
    const int middle = (row + behind) / 2;
    (table.tiles[middle] <= tile ? row : behind) = middle;
  }
  return row;
}

// P^T, the old basis and the estimates. A power of two scales G as in refresh_in_warp, but a strip of rows by its own largest
// entry: no block reads more than it multiplies, and the next kernel brings the strips together, which rounds nothing.
template <int Rows>
__global__ void __launch_bounds__(kTileThreads)
    multiply_tiles_kernel(GRID_CONSTANT const Table<Rows> table, int count, const bool* due, float* workspace) {
  DYNAMIC_SHARED(float, shared);
  const int place = row_of_tile(table, count, blockIdx.x), tile = blockIdx.x - table.tiles[place];
  const Matrix& matrix = table.rows[place];
  if (due != nullptr && !due[matrix.index]) return;
  const int d = matrix.size, strip = tile % strips_of(d);
  const int first_row = strip * kTile, first_column = tile / strips_of(d) * kTile; // of P
  float* columns = shared;                // [d, kTilePitch] Q[k, first_column + r]
  float* rows = columns + d * kTilePitch; // [d, kTilePitch] G[first_row + r, k]
  float* partial = rows + d * kTilePitch; // [32]
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
    // eight lanes have column j of the tile of P
    for (int offset = 4; offset > 0; offset /= 2) estimate += __shfl_xor_sync(kAllLanes, estimate, offset);
    if (j < d && tile_column(0) == 0) work.estimates[strip * d + j] = estimate;
  }
  if (first_column == 0 && threadIdx.x == 0) work.largest[strip] = largest;
}

// Q^T Q'
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

// ------------------------------------------------------------------------------------------ shared memory: a block a matrix

// Shared memory of the block kernel, in floats: A [d columns of odd pitch], W [kPanel, d], T, V^T V [kPanel, kPanel],
// taus [kPanel], partial results of the warps [2, 32].
__host__ __device__ inline int64_t block_shared_floats(int64_t d) {
  return d * (d | 1) + kPanel * d + 2 * kPanel * kPanel + kPanel + 2 * kWarp;
}

// From P to Q' for one matrix that fits into shared memory, by one block: P is sorted on its way in, factored, and Q' formed
// in place of V. T of every panel waits in the rotation's memory, which is free between P^T and the rotation: 16 d floats of
// shared memory less, and d = 192 fits on sm_80.
__device__ inline void refresh_in_block(const Matrix& matrix, const Workspace& work, float tolerance, int32_t* outcome,
                                        float* shared) {
  const int d = matrix.size, pitch = d | 1, thread = threadIdx.x, threads = blockDim.x, strips = strips_of(d);
  const int lane = thread % kWarp, warp = thread / kWarp, warps = threads / kWarp;
  float* a = shared;                        // [d columns, pitch]
  float* w = a + d * pitch;                 // [kPanel, d]; before that a row [d] of e, and of places
  float* triangle = w + kPanel * d;         // [kPanel, kPanel]
  float* dots = triangle + kPanel * kPanel; // [kPanel, kPanel]
  float* taus = dots + kPanel * kPanel;     // [kPanel]; before that, of each strip of P, what brings it to the scale of all
  float* partial = taus + kPanel;           // [2, 32]
  // In the rotation's memory: P^T [d, d]; when that is read, T of every panel [panels, kPanel, kPanel], at most
  // kPanel (d + kPanel - 1) <= d^2 numbers for d > 32
  float* triangles = matrix.rotation;

  // e, and by counting each column's place
  static_assert(kBlockLimit <= kTile * kPanel, "a scale for each strip where the taus will be");
  float* scales = taus;                        // [kPanel], 0 beyond the strips
  float* estimates = w;                        // [d]
  int* places = reinterpret_cast<int*>(w + d); // [d]
  float largest = 0;
  for (int s = 0; s < strips; ++s) largest = fmaxf(largest, work.largest[s]);
  for (int s = thread; s < kPanel; s += threads)
    scales[s] = s < strips ? power_of_two_scale(largest) / power_of_two_scale(work.largest[s]) : 0;
  __syncthreads();
  float square = 0, off = 0;
  for (int j = thread; j < d; j += threads) {
    float estimate = 0;
    for (int s = 0; s < strips; ++s) estimate += scales[s] * work.estimates[s * d + j];
    if (!(fabsf(estimate) <= FLT_MAX)) square = INFINITY; // places would be none
    estimates[j] = estimate;
  }
  __syncthreads();
  for (int j = thread; j < d; j += threads) {
    const float estimate = estimates[j];
    int rank = 0;
    for (int l = 0; l < d; ++l) rank += estimates[l] > estimate || (estimates[l] == estimate && l < j);
    places[j] = rank;
  }
  __syncthreads();

  // P sorted, and whether it is finite and is to be refreshed
  for (int j = warp; j < d; j += warps) {
    ShortColumn column(matrix.rotation + j * d, d);
    column.each([&](int i, float& entry) {
      entry *= scales[i / kTile];
      square += entry * entry;
    });
    if (tolerance >= 0) {
      const ShortColumn old(work.basis + j * d, d);
      column.each(old, [&](int, float entry, float of_old) {
        const float rest = entry - of_old * estimates[j];
        off += rest * rest;
      });
    }
    column.store(a + places[j] * pitch);
  }
  const float norm = block_reduce<false>(square, partial);
  if (tolerance >= 0) off = block_reduce<false>(off, partial + kWarp);
  const bool finite = norm <= FLT_MAX;
  if (!finite || is_kept(off, norm, tolerance)) {
    write_identities(matrix, thread, threads);
    if (thread == 0) *outcome = finite ? kKept : kFailed;
    return;
  }
  for (int j = thread; j < d; j += threads) matrix.order[places[j]] = j;

  // geqrf
  for (int first = 0; first < d; first += kPanel) {
    const int width = min(kPanel, d - first), behind = first + width, n = d - behind, m = d - first;
    float* panel = a + first + first * pitch;
    factor_columns<kPanel, kBlockLimit / kWarp>(panel, pitch, m, width, taus, dots);
    // T, by the last warp, which W = V^T A leaves free: there are more warps than tiles of 32 columns
    if (warp == warps - 1) make_triangle<kPanel>(width, taus, dots, triangle);
    if (n > 0)
      block_product(
          width, n, m, [=](int c, int k) { return panel[k + c * pitch]; },
          [=](int k, int j) { return a[first + k + (behind + j) * pitch]; },
          [=](int c, int j, float sum) { w[c * n + j] = sum; });
    __syncthreads();
    if (n == 0) break; // T of the last panel stays where it is
    for (int i = thread; i < kPanel * kPanel; i += threads) triangles[first * kPanel + i] = triangle[i];
    // W <- T^T W, a column a thread
    for (int j = thread; j < n; j += threads) {
      float column[kPanel];
#pragma unroll
      for (int c = 0; c < kPanel; ++c) column[c] = c < width ? w[c * n + j] : 0;
#pragma unroll
      for (int c = 0; c < kPanel; ++c) {
        float sum = 0;
#pragma unroll
        for (int l = 0; l <= c; ++l) sum += triangle[l * kPanel + c] * column[l];
        if (c < width) w[c * n + j] = sum;
      }
    }
    __syncthreads();
    // A <- A - V W, in the rows that are still to be factored
    block_product(
        m - width, n, width, [=](int i, int c) { return panel[width + i + c * pitch]; },
        [=](int c, int j) { return w[c * n + j]; },
        [=](int i, int j, float sum) { a[behind + i + (behind + j) * pitch] -= sum; });
    __syncthreads();
  }

  // orgqr: (I - V T V^T) on what the panels behind have made, then the panel's own columns in place of V
  for (int first = (d - 1) / kPanel * kPanel; first >= 0; first -= kPanel) {
    const int width = min(kPanel, d - first), behind = first + width, n = d - behind, m = d - first;
    float* panel = a + first + first * pitch;
    // W = V^T Q; rows `first` .. `behind` of these columns are zeros that were never written
    if (n > 0)
      block_product(
          width, n, n, [=](int c, int k) { return panel[width + k + c * pitch]; },
          [=](int k, int j) { return a[behind + k + (behind + j) * pitch]; },
          [=](int c, int j, float sum) { w[c * n + j] = sum; });
    // M = T V_1^T, V_1 the panel's first `width` rows
    for (int i = threads - 1 - thread; i < kPanel * kPanel; i += threads) { // the last warps first: W leaves them free
      const int row = i / kPanel, column = i % kPanel;
      float sum = 0;
      if (column < width)
        for (int l = row; l <= column; ++l) sum += triangle[row * kPanel + l] * panel[column + l * pitch];
      dots[i] = sum;
    }
    __syncthreads();
    // W <- T W, a column a thread
    for (int j = thread; j < n; j += threads) {
      float column[kPanel];
#pragma unroll
      for (int c = 0; c < kPanel; ++c) column[c] = c < width ? w[c * n + j] : 0;
#pragma unroll
      for (int c = 0; c < kPanel; ++c) {
        float sum = 0;
#pragma unroll
        for (int l = c; l < kPanel; ++l) sum += triangle[c * kPanel + l] * column[l];
        if (c < width) w[c * n + j] = sum;
      }
    }
    __syncthreads();
    if (n > 0)
      block_product(
          m, n, width, [=](int i, int c) { return panel[i + c * pitch]; }, [=](int c, int j) { return w[c * n + j]; },
          [=](int i, int j, float sum) {
            float* entry = a + first + i + (behind + j) * pitch;
            *entry = (i < width ? 0 : *entry) - sum;
          });
    __syncthreads();
    // (I - V T V^T) of the identity's columns: a row a thread
    for (int i = thread; i < m; i += threads) {
      float row[kPanel];
#pragma unroll
      for (int c = 0; c < kPanel; ++c) row[c] = c < width ? panel[i + c * pitch] : 0;
#pragma unroll
      for (int c = 0; c < kPanel; ++c) {
        float sum = i == c;
#pragma unroll
        for (int l = 0; l <= c; ++l) sum -= row[l] * dots[l * kPanel + c];
        if (c < width) panel[i + c * pitch] = sum;
      }
    }
    // T of the panel that comes next
    if (first > 0)
      for (int i = thread; i < kPanel * kPanel; i += threads) triangle[i] = triangles[(first - kPanel) * kPanel + i];
    __syncthreads();
  }

  // Whatever the Gram was: nothing but an orthogonal Q' is written. y = Q' probe, a row a thread, then Q'^T y, a column a thread
  for (int i = thread; i < d; i += threads) {
    float y = 0;
    for (int j = 0; j < d; ++j) y += a[i + j * pitch] * probe(j);
    w[i] = y;
  }
  __syncthreads();
  float wrong = 0;
  for (int j = thread; j < d; j += threads) {
    float back = 0, length = 0;
    for (int i = 0; i < d; ++i) {
      const float entry = a[i + j * pitch];
      back += entry * w[i];
      length += entry * entry;
    }
    const float bound = orthogonality_bound(d);
    if (!(fabsf(length - 1) <= bound && fabsf(back - probe(j)) <= bound)) wrong = 1; // for NaN too
  }
  if (block_reduce<true>(wrong, partial) > 0) {
    write_identities(matrix, thread, threads);
    if (thread == 0) *outcome = kFailed;
    return;
  }

  // Q <- Q'; what is left to make is the rotation
  for (int i = warp; i < d; i += warps)
#pragma unroll 4
    for (int j = lane; j < d; j += kWarp) matrix.basis[i * d + j] = a[i + j * pitch];
  if (thread == 0) *outcome = kRefreshed;
}

constexpr int kBlockThreads = 512;

// A block for each matrix from row `first` of the table on.
template <int Rows>
__global__ void __launch_bounds__(kBlockThreads)
    refresh_in_blocks_kernel(GRID_CONSTANT const Table<Rows> table, int first, const bool* due, float tolerance,
                             int32_t* outcomes, float* workspace) {
  DYNAMIC_SHARED(float, shared);
  const int place = first + blockIdx.x;
  const Matrix matrix = table.rows[place];
  int32_t* outcome = outcomes + matrix.index;
  if (due != nullptr && !due[matrix.index]) {
    const bool written = *outcome == kKept; // as above
    __syncthreads();
    if (written) return;
    write_identities(matrix, threadIdx.x, blockDim.x);
    if (threadIdx.x == 0) *outcome = kKept;
    return;
  }
  refresh_in_block(matrix, Workspace(workspace, table.tiles[place], matrix.size), tolerance, outcome, shared);
}

// ------------------------------------------------------------------------------------ larger: panels of a blocked QR (ATen)

constexpr int kSmallPanelShared = 2 * kLargePanel * kLargePanel + kLargePanel; // T, V^T V, taus

// A panel is factored in shared memory where it fits (in_shared), else where it lies.
__global__ void __launch_bounds__(kBlockThreads)
    factor_panel_kernel(float* transposed, float* triangles, int size, int first, int width, const int32_t* outcomes,
                        bool in_shared) {
  DYNAMIC_SHARED(float, shared);
  if (outcomes[blockIdx.x] != kRefreshed) return;
  float* triangle = shared;                              // [kLargePanel, kLargePanel]
  float* dots = triangle + kLargePanel * kLargePanel;    // [kLargePanel, kLargePanel]
  float* taus = dots + kLargePanel * kLargePanel;        // [kLargePanel]
  const int m = size - first, pitch = in_shared ? m : size;
  float* rows = transposed + (int64_t(blockIdx.x) * size + first) * size; // the panel's columns, [width, size]
  float* panel = in_shared ? taus + kLargePanel : rows + first;           // column c at panel + c * pitch
  if (in_shared) {
    // each thread fetches what it is the first to use: no barrier
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
