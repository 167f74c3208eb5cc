// Refreshing bases on the CPU: LAPACK through ATen, one matrix at a time.
#pragma once

#include <ATen/ATen.h>

#include <optional>

namespace soap_opt {

struct Refresh {
  at::Tensor order;    // [d] int64: sorts the estimated eigenvalues, largest first
  at::Tensor basis;    // [d, d] the new Q'
  at::Tensor rotation; // [d, d] Q^T Q' with the unpermuted Q
};

// P = G Q, e = diag(Q^T P), Q' = qr(P, columns by falling e).Q. Empty when tolerance >= 0 and
// ||P - Q diag(e)||_F <= tolerance ||P||_F, and (finite: false) where G or Q is not finite. gram and basis are [d, d]; nothing
// of them is written.
std::optional<Refresh> refresh_basis(const at::Tensor& gram, const at::Tensor& basis, double tolerance,
                                     bool* finite = nullptr);

} // namespace soap_opt
