// Products by plain loops or BLAS, Kronecker products, and partial traces of Grams of Kronecker groups.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "layout.h"
#include "loops.h"
#include "parallel.h"

namespace soap_opt {

// A matrix by pointer and strides.
template <typename T>
struct Matrix {
  T* data;
  int64_t rows, columns, row_stride, column_stride;

  Matrix(T* data, int64_t rows, int64_t columns) : Matrix(data, rows, columns, columns, 1) {}
  Matrix(T* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride)
      : data(data), rows(rows), columns(columns), row_stride(row_stride), column_stride(column_stride) {}

  Matrix t() const { return {data, columns, rows, column_stride, row_stride}; }
  at::Tensor tensor() const {
    return at::from_blob(const_cast<std::remove_const_t<T>*>(data), {rows, columns}, {row_stride, column_stride},
                         c10::CppTypeToScalarType<std::remove_const_t<T>>::value);
  }
};

// Below this many multiplications a call into ATen costs more than the product.
constexpr int64_t kSmallProduct = 32 * 32 * 32;

// c <- a b; c's rows are contiguous.
template <typename T>
void gemm(Matrix<T> c, Matrix<const T> a, Matrix<const T> b) {
  if (c.rows * c.columns * a.columns <= kSmallProduct) {
    small_gemm(c.data, c.row_stride, a.data, a.row_stride, a.column_stride, b.data, b.row_stride, b.column_stride, c.rows,
               c.columns, a.columns, /*alpha=*/1, /*beta=*/0);
  } else {
    const SameForAllThreads same;
    at::Tensor out = c.tensor();
    at::mm_out(out, a.tensor(), b.tensor());
  }
}

// The matrix that multiplies a group: the basis itself, or the Kronecker product of its factors, written to `room`.
template <typename T>
const T* group_matrix(const ModeGroup& group, const T* const* factors, T* room) {
  if (group.positions.size() == 1) return factors[group.positions[0]];
  // kron of the first two factors, then of this product and the third factor, .. (`room` has two halves, used in turn)
  int64_t width = group.sizes[0];
  const T* left = factors[group.positions[0]];
  T* out = room;
  T* spare = room + kKroneckerWidth * kKroneckerWidth;
  for (size_t f = 1; f < group.positions.size(); ++f) {
    const T* right = factors[group.positions[f]];
    const int64_t size = group.sizes[f], total = width * size;
    for (int64_t i = 0; i < width; ++i)
      for (int64_t k = 0; k < size; ++k)
        for (int64_t j = 0; j < width; ++j)
          for (int64_t l = 0; l < size; ++l)
            out[(i * size + k) * total + j * size + l] = left[i * width + j] * right[k * size + l];
    width = total;
    left = out;
    std::swap(out, spare);
  }
  return left;
}

// to <- from x_g M, both [A, D, B] with the dimensions in place, M [D, D]. `from` and `to` are different buffers.
template <typename T>
void multiply(const T* from, T* to, int64_t before, int64_t width, int64_t after, Matrix<const T> m) {
  if (after == 1) {
    gemm<T>({to, before, width}, {from, before, width}, m);
  } else {
    for (int64_t a = 0; a < before; ++a)
      gemm<T>({to + a * width * after, width, after}, m.t(), {from + a * width * after, width, after});
  }
}

// out [d, d] <- the Gram [D, D] of a Kronecker group (row stride ld), with every factor but `keep` traced out; lower triangles.
template <typename T>
void partial_trace(const T* whole, int64_t ld, const ModeGroup& group, size_t keep, T* out) {
  const int64_t d = group.sizes[keep];
  int64_t inner = 1; // stride of the kept factor within D
  for (size_t f = keep + 1; f < group.sizes.size(); ++f) inner *= group.sizes[f];
  const int64_t outer = group.width / (d * inner);
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      T sum = 0;
      for (int64_t o = 0; o < outer; ++o)
        for (int64_t r = 0; r < inner; ++r) sum += whole[((o * d + i) * inner + r) * ld + (o * d + j) * inner + r];
      out[i * d + j] = sum;
    }
}

} // namespace soap_opt
