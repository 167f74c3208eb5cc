// The checks of refresh_basis_'s arguments, for every device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace soap_opt {

inline void check_refresh(at::TensorList grams, at::TensorList bases, at::TensorList orders, at::TensorList rotations,
                          const at::Tensor& outcomes, const std::optional<at::Tensor>& due) {
  const int64_t n = grams.size();
  TORCH_CHECK(int64_t(bases.size()) == n && int64_t(orders.size()) == n && int64_t(rotations.size()) == n,
              "refresh_basis_: ", n, " grams, but ", bases.size(), " bases, ", orders.size(), " orders and ", rotations.size(),
              " rotations");
  for (int64_t i = 0; i < n; ++i) {
    const at::Tensor& gram = grams[i];
    TORCH_CHECK(gram.dim() == 2 && gram.size(0) == gram.size(1) && gram.is_contiguous(), "refresh_basis_: gram ", i, " is ",
                gram.sizes(), gram.is_contiguous() ? "" : ", not contiguous");
    TORCH_CHECK(gram.scalar_type() == at::kFloat || gram.scalar_type() == at::kDouble, "refresh_basis_: gram ", i, " is ",
                gram.scalar_type());
    const auto alike = [&](const at::Tensor& x, const char* name) {
      TORCH_CHECK(x.sizes() == gram.sizes() && x.scalar_type() == gram.scalar_type() && x.is_contiguous() &&
                      x.device() == grams[0].device(),
                  "refresh_basis_: ", name, " ", i, " is ", x.sizes(), " ", x.scalar_type(), " on ", x.device(),
                  x.is_contiguous() ? "" : ", not contiguous", "; its gram is ", gram.sizes(), " ", gram.scalar_type(),
                  ", the first gram on ", grams[0].device());
    };
    alike(gram, "gram");
    alike(bases[i], "basis");
    alike(rotations[i], "rotation");
    TORCH_CHECK(orders[i].dim() == 1 && orders[i].size(0) == gram.size(0) && orders[i].scalar_type() == at::kLong &&
                    orders[i].is_contiguous() && orders[i].device() == grams[0].device(),
                "refresh_basis_: order ", i, " is ", orders[i].sizes(), " ", orders[i].scalar_type(), " on ",
                orders[i].device(), "; wanted: [", gram.size(0), "] int64 on ", grams[0].device());
  }
  TORCH_CHECK(outcomes.scalar_type() == at::kInt && outcomes.numel() == n && outcomes.is_contiguous() &&
                  (n == 0 || outcomes.device() == grams[0].device()),
              "refresh_basis_: outcomes must be [", n, "] int32 on the matrices' device");
  TORCH_CHECK(!due || (due->scalar_type() == at::kBool && due->numel() == n && due->is_contiguous() &&
                       (n == 0 || due->device() == grams[0].device())),
              "refresh_basis_: due must be [", n, "] bool on the matrices' device");
}

} // namespace soap_opt
