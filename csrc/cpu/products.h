// Mode products and Grams of one parameter, arranged [D_1, .., D_k] in memory order.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "layout.h"
#include "loops.h"

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

// c <- beta c + alpha a b; c's rows are contiguous.
template <typename T>
void gemm(Matrix<T> c, Matrix<const T> a, Matrix<const T> b, double alpha = 1, double beta = 0) {
  if (c.rows * c.columns * a.columns <= kSmallProduct) {
    small_gemm(c.data, c.row_stride, a.data, a.row_stride, a.column_stride, b.data, b.row_stride, b.column_stride, c.rows,
               c.columns, a.columns, alpha, beta);
    return;
  }
  at::Tensor out = c.tensor();
  if (beta == 0 && alpha == 1)
    at::mm_out(out, a.tensor(), b.tensor());
  else
    at::addmm_out(out, out, a.tensor(), b.tensor(), beta, alpha);
}

// The matrix that multiplies a group: the basis itself, or the Kronecker product of its factors, written to `room`.
template <typename T>
const T* group_matrix(const Group& group, const T* const* factors, T* room) {
  if (group.positions.size() == 1) return factors[group.positions[0]];
  // room <- kron of the first two, then of that and the third, .. (in place from the back of the buffer)
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

// One product x_g M (or M^T) of [A, D, B], dimensions kept in place. `from` and `to` are different buffers.
template <typename T>
void multiply(const T* from, T* to, int64_t before, int64_t width, int64_t after, Matrix<const T> m) {
  if (after == 1) {
    gemm<T>({to, before, width}, {from, before, width}, m);
  } else {
    for (int64_t a = 0; a < before; ++a)
      gemm<T>({to + a * width * after, width, after}, m.t(), {from + a * width * after, width, after});
  }
}

// All mode products of x (arranged, contiguous): into the eigenbasis, or (back) out of it. The result is in the buffer that is
// returned, `ping` or `pong`; x may be either of them, or neither. Without preconditioned modes x is copied to ping.
template <typename T>
T* project(const Layout& layout, const T* x, const T* const* bases, T* ping, T* pong, T* room, bool back) {
  const T* from = x;
  T* to = x == ping ? pong : ping;
  const auto step = [&] {
    from = to;
    to = to == ping ? pong : ping;
  };
  const int64_t groups = layout.groups.size();
  for (int64_t n = 0; n < groups; ++n) {
    const int64_t g = back ? groups - 1 - n : n;
    const Group& group = layout.groups[g];
    if (group.positions.empty()) continue;
    const int64_t width = group.width, rest = layout.numel / width;
    const Matrix<const T> m(group_matrix(group, bases, room), width, width);
    if (layout.rotating) {
      // Every product is one gemm on a matrix that is already in place: forward the first dimension becomes the last, back
      // the last becomes the first, and after all of them the dimensions stand in order again.
      if (back)
        gemm<T>({to, width, rest}, m, Matrix<const T>(from, rest, width).t());
      else
        gemm<T>({to, rest, width}, Matrix<const T>(from, width, rest).t(), m);
    } else {
      int64_t before = 1;
      for (int64_t h = 0; h < g; ++h) before *= layout.groups[h].width;
      multiply<T>(from, to, before, width, rest / before, back ? m.t() : m);
    }
    step();
  }
  if (from == x && x != ping && x != pong) {
    std::copy(x, x + layout.numel, ping);
    return ping;
  }
  return const_cast<T*>(from);
}

// gram <- beta gram + (1 - beta) x^T x for x [rows, d]. ATen has no syrk: a triangle of gemm blocks, mirrored at the end.
template <typename T>
void gram_triangle(T* gram, int64_t ld, int64_t d, Matrix<const T> x, double alpha, double beta) {
  constexpr int64_t smallest = 48; // narrower blocks lose more in gemm efficiency than the triangle saves
  if (d < 2 * smallest) {
    gemm<T>({gram, d, d, ld, 1}, x.t(), x, alpha, beta);
    return;
  }
  const int64_t half = d / 2;
  const Matrix<const T> left(x.data, x.rows, half, x.row_stride, x.column_stride);
  const Matrix<const T> right(x.data + half * x.column_stride, x.rows, d - half, x.row_stride, x.column_stride);
  gram_triangle<T>(gram, ld, half, left, alpha, beta);
  gram_triangle<T>(gram + half * ld + half, ld, d - half, right, alpha, beta);
  gemm<T>({gram + half * ld, d - half, half, ld, 1}, right.t(), left, alpha, beta);
}

template <typename T>
void mirror(T* gram, int64_t d) {
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < i; ++j) gram[j * d + i] = gram[i * d + j];
}

// out [d, d] <- the Kronecker Gram [D, D] (row stride ld) with every factor but `keep` traced out; lower triangles.
template <typename T>
void partial_trace(const T* whole, int64_t ld, const Group& group, size_t keep, T* out) {
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

// G_i <- beta G_i + (1 - beta) (x [A, D, B] contracted with itself over all modes but i), for the modes of one group.
// buffer [numel] and room [2 * kKroneckerWidth^2] are scratch.
template <typename T>
void gram_ema_group(const Group& group, const T* x, int64_t before, int64_t after, T* const* grams, T* buffer, T* room,
                    double beta) {
  const int64_t width = group.width;
  const bool single = group.positions.size() == 1;
  T* gram = single ? grams[group.positions[0]] : room;
  const double alpha = single ? 1 - beta : 1, keep = single ? beta : 0;
  if (before == 1) {
    gram_triangle<T>(gram, width, width, Matrix<const T>(x, width, after).t(), alpha, keep);
  } else if (after == 1) {
    gram_triangle<T>(gram, width, width, {x, before, width}, alpha, keep);
  } else {
    // A middle mode [A, D, B]: blocks of A are gathered to [D, a B], so that one product contracts a B at once
    // (128 products over 25 run at 80 GF/s, transposed into one at 132).
    const int64_t block = std::max<int64_t>(1, std::min<int64_t>(before, (int64_t(1) << 16) / (width * after)));
    for (int64_t first = 0; first < before; first += block) {
      const int64_t count = std::min(block, before - first), columns = count * after;
      for (int64_t a = 0; a < count; ++a)
        for (int64_t i = 0; i < width; ++i)
          std::copy_n(x + ((first + a) * width + i) * after, after, buffer + i * columns + a * after);
      gram_triangle<T>(gram, width, width, Matrix<const T>(buffer, width, columns).t(), alpha, first == 0 ? keep : 1);
    }
  }
  if (single) {
    mirror(gram, width);
    return;
  }
  T* trace = room + kKroneckerWidth * kKroneckerWidth;
  for (size_t f = 0; f < group.positions.size(); ++f) {
    partial_trace(gram, width, group, f, trace);
    gram_from_triangle(grams[group.positions[f]], trace, group.sizes[f], group.sizes[f], beta);
  }
}

} // namespace soap_opt
