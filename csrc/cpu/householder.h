// Q of a QR decomposition: Householder reflectors in panels, and their products by register tiles; up to kThreadedSize on one
// core, larger ones on all free threads.
//
// LAPACK's geqrf and orgqr run at 18 GF/s for 128 x 128 and at 30 for 192 x 192 on a core whose tiles run at 117, and at 97 for
// 2048 x 2048 on two cores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "parallel.h"
#include "refresh_basis.h"
#include "tiles.h"

namespace soap_opt {

// Squared norms below this have lost terms to underflow.
template <typename T>
constexpr T kTinySquare =
    std::numeric_limits<T>::min() / (std::numeric_limits<T>::epsilon() * std::numeric_limits<T>::epsilon());

// max |x_i| of the numbers among x [n]; NaN is passed over.
template <typename T>
T largest_magnitude(const T* x, int64_t n, int64_t stride = 1) {
  T largest = 0;
  if (stride == 1) {
    constexpr int64_t lanes = 64 / sizeof(T); // the compiler may not reorder a single maximum
    T most[lanes] = {};
    for (; n >= lanes; n -= lanes, x += lanes)
      for (int64_t j = 0; j < lanes; ++j) most[j] = std::max(most[j], std::abs(x[j]));
    largest = *std::max_element(most, most + lanes);
  }
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::abs(x[i * stride]));
  return largest;
}

// The norm up to which the rest of a column [d] is rounding and has no direction. The rest remains when the directions of the
// columns before are taken out; `largest` was the column's largest entry. Such a column gets no reflector (H = I). The rounding
// of columns that are multiples of each other has a structure, on which reflectors in panels lose their orthogonality: for
// equal rows and d = 130 the error was 55 times eps sqrt(d).
template <typename T>
T noise_of_column(T largest, int64_t d) {
  return std::numeric_limits<T>::epsilon() * std::sqrt(T(d)) * largest;
}

// x [n], `stride` apart, times the power of two that brings its largest entry into [1, 2). There are two factors, because the
// power of two for a subnormal number is beyond the largest number.
template <typename T>
void scale_tiny(T* x, int64_t n, int64_t stride, T largest) {
  const int exponent = -std::ilogb(largest), half = exponent / 2;
  const T first = std::ldexp(T(1), half), second = std::ldexp(T(1), exponent - half);
  for (int64_t i = 0; i < n; ++i) x[i * stride] = x[i * stride] * first * second;
}

// H = I - tau v v^T with v = (1, inverse x) takes (alpha, x) to (beta, 0). below = |x|^2 > 0. alpha^2 + below is not tiny, so
// that alpha - beta has a reciprocal.
template <typename T>
struct Reflector {
  T tau, inverse;

  Reflector(T alpha, T below) {
    const T beta = -std::copysign(std::sqrt(alpha * alpha + below), alpha);
    tau = (beta - alpha) / beta;
    inverse = 1 / (alpha - beta);
  }
};

// The row stride of matrices [.., d] whose rows are whole panels: rows can then be written by several threads.
template <typename T>
constexpr int64_t padded_row(int64_t d) {
  return panels_of<T>(d) * kPackedWidth<T>;
}

constexpr int64_t kCopied = 16; // rows and columns of a block that is copied at once

// function(i) for the rows i = 0, kCopied, 2 kCopied, .. of a matrix [d, d] that is copied in blocks, on all threads if it is
// large.
template <typename Function>
void for_each_copied_block(int64_t d, const Function& function) {
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) function(block * kCopied);
  };
  const int64_t blocks = (d + kCopied - 1) / kCopied;
  if (d <= kThreadedSize)
    run(0, blocks);
  else
    parallel_for(0, blocks, 1, run);
}

// q [d, d] row-major <- Q of a = Q R. columns [d, d], row stride padded_row(d), holds a by columns (row j is column j), scaled
// so that squares of its largest entry do not overflow, and is overwritten.
template <typename T>
void householder_q(T* columns, T* q, int64_t d);

} // namespace soap_opt
