// The whole refresh of one matrix by one warp, up to kWarpLimit. Conventions: refresh_basis.cuh.
#pragma once

#include "reflector.cuh"

namespace soap_opt::cuda {

// Floats of shared memory of a warp
constexpr int kWarpShared = kWarpLimit * kWarpLimit + 3 * kWarpLimit;

constexpr int kWarpThreads = 128; // four matrices a block

// Global memory -> rows [D, D], a column for each lane, padded with zeros; returns the lane's largest magnitude. The loop is
// not fully unrolled. Loops between global memory and registers would be, and the 32 addresses that the first and the last loop
// of a refresh share would cost as many registers throughout.
template <int D>
__device__ __forceinline__ float fetch_rows_in_warp(const float* from, int d, float* rows) {
  const int lane = threadIdx.x % kWarp;
  float largest = 0;
  if (lane >= D) return largest;
#pragma unroll 8
  for (int i = 0; i < D; ++i) {
    const float entry = lane < d && i < d ? from[i * d + lane] : 0;
    rows[i * D + lane] = entry;
    largest = fmaxf(largest, fabsf(entry));
  }
  return largest;
}

// Householder, column by column, the columns x [D] of the lanes in the order of their ranks. rows[k] keeps column k as the loop
// found it; taus [D] and inverses [D] are each reflector's.
template <int D>
__device__ __forceinline__ void factor_in_warp(float (&x)[D], int d, int rank, float* rows, float* taus, float* inverses) {
  const int lane = threadIdx.x % kWarp;
  const bool mine = lane < d;
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
      // The condition is the same for every lane; and when a lane has the maximum, all lanes have read the column
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
}

// Q' = H_0 .. H_{d-1}: the reflectors applied to the identity, last to first. Lane j makes column j, x [D].
template <int D>
__device__ __forceinline__ void form_q_in_warp(float (&x)[D], int d, const float* rows, const float* taus,
                                               const float* inverses) {
  const int lane = threadIdx.x % kWarp;
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
}

// Whether the Q' of columns x [D] is orthogonal. y = Q' probe, a row for each lane (lanes begin at different columns, because
// their rows are D apart), through ys [D]; then Q'^T y, a column for each lane. Q' is in rows afterwards.
template <int D>
__device__ __forceinline__ bool is_orthogonal_in_warp(const float (&x)[D], int d, float* rows, float* ys) {
  const int lane = threadIdx.x % kWarp;
  const bool mine = lane < d;
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
    ys[lane] = y;
  }
  __syncwarp();
  float back = 0, length = 0;
  if (mine) {
#pragma unroll 1
    for (int i = 0; i < d; ++i) {
      const float entry = rows[i * D + lane];
      back += entry * ys[i];
      length += entry * entry;
    }
  }
  const float bound = orthogonality_bound(d);
  const bool good = !mine || (fabsf(length - 1) <= bound && fabsf(back - probe(lane)) <= bound); // false for NaN
  return !(warp_max(good ? 0 : 1) > 0);
}

// Q^T Q' and Q'. Q' is in rows. Reading the old and the new Q again has saved 64 registers since the products. (No barrier is
// needed before `rows` is written again: the lanes read it for their sums alone, and these went into the maximum.)
template <int D>
__device__ __forceinline__ void write_in_warp(const Matrix& matrix, float (&x)[D], float* rows) {
  const int lane = threadIdx.x % kWarp, d = matrix.size;
  const bool mine = lane < d;
#pragma unroll
  for (int i = 0; i < D; ++i) x[i] = lane < D ? rows[i * D + lane] : 0;
  fetch_rows_in_warp<D>(matrix.basis, d, rows);
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
}

// The whole refresh of one matrix, d <= D <= 32, by one warp. Lane j has column j in registers, padded with zeros to D.
// Matrices that all lanes need (G, reflectors, the old Q) go through `rows` [D, D] and are read as broadcasts. Every lane has
// the whole reflector, so that the reflector's norm and its products with the lane's column need no shuffles.
template <int D>
__device__ void refresh_in_warp(const Matrix& matrix, float tolerance, int32_t* outcome, float* rows) {
  float* estimates = rows + D * D; // [D] e
  float* taus = estimates + D;     // [D]
  float* inverses = taus + D;      // [D]
  const int lane = threadIdx.x % kWarp, d = matrix.size;
  const bool mine = lane < d;

  // P = G Q
  float old[D], x[D];
  fetch_rows_in_warp<D>(matrix.basis, d, rows);
#pragma unroll
  for (int i = 0; i < D; ++i) old[i] = lane < D ? rows[i * D + lane] : 0;
  const float scale = power_of_two_scale(warp_max(fetch_rows_in_warp<D>(matrix.gram, d, rows)));
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

  // Columns are not moved: a lane's rank is the place of its column in the order.
  if (lane < D) estimates[lane] = estimate;
  __syncwarp();
  int rank = 0;
  for (int j = 0; j < d; ++j) rank += estimates[j] > estimate || (estimates[j] == estimate && j < lane);
  if (mine) matrix.order[rank] = lane;

  factor_in_warp<D>(x, d, rank, rows, taus, inverses);
  __syncwarp();
  form_q_in_warp<D>(x, d, rows, taus, inverses);
  // Whatever the Gram was, only an orthogonal Q' is written
  __syncwarp();
  if (!is_orthogonal_in_warp<D>(x, d, rows, estimates)) {
    write_identities(matrix, lane, kWarp);
    if (lane == 0) *outcome = kFailed;
    return;
  }
  write_in_warp<D>(matrix, x, rows);
  if (lane == 0) *outcome = kRefreshed;
}

// Four blocks on an SM: without this bound, ptxas takes so many registers for sm_100 that only two fit.
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
    const bool written = *outcome == kKept; // by an earlier call, as in replays of a CUDA graph
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

} // namespace soap_opt::cuda
