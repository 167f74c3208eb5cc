#include "refresh_basis.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>

namespace soap_opt {

std::optional<Refresh> refresh_basis(const at::Tensor& gram, const at::Tensor& basis, double tolerance) {
  const at::Tensor product = at::mm(gram, basis);
  const at::Tensor eigenvalues = (basis * product).sum(0);
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

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> refresh_basis_(at::TensorList grams, at::TensorList bases,
                                                                           double tolerance) {
  TORCH_CHECK(grams.size() == bases.size(), "refresh_basis_: ", grams.size(), " grams but ", bases.size(), " bases");
  std::vector<at::Tensor> orders(grams.size()), rotations(grams.size());
  for (size_t i = 0; i < grams.size(); ++i)
    TORCH_CHECK(grams[i].dim() == 2 && grams[i].size(0) == grams[i].size(1) && grams[i].sizes() == bases[i].sizes(),
                "refresh_basis_: gram ", i, " is ", grams[i].sizes(), ", its basis ", bases[i].sizes());
  for_each_matrix(grams, [&](size_t i) {
    if (auto refreshed = refresh_basis(grams[i], bases[i], tolerance)) {
      bases[i].copy_(refreshed->basis);
      orders[i] = refreshed->order;
      rotations[i] = refreshed->rotation;
    } else {
      orders[i] = at::arange(grams[i].size(0), grams[i].options().dtype(at::kLong));
      rotations[i] = at::eye(grams[i].size(0), grams[i].options());
    }
  });
  return {orders, rotations};
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
