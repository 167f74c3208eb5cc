// From P to Q' for one matrix that fits into shared memory, by one block. Conventions: refresh_basis.cuh.
#pragma once

#include "panel.cuh"
#include "tile.cuh"

namespace soap_opt::cuda {

// Shared memory of the block kernel, in floats: A [d columns of odd pitch], W [kPanel, d], T and V^T V [kPanel, kPanel],
// taus [kPanel], partial results of the warps [2, 32].
__host__ __device__ inline int64_t block_shared_floats(int64_t d) {
  return d * (d | 1) + kPanel * d + 2 * kPanel * kPanel + kPanel + 2 * kWarp;
}

// The thread's place in its block, and what the block has in shared memory (block_shared_floats).
struct Block {
  const int thread = threadIdx.x, threads = blockDim.x, lane = thread % kWarp, warp = thread / kWarp, warps = threads / kWarp;
  const int d, pitch;
  float* const a;        // [d columns, pitch]
  float* const w;        // [kPanel, d]; before the QR a row [d] of e and a row [d] of places
  float* const triangle; // [kPanel, kPanel]
  float* const dots;     // [kPanel, kPanel]
  float* const taus;     // [kPanel]; before the QR each strip's factor to the common scale
  float* const partial;  // [2, 32]
  // The rotation's memory holds P^T [d, d], and after P^T has been read T of every panel [panels, kPanel, kPanel]: at most
  // kPanel (d + kPanel - 1) <= d^2 numbers for d > 32
  float* const triangles;

  __device__ Block(const Matrix& matrix, float* shared)
      : d(matrix.size),
        pitch(d | 1),
        a(shared),
        w(a + d * pitch),
        triangle(w + kPanel * d),
        dots(triangle + kPanel * kPanel),
        taus(dots + kPanel * kPanel),
        partial(taus + kPanel),
        triangles(matrix.rotation) {}
};

// P [d, d], its columns sorted by falling e, into block.a. Returns whether the basis is to be refreshed; otherwise the outcome
// and the identities are written: P is not finite, or the basis is kept.
__device__ inline bool sort_columns(const Matrix& matrix, const Workspace& work, float tolerance, int32_t* outcome,
                                    const Block& block) {
  const int d = block.d, pitch = block.pitch, thread = block.thread, threads = block.threads, strips = strips_of(d);
  const int warp = block.warp, warps = block.warps;
  float *a = block.a, *w = block.w, *taus = block.taus, *partial = block.partial;

  // e, and the place of each column: the number of columns that come before it
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
    if (!(fabsf(estimate) <= FLT_MAX)) square = INFINITY; // (there would be no order)
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

  // Sort P, and find out whether it is finite and whether the basis is to be refreshed
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
    return false;
  }
  for (int j = thread; j < d; j += threads) matrix.order[places[j]] = j;
  return true;
}

// geqrf: A = V and R in place, panel after panel; T of every panel but the last goes to block.triangles.
__device__ inline void factor_in_block(const Block& block) {
  const int d = block.d, pitch = block.pitch, thread = block.thread, threads = block.threads;
  const int warp = block.warp, warps = block.warps;
  float *a = block.a, *w = block.w, *triangle = block.triangle, *dots = block.dots, *taus = block.taus;
  float* triangles = block.triangles;
  for (int first = 0; first < d; first += kPanel) {
    const int width = min(kPanel, d - first), after = first + width, n = d - after, m = d - first;
    float* panel = a + first + first * pitch;
    factor_columns<kPanel, kBlockLimit / kWarp>(panel, pitch, m, width, taus, dots);
    // T, by the last warp, which has no tile of W = V^T A: there are more warps than tiles of 32 columns
    if (warp == warps - 1) make_triangle<kPanel>(width, taus, dots, triangle);
    if (n > 0)
      block_product(
          width, n, m, [=](int c, int k) { return panel[k + c * pitch]; },
          [=](int k, int j) { return a[first + k + (after + j) * pitch]; },
          [=](int c, int j, float sum) { w[c * n + j] = sum; });
    __syncthreads();
    if (n == 0) break; // T of the last panel stays in shared memory
    for (int i = thread; i < kPanel * kPanel; i += threads) triangles[first * kPanel + i] = triangle[i];
    // W <- T^T W, one column for each thread
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
    // A <- A - V W, in the rows that are not factored yet
    block_product(
        m - width, n, width, [=](int i, int c) { return panel[width + i + c * pitch]; },
        [=](int c, int j) { return w[c * n + j]; },
        [=](int i, int j, float sum) { a[after + i + (after + j) * pitch] -= sum; });
    __syncthreads();
  }
}

