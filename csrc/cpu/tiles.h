// Register tiles: products of two packed matrices, for all products of a step that are small enough to stay in a core's cache.
//
// A matrix [k, n] is packed into ceil(n / W) panels [k, W], W = kPackedWidth, and the last panel is padded with zeros.
// The product of two panels, or of one panel and two, is a tile that is held in registers. One format serves the mode products
// (a basis and a piece of the gradient) and the Grams (a piece of the gradient and itself: tiles on and below the diagonal
// only). On a Zen 4 core, which does 118 GF/s at most, the tiles run at 117; MKL's sgemm runs at 101 for 128 x 128 x 3200, and
// at 43 where 25 or 9 is a dimension. With AVX2, on a Zen 3 core that does 103, they run at 96 to 101 from k = 64 on, MKL at
// 91.
#pragma once

#include <cstdint>

namespace soap_opt {

template <typename T>
constexpr int64_t kPackedWidth = 64 / int64_t(sizeof(T)); // one cache line

template <typename T>
constexpr int64_t panels_of(int64_t n) {
  return (n + kPackedWidth<T> - 1) / kPackedWidth<T>;
}

// Elements of a matrix [k, n] in panels.
template <typename T>
constexpr int64_t packed_numel(int64_t k, int64_t n) {
  return panels_of<T>(n) * kPackedWidth<T> * k;
}

// Rows [first, first + rows) of the panels of a matrix [k, n] <- x [rows, n] with row stride ld.
template <typename T>
void pack_rows(T* panels, int64_t k, int64_t first, const T* x, int64_t ld, int64_t rows, int64_t n);

// pack_rows for x^T, x [n, rows] with row stride ld.
template <typename T>
void pack_transposed(T* panels, int64_t k, int64_t first, const T* x, int64_t ld, int64_t rows, int64_t n);

// c [m, n] (row stride ld) <- (add: +=) a^T b for packed a [k, m] and b [k, n]. Up to W - 1 elements after the end of every row
// are overwritten as well, before the elements of the next row are written: where ld = n, only the last row needs room after
// it.
template <typename T>
void multiply_panels(T* c, int64_t ld, int64_t m, int64_t n, const T* a, const T* b, int64_t k, bool add = false);

// Rows up to this length are multiplied as they lie, which saves the packing: at 106 to 114 GF/s for 25 to 64 where packed
// tiles make 117. Lines of long rows would evict each other where their length is a power of two.
constexpr int64_t kUnpackedWidth = 64;

// c [m, k] <- x b for x [m, k], contiguous, and packed b [k, k], k <= kUnpackedWidth. Up to W - 1 elements after the end of c
// are overwritten.
template <typename T>
void multiply_rows(T* c, int64_t m, const T* x, const T* b, int64_t k);

// c [p, p] += a^T a for packed a [k, n], p = W panels_of(n), row-major; writes only tiles on and below the diagonal.
template <typename T>
void accumulate_gram(T* c, int64_t n, const T* a, int64_t k);

// accumulate_gram for x [k, n] that is not packed. Up to W - 1 elements after the end of x are read.
template <typename T>
void accumulate_gram_of_rows(T* c, int64_t n, const T* x, int64_t k);

// Rows [i, i + W) of gram [n, n], row-major, up to the diagonal, <- keep gram + weight a^T a for packed a [k, n]; i is a
// multiple of W.
template <typename T>
void average_gram_row(T* gram, int64_t n, int64_t i, const T* a, int64_t k, T keep, T weight);

// Rows [begin, end) of a symmetric x [n, n], right of the diagonal, <- the columns below it; begin is a multiple of W.
template <typename T>
void mirror(T* x, int64_t n, int64_t begin, int64_t end);

// The panels of a matrix [k, runs * length] <- x: row r's run q is [length] at x + q apart + r length. (x [A, D, B] with a
// short B, several of its slabs side by side: D = k, B = length, apart = D B.)
template <typename T>
void pack_runs(T* panels, int64_t k, const T* x, int64_t apart, int64_t runs, int64_t length);

// x, as of pack_runs, <- rows [k, runs * length] with row stride ld, a multiple of W.
template <typename T>
void unpack_runs(T* x, int64_t apart, int64_t runs, int64_t length, const T* rows, int64_t ld, int64_t k);

// to[r * to_stride + i] <- from[r * from_stride + i] for r < runs, i < length.
template <typename T>
void copy_runs(T* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t runs, int64_t length);

} // namespace soap_opt
