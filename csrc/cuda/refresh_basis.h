// The interface between the CUDA refresh's host code (refresh_basis_host.cpp, with ATen) and its kernels (refresh_basis.cu).
// The kernels include no torch headers: nvcc parses the file once for each architecture, and ATen's headers would take longer
// than the kernels.
#pragma once

#include <cstdint>

namespace soap_opt::cuda {

// One matrix of the ragged set.
struct Matrix {
  const float* gram; // [d, d]
  float* basis;      // [d, d] in: Q; out: Q'
  float* rotation;   // [d, d] out: Q^T Q'
  int64_t* order;    // [d] out: sorts the estimated eigenvalues, largest first
  int32_t size;      // d
  int32_t index;     // in due and outcomes
};

// The outcomes of refresh_basis_ for a matrix.
enum Outcome : int32_t {
  kKept = 0,      // not due, or diagonal enough: order and rotation are identities
  kRefreshed = 1, //
  kFailed = 2,    // G, Q or their product is not finite, or Q' is not orthogonal: nothing was written to Q
};

constexpr int kWarpLimit = 32;   // a warp refreshes a matrix of d up to this
constexpr int kBlockLimit = 256; // a block refreshes a larger matrix of d up to this, where it fits in shared memory
constexpr int kPanel = 16;       // columns of a panel of the block kernel
constexpr int kLargePanel = 32;  // columns of a panel of the blocked QR for larger matrices

using Stream = void*; // cudaStream_t

// Bytes of shared memory that a block may opt in to on the current device.
int shared_memory_limit();

// Bytes of shared memory that the block kernel needs for a matrix of this size.
int64_t block_shared_memory(int64_t size);

// Whether the block kernel takes a matrix of this size on the current device, whose shared_memory_limit() is `limit`.
inline bool fits_in_block(int64_t size, int64_t limit) { return size <= kBlockLimit && block_shared_memory(size) <= limit; }

// Floats of workspace that refresh_in_blocks needs for these matrices.
int64_t block_workspace(const Matrix* matrices, int count);

// The refresh of `count` matrices of sizes up to kWarpLimit, in one launch for every kTableRows matrices. `matrices` is in the
// host's memory and travels as a kernel argument: nothing is copied to the device, nothing has to outlive the call, and a CUDA
// graph keeps the argument with the launch. On the device are due [n] bool (null: all are due) and outcomes [n] int32, in and
// out: a matrix that is not due and whose outcome is kKept already is passed over. With a negative tolerance every due matrix
// is refreshed.
void refresh_in_warps(const Matrix* matrices, int count, const bool* due, float tolerance, int32_t* outcomes, Stream stream);

// The refresh of larger matrices for which fits_in_block, sorted by falling size; the other arguments are the same. There are
// three kinds of launches for each table: the products G Q in tiles; the QRs, with a block for each matrix; the products Q^T Q'
// in tiles. Each class of sizes has a launch of QRs: its shared memory is that of its largest matrix, and decides how many
// blocks share an SM. workspace: block_workspace floats of any value.
void refresh_in_blocks(const Matrix* matrices, int count, const bool* due, float tolerance, int32_t* outcomes, float* workspace,
                       Stream stream);

// One panel of the QR of `count` matrices: columns first .. first + width - 1, width <= kLargePanel.
//   transposed [count, d, d]: row j is column j of the matrix. The panel's rows become Householder vectors, which are written
//     from entry `first` on: 0 up to the diagonal, 1 on it
//   triangles [count, kLargePanel, kLargePanel] out: T of H_1 .. H_width = I - V T V^T, 0 below the diagonal and beyond width
// Matrices whose outcome is not kRefreshed are passed over.
void factor_panel(float* transposed, float* triangles, int count, int size, int first, int width, const int32_t* outcomes,
                  Stream stream);

} // namespace soap_opt::cuda
