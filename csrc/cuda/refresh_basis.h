// What the CUDA refresh's host code (refresh_basis_host.cpp, ATen) asks of its kernels (refresh_basis.cu, no torch headers:
// every architecture parses the whole file again, and ATen's headers would take longer than the kernels).
#pragma once

#include <cstdint>

namespace soap_opt::cuda {

// One matrix of the ragged set.
struct Matrix {
  const float* gram; // [d, d]
  float* basis;      // [d, d] Q, becomes Q'
  float* rotation;   // [d, d] out: Q^T Q'
  int64_t* order;    // [d] out: sorts the estimated eigenvalues, largest first
  int32_t size;      // d
  int32_t index;     // of due and outcomes
};

// What became of a matrix: the values of refresh_basis_'s outcomes.
enum Outcome : int32_t {
  kKept = 0,      // not due, or diagonal enough: order and rotation are identities
  kRefreshed = 1, //
  kFailed = 2,    // G, Q or their product is not finite, or Q' is not orthogonal: nothing was written to Q
};

constexpr int kWarpLimit = 32;   // d up to this: a warp per matrix
constexpr int kBlockLimit = 256; // d up to this, where it fits in shared memory: a block, and tiles of products
constexpr int kPanel = 16;       // columns of a panel of the block kernel
constexpr int kLargePanel = 32;  // and of the blocked factorisation behind it

using Stream = void*; // cudaStream_t

// Bytes of shared memory that a block may opt in to on the current device.
int shared_memory_limit();

// Bytes of shared memory that the block kernel needs for a matrix of this size.
int64_t block_shared_memory(int64_t size);

// Whether the block kernel takes a matrix of this size on the current device, whose shared_memory_limit() is `limit`.
inline bool fits_in_block(int64_t size, int64_t limit) { return size <= kBlockLimit && block_shared_memory(size) <= limit; }

// Floats of workspace that refresh_in_blocks needs for these matrices.
int64_t block_workspace(const Matrix* matrices, int count);

// The refresh of `count` matrices of sizes up to kWarpLimit, in one launch for each kTableRows of them. `matrices` is in the
// host's memory and travels as a kernel argument: no copy to the device, nothing that has to outlive the call, and a CUDA
// graph keeps it with the launch. On the device: due [n] bool, null for all; outcomes [n] int32 in and out:
// a matrix that is not due and whose outcome is kKept already is passed over. A negative tolerance refreshes every matrix that
// is due.
void refresh_in_warps(const Matrix* matrices, int count, const bool* due, float tolerance, int32_t* outcomes, Stream stream);

// The same for larger matrices that fit_in_block, sorted by falling size. Three kinds of launch for each table: the products
// G Q in tiles, the QRs, a block a matrix (a launch for each class of sizes: its shared memory is that of its largest matrix,
// and decides how many share an SM), and the products Q^T Q' in tiles. workspace: block_workspace floats, whatever they hold.
void refresh_in_blocks(const Matrix* matrices, int count, const bool* due, float tolerance, int32_t* outcomes, float* workspace,
                       Stream stream);

// One panel of the QR of `count` matrices: columns first .. first + width - 1, width <= kLargePanel.
//   transposed [count, d, d]: row j is column j of the matrix. The panel's rows become Householder vectors, from entry `first`
//     on: 0 up to the diagonal, 1 on it
//   triangles [count, kLargePanel, kLargePanel] out: T of H_1 .. H_width = I - V T V^T, 0 below the diagonal and beyond width
// Matrices whose outcome is not kRefreshed are passed over.
void factor_panel(float* transposed, float* triangles, int count, int size, int first, int width, const int32_t* outcomes,
                  Stream stream);

} // namespace soap_opt::cuda
