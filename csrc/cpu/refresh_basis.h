// Refreshing one basis on the CPU.
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace soap_opt {

// Larger matrices are decomposed one at a time, with all threads in LAPACK; the others one a core.
constexpr int64_t kThreadedSize = 512;

template <typename T>
struct Refresh {
  bool done = false;          // false: the basis still diagonalises its Gram, or not finite; everything else is empty
  bool finite = true;         // whether G and Q are
  std::vector<int64_t> order; // [d] sorts the estimated eigenvalues, largest first
  std::vector<T> basis;       // [d, d] the new Q', and some elements to spare
  std::vector<T> rotation;    // [d, d] Q^T Q' with the unpermuted Q, likewise
};

// P = G Q, e = diag(Q^T P), Q' = qr(P, columns by falling e).Q. Not done when tolerance >= 0 and
// ||P - Q diag(e)||_F <= tolerance ||P||_F, nor where G or Q is not finite. gram and basis: [d, d] row-major; nothing is written.
template <typename T>
Refresh<T> refresh_basis(const T* gram, const T* basis, int64_t d, double tolerance);

} // namespace soap_opt
