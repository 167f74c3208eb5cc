// Launches of the eigen-refresh's kernels, in plain CUDA (see refresh_basis.h).

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define LAUNCH(kernel, blocks, threads, shared, stream, ...) \
  kernel<<<blocks, threads, shared, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#endif

#include <algorithm>
#include <stdexcept>
#include <string>

#include "refresh_basis.cuh"

namespace soap_opt::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("soap_opt: ") + what + ": " + cudaGetErrorString(error));
}

// More than 48 KiB of dynamic shared memory have to be asked for, kernel by kernel (for both sizes of table together). The
// request is always the device's limit, so that a second request costs a call and is never an error.
template <typename... Kernels>
void opt_in(int shared_limit, Kernels*... kernels) {
  for (const void* kernel : {reinterpret_cast<const void*>(kernels)...})
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_limit), "asking for shared memory");
}

template <int Rows>
Table<Rows> table_of(const Matrix* matrices, int count) {
  Table<Rows> table;
  std::copy_n(matrices, count, table.rows);
  for (int i = 0, tiles = 0; i < count; tiles += tiles_of(matrices[i++].size)) table.tiles[i] = tiles;
  return table;
}

// launch(table, rows) for every kTableRows matrices, with the small table where they fit.
template <typename Launch>
void for_each_table(const Matrix* matrices, int count, const Launch& launch) {
  for (int first = 0; first < count; first += kTableRows) {
    const int rows = std::min(kTableRows, count - first);
    if (rows <= kSmallTableRows)
      launch(table_of<kSmallTableRows>(matrices + first, rows), rows);
    else
      launch(table_of<kTableRows>(matrices + first, rows), rows);
  }
}

} // namespace

int shared_memory_limit() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "shared memory of the device");
  return bytes;
}

int64_t block_shared_memory(int64_t size) { return block_shared_floats(size) * int64_t(sizeof(float)); }

void refresh_in_warps(const Matrix* matrices, int count, const bool* due, float tolerance, int32_t* outcomes, Stream stream) {
  constexpr int kWarps = kWarpThreads / kWarp; // 17.5 KiB of shared memory: registers are the limit of a block
  for_each_table(matrices, count, [&](const auto& table, int rows) {
    LAUNCH(refresh_in_warps_kernel, (rows + kWarps - 1) / kWarps, kWarpThreads, kWarps * kWarpShared * sizeof(float), stream,
           table, rows, due, tolerance, outcomes);
    check(cudaGetLastError(), "refresh_in_warps");
  });
}

int64_t block_workspace(const Matrix* matrices, int count) {
  int64_t most = 0;
  for_each_table(matrices, count, [&](const auto& table, int rows) {
    most = std::max<int64_t>(most, table.tiles[rows - 1] + tiles_of(table.rows[rows - 1].size));
  });
  return most * kTileWorkspace;
}

void refresh_in_blocks(const Matrix* matrices, int count, const bool* due, float tolerance, int32_t* outcomes, float* workspace,
                       Stream stream) {
  opt_in(shared_memory_limit(), multiply_tiles_kernel<kSmallTableRows>, multiply_tiles_kernel<kTableRows>,
         refresh_in_blocks_kernel<kSmallTableRows>, refresh_in_blocks_kernel<kTableRows>, rotate_tiles_kernel<kSmallTableRows>,
         rotate_tiles_kernel<kTableRows>);
  for_each_table(matrices, count, [&](const auto& table, int rows) {
    const int tiles = table.tiles[rows - 1] + tiles_of(table.rows[rows - 1].size);
    const int64_t tile_shared = tile_shared_floats(table.rows[0].size) * sizeof(float);
    LAUNCH(multiply_tiles_kernel, tiles, kTileThreads, tile_shared, stream, table, rows, due, workspace);
    check(cudaGetLastError(), "multiply_tiles");
    for (int first = 0, end; first < rows; first = end) {
      // A warp for each column of a panel, where the matrix is large enough to keep the warps busy; smaller blocks share an SM
      const int largest = table.rows[first].size, smaller = largest > 128 ? 128 : largest > 64 ? 64 : 0;
      const int threads = largest <= 64 ? 128 : largest <= 128 ? 256 : kBlockThreads;
      for (end = first; end < rows && table.rows[end].size > smaller;) ++end;
      LAUNCH(refresh_in_blocks_kernel, end - first, threads, block_shared_memory(largest), stream, table, first, due, tolerance,
             outcomes, workspace);
      check(cudaGetLastError(), "refresh_in_blocks");
    }
    LAUNCH(rotate_tiles_kernel, tiles, kTileThreads, tile_shared, stream, table, rows, outcomes, workspace);
    check(cudaGetLastError(), "rotate_tiles");
  });
}

void factor_panel(float* transposed, float* triangles, int count, int size, int first, int width, const int32_t* outcomes,
                  Stream stream) {
  const int64_t small = kSmallPanelShared * sizeof(float), whole = small + int64_t(size - first) * width * sizeof(float);
  const int limit = shared_memory_limit();
  const bool in_shared = whole <= limit;
  opt_in(limit, factor_panel_kernel);
  LAUNCH(factor_panel_kernel, count, kBlockThreads, in_shared ? whole : small, stream, transposed, triangles, size, first,
         width, outcomes, in_shared);
  check(cudaGetLastError(), "factor_panel");
}

} // namespace soap_opt::cuda
