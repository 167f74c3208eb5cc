#include "refresh_basis.h"

#include "../refresh_arguments.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>

namespace soap_opt {

std::optional<Refresh> refresh_basis(const at::Tensor& gram, const at::Tensor& basis, double tolerance, bool* finite) {
  const at::Tensor product = at::mm(gram, basis);
  const at::Tensor eigenvalues = (basis * product).sum(0);
  // What is not finite in P or Q is not finite in e: 0 * inf is a NaN
  const bool usable = std::isfinite(eigenvalues.abs().sum().item<double>());
  if (finite != nullptr) *finite = usable;
  if (!usable) return std::nullopt;
  if (tolerance >= 0) {
    const double norm = at::linalg_vector_norm(product).item<double>();
    if (norm == 0 || at::linalg_vector_norm(product - basis * eigenvalues).item<double>() / norm <= tolerance)
      return std::nullopt;
  }
  Refresh result;
  result.order = eigenvalues.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/true);
  // LAPACK's result is column-major; the state is row-major
  result.basis = std::get<0>(at::linalg_qr(product.index_select(1, result.order))).contiguous();
  result.rotation = at::mm(basis.t(), result.basis);
  return result;
}

namespace {

// Small matrices are spread over the threads, one each; LAPACK has all threads for a large one.
constexpr int64_t kThreadedSize = 512;

template <typename Function>
void for_each_matrix(at::TensorList matrices, const Function& function) {
  std::vector<int64_t> small;
  for (size_t i = 0; i < matrices.size(); ++i) {
    if (matrices[i].size(0) > kThreadedSize)
      function(i);
    else
      small.push_back(i);
  }
  std::atomic<size_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), small.size()), 1, [&](int64_t, int64_t) {
    at::AutoDispatchBelowADInplaceOrView guard;
    for (size_t k; (k = next++) < small.size();) function(small[k]);
  });
}

at::Tensor refresh_basis_(at::TensorList grams, at::TensorList bases, at::TensorList orders, at::TensorList rotations,
                          double tolerance, const std::optional<at::Tensor>& due) {
  check_refresh(grams, bases, orders, rotations, due);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset); // P in bfloat16 ruins the basis
  const bool* when = due ? due->const_data_ptr<bool>() : nullptr;
  at::Tensor outcomes = at::zeros({int64_t(grams.size())}, at::kInt);
  int32_t* outcome = outcomes.mutable_data_ptr<int32_t>(); // 0 kept, 1 refreshed, 2 not finite
  for_each_matrix(grams, [&](size_t i) {
    bool finite = true;
    std::optional<Refresh> refreshed;
    if (when == nullptr || when[i]) refreshed = refresh_basis(grams[i], bases[i], tolerance, &finite);
    outcome[i] = refreshed ? 1 : finite ? 0 : 2;
    if (refreshed) {
      bases[i].copy_(refreshed->basis);
      orders[i].copy_(refreshed->order);
      rotations[i].copy_(refreshed->rotation);
    } else {
      orders[i].copy_(at::arange(grams[i].size(0), orders[i].options()));
      rotations[i].zero_().fill_diagonal_(1);
    }
  });
  return outcomes;
}

at::Tensor eigenvectors(const at::Tensor& gram) {
  const at::Tensor damped = gram + 1e-30 * at::eye(gram.size(0), gram.options());
  at::Tensor vectors;
  try {
    vectors = std::get<1>(at::linalg_eigh(damped));
    if (!at::isfinite(vectors).all().item<bool>()) vectors.reset();
  } catch (const c10::LinAlgError&) {
  }
  // Near-degenerate float32 input is what eigh fails on; in float64 its clusters are apart.
  if (!vectors.defined()) {
    try {
      vectors = std::get<1>(at::linalg_eigh(damped.to(at::kDouble))).to(gram.scalar_type());
    } catch (const c10::LinAlgError&) {
      return at::empty({0, 0}, gram.options());
    }
  }
  return vectors.flip(-1).contiguous();
}

std::vector<at::Tensor> init_basis(at::TensorList grams) {
  std::vector<at::Tensor> bases(grams.size());
  for_each_matrix(grams, [&](size_t i) { bases[i] = eigenvectors(grams[i]); });
  return bases;
}

} // namespace

TORCH_LIBRARY_IMPL(soap_opt, CPU, m) {
  m.impl("refresh_basis_", &refresh_basis_);
  m.impl("init_basis", &init_basis);
}

} // namespace soap_opt