// orgqr: (I - V T V^T) is applied to the columns from later panels; then the panel's own columns take the place of V.
__device__ inline void form_q_in_block(const Block& block) {
  const int d = block.d, pitch = block.pitch, thread = block.thread, threads = block.threads;
  float *a = block.a, *w = block.w, *triangle = block.triangle, *dots = block.dots;
  const float* triangles = block.triangles;
  for (int first = (d - 1) / kPanel * kPanel; first >= 0; first -= kPanel) {
    const int width = min(kPanel, d - first), after = first + width, n = d - after, m = d - first;
    float* panel = a + first + first * pitch;
    // W = V^T Q. Rows first .. after - 1 of these columns count as zeros, and have not been written
    if (n > 0)
      block_product(
          width, n, n, [=](int c, int k) { return panel[width + k + c * pitch]; },
          [=](int k, int j) { return a[after + k + (after + j) * pitch]; },
          [=](int c, int j, float sum) { w[c * n + j] = sum; });
    // M = T V_1^T, V_1 the panel's first `width` rows
    for (int i = threads - 1 - thread; i < kPanel * kPanel; i += threads) { // the last warps first: they have no part of W
      const int row = i / kPanel, column = i % kPanel;
      float sum = 0;
      if (column < width)
        for (int l = row; l <= column; ++l) sum += triangle[row * kPanel + l] * panel[column + l * pitch];
      dots[i] = sum;
    }
    __syncthreads();
    // W <- T W, one column for each thread
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
            float* entry = a + first + i + (after + j) * pitch;
            *entry = (i < width ? 0 : *entry) - sum;
          });
    __syncthreads();
    // (I - V T V^T) times the identity's columns, one row for each thread
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
    // T of the next panel
    if (first > 0)
      for (int i = thread; i < kPanel * kPanel; i += threads) triangle[i] = triangles[(first - kPanel) * kPanel + i];
    __syncthreads();
  }
}

// Whether Q' in block.a is orthogonal. y = Q' probe, a row for each thread; then Q'^T y, a column each.
__device__ inline bool is_orthogonal_in_block(const Block& block) {
  const int d = block.d, pitch = block.pitch, thread = block.thread, threads = block.threads;
  const float* a = block.a;
  float* w = block.w;
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
  return !(block_reduce<true>(wrong, block.partial) > 0);
}

// From P to Q' for one matrix that fits into shared memory, by one block: P is sorted while it is loaded, then factored, and Q'
// is formed in place of V. T of every panel waits in the rotation's memory, which is free between P^T and the rotation. This
// saves 16 d floats of shared memory, so that d = 192 fits on sm_80.
__device__ inline void refresh_in_block(const Matrix& matrix, const Workspace& work, float tolerance, int32_t* outcome,
                                        float* shared) {
  const Block block(matrix, shared);
  if (!sort_columns(matrix, work, tolerance, outcome, block)) return;
  factor_in_block(block);
  form_q_in_block(block);
  // Whatever the Gram was, only an orthogonal Q' is written
  if (!is_orthogonal_in_block(block)) {
    write_identities(matrix, block.thread, block.threads);
    if (block.thread == 0) *outcome = kFailed;
    return;
  }
  // Q <- Q'. The rotation is left to the next kernel
  for (int i = block.warp; i < block.d; i += block.warps)
#pragma unroll 4
    for (int j = block.lane; j < block.d; j += kWarp) matrix.basis[i * block.d + j] = block.a[i + j * block.pitch];
  if (block.thread == 0) *outcome = kRefreshed;
}

constexpr int kBlockThreads = 512;

// One block for each matrix, from row `first` of the table on.
template <int Rows>
__global__ void __launch_bounds__(kBlockThreads)
    refresh_in_blocks_kernel(GRID_CONSTANT const Table<Rows> table, int first, const bool* due, float tolerance,
                             int32_t* outcomes, float* workspace) {
  DYNAMIC_SHARED(float, shared);
  const int place = first + blockIdx.x;
  const Matrix matrix = table.rows[place];
  int32_t* outcome = outcomes + matrix.index;
  if (due != nullptr && !due[matrix.index]) {
    const bool written = *outcome == kKept; // by an earlier call, as in refresh_in_warps_kernel
    __syncthreads();
    if (written) return;
    write_identities(matrix, threadIdx.x, blockDim.x);
    if (threadIdx.x == 0) *outcome = kKept;
    return;
  }
  refresh_in_block(matrix, Workspace(workspace, table.tiles[place], matrix.size), tolerance, outcome, shared);
}

} // namespace soap_opt::cuda
