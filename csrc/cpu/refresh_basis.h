// Refreshing one basis on the CPU.
#pragma once

#include <ATen/ATen.h>

#include <vector>

namespace soap_opt {

// Larger matrices are refreshed one at a time, on all threads; the others side by side, each by one core.
constexpr int64_t kThreadedSize = 512;

// The outcomes of refresh_basis_ for a matrix.
enum class Outcome : int32_t {
  kept = 0,      // not due, or the basis still diagonalises its Gram
  refreshed = 1, //
  failed = 2,    // G or Q is not finite, or Q' is not orthogonal (loops.h): the basis is to stay as it is
};

template <typename T>
struct Refresh {
  Outcome outcome = Outcome::kept; // the other members have a meaning where this is `refreshed`
  std::vector<int64_t> order;      // [d] sorts the estimated eigenvalues, largest first
  std::vector<T> basis;            // [d, d] the new Q', with some elements to spare
  std::vector<T> rotation;         // [d, d] Q^T Q' with the unpermuted Q, with some elements to spare; where it is wanted

  bool done() const { return outcome == Outcome::refreshed; }
};

// P = G Q, e = diag(Q^T P), Q' = qr(P, columns by falling e).Q. The basis is kept when tolerance >= 0 and
// ||P - Q diag(e)||_F <= tolerance ||P||_F. gram and basis: [d, d] row-major, never written. rotation: whether to make Q^T Q'.
template <typename T>
Refresh<T> refresh_basis(const T* gram, const T* basis, int64_t d, double tolerance, bool rotation = true);

} // namespace soap_opt
