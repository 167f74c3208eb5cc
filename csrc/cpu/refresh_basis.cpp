#include "refresh_basis.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <map>
#include <numeric>

#include "products.h"

namespace soap_opt {
namespace {

// Up to this size a QR is done in place by plain loops: calls into ATen and LAPACK cost 17 microseconds, of which a 4 x 4
// matrix needs one. From about 32 on LAPACK's blocking wins.
constexpr int64_t kLoopRefresh = 32;

// a [d, d] row-major <- Q of its QR decomposition, by Householder reflections, H_k = I - tau_k v_k v_k^T with v_k[k] = 1.
template <typename T>
void householder_q(T* a, int64_t d) {
  T taus[kLoopRefresh], line[kLoopRefresh];
  for (int64_t k = 0; k < d; ++k) {
    T below = 0;
    for (int64_t i = k + 1; i < d; ++i) below += a[i * d + k] * a[i * d + k];
    const T alpha = a[k * d + k];
    taus[k] = 0;
    if (below == 0) continue; // nothing to reflect: H = I
    const T beta = -std::copysign(std::sqrt(alpha * alpha + below), alpha);
    taus[k] = (beta - alpha) / beta;
    for (int64_t i = k + 1; i < d; ++i) a[i * d + k] /= alpha - beta;
    // the trailing columns: A -= tau v (v^T A)
    for (int64_t j = k + 1; j < d; ++j) line[j] = a[k * d + j];
    for (int64_t i = k + 1; i < d; ++i)
      for (int64_t j = k + 1; j < d; ++j) line[j] += a[i * d + k] * a[i * d + j];
    for (int64_t j = k + 1; j < d; ++j) a[k * d + j] -= taus[k] * line[j];
    for (int64_t i = k + 1; i < d; ++i)
      for (int64_t j = k + 1; j < d; ++j) a[i * d + j] -= taus[k] * a[i * d + k] * line[j];
  }
  // Q = H_1 ... H_d I, from the last: what lies right of and below a reflection is formed when it is applied
  for (int64_t k = d - 1; k >= 0; --k) {
    for (int64_t j = k + 1; j < d; ++j) line[j] = 0;
    for (int64_t i = k + 1; i < d; ++i)
      for (int64_t j = k + 1; j < d; ++j) line[j] += a[i * d + k] * a[i * d + j];
    for (int64_t j = k + 1; j < d; ++j) a[k * d + j] = -taus[k] * line[j];
    for (int64_t i = k + 1; i < d; ++i) {
      for (int64_t j = k + 1; j < d; ++j) a[i * d + j] -= taus[k] * a[i * d + k] * line[j];
      a[i * d + k] *= -taus[k];
    }
    a[k * d + k] = 1 - taus[k];
  }
}

} // namespace

template <typename T>
Refresh<T> refresh_basis(const T* gram, const T* basis, int64_t d, double tolerance) {
  Refresh<T> result;
  std::vector<T> product(d * d), eigenvalues(d, T(0));
  gemm<T>({product.data(), d, d}, {gram, d, d}, {basis, d, d});
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < d; ++j) eigenvalues[j] += basis[i * d + j] * product[i * d + j];
  if (tolerance >= 0) {
    double norm = 0, off = 0;
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < d; ++j) {
        const double p = product[i * d + j], rest = p - double(basis[i * d + j]) * eigenvalues[j];
        norm += p * p;
        off += rest * rest;
      }
    if (norm == 0 || std::sqrt(off / norm) <= tolerance) return result;
  }
  result.done = true;
  result.order.resize(d);
  std::iota(result.order.begin(), result.order.end(), int64_t(0));
  std::stable_sort(result.order.begin(), result.order.end(),
                   [&](int64_t a, int64_t b) { return eigenvalues[a] > eigenvalues[b]; });
  result.basis.resize(d * d);
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < d; ++j) result.basis[i * d + j] = product[i * d + result.order[j]];
  if (d <= kLoopRefresh) {
    // Powers of two, so that squares of tiny or huge Grams neither vanish nor overflow
    T largest = 0;
    for (T x : result.basis) largest = std::max(largest, std::abs(x));
    if (largest > 0) {
      const T scale = std::ldexp(T(1), -std::clamp(std::ilogb(largest), -120, 120));
      for (T& x : result.basis) x *= scale;
    }
    householder_q(result.basis.data(), d);
  } else {
    const at::Tensor sorted = at::from_blob(result.basis.data(), {d, d}, c10::CppTypeToScalarType<T>::value);
    sorted.copy_(std::get<0>(at::linalg_qr(sorted))); // LAPACK's result is column-major
  }
  result.rotation.resize(d * d);
  gemm<T>({result.rotation.data(), d, d}, Matrix<const T>(basis, d, d).t(), {result.basis.data(), d, d});
  return result;
}
template Refresh<float> refresh_basis(const float*, const float*, int64_t, double);
template Refresh<double> refresh_basis(const double*, const double*, int64_t, double);

namespace {

// function(indices) for all matrices: large ones alone, with all threads; the others one thread each call, those of up to
// `together` rows in batches of one size.
template <typename Function>
void for_each_batch(at::TensorList matrices, int64_t together, const Function& function) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  std::map<std::pair<int64_t, at::ScalarType>, std::vector<int64_t>> by_size;
  for (size_t i = 0; i < matrices.size(); ++i) by_size[{matrices[i].size(0), matrices[i].scalar_type()}].push_back(i);
  std::vector<std::vector<int64_t>> batches; // from the largest matrices to the smallest: the last to finish is a short one
  for (auto kind = by_size.rbegin(); kind != by_size.rend(); ++kind) {
    const auto& [size, indices] = std::pair(kind->first.first, kind->second);
    if (size > kThreadedSize) {
      for (int64_t i : indices) function(std::vector<int64_t>{i});
      continue;
    }
    const int64_t count = indices.size(), most = size <= together ? std::clamp<int64_t>(count / (4 * threads), 1, 256) : 1;
    for (int64_t first = 0; first < count; first += most)
      batches.emplace_back(indices.begin() + first, indices.begin() + std::min(count, first + most));
  }
  std::atomic<size_t> next{0};
  at::parallel_for(0, std::min<int64_t>(threads, batches.size()), 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;
    for (int64_t worker = begin; worker < end; ++worker)
      for (size_t k; (k = next++) < batches.size();) function(batches[k]);
  });
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> refresh_basis_(at::TensorList grams, at::TensorList bases,
                                                                           double tolerance) {
  TORCH_CHECK(grams.size() == bases.size(), "refresh_basis_: ", grams.size(), " grams but ", bases.size(), " bases");
  std::vector<at::Tensor> orders(grams.size()), rotations(grams.size());
  for (size_t i = 0; i < grams.size(); ++i)
    TORCH_CHECK(grams[i].dim() == 2 && grams[i].size(0) == grams[i].size(1) && grams[i].sizes() == bases[i].sizes() &&
                    grams[i].scalar_type() == bases[i].scalar_type(),
                "refresh_basis_: gram ", i, " is ", grams[i].sizes(), ", ", grams[i].scalar_type(), ", its basis ",
                bases[i].sizes(), ", ", bases[i].scalar_type());
  for_each_batch(grams, 0, [&](const std::vector<int64_t>& batch) {
    const int64_t i = batch[0]; // each alone
    const int64_t d = grams[i].size(0);
    AT_DISPATCH_FLOATING_TYPES(grams[i].scalar_type(), "soap_opt::refresh_basis_", [&] {
      const at::Tensor gram = grams[i].contiguous(), basis = bases[i].contiguous();
      auto refreshed = refresh_basis<scalar_t>(gram.const_data_ptr<scalar_t>(), basis.const_data_ptr<scalar_t>(), d, tolerance);
      orders[i] = at::arange(d, grams[i].options().dtype(at::kLong));
      rotations[i] = at::eye(d, grams[i].options());
      if (refreshed.done) {
        bases[i].copy_(at::from_blob(refreshed.basis.data(), {d, d}, grams[i].options()));
        rotations[i].copy_(at::from_blob(refreshed.rotation.data(), {d, d}, grams[i].options()));
        std::copy(refreshed.order.begin(), refreshed.order.end(), orders[i].mutable_data_ptr<int64_t>());
      }
    });
  });
  return {orders, rotations};
}

// [*, d, d] -> eigenvectors, largest eigenvalue first; undefined where LAPACK gave up.
at::Tensor eigenvectors(const at::Tensor& gram) {
  try {
    const at::Tensor vectors = std::get<1>(at::linalg_eigh(gram + 1e-30 * at::eye(gram.size(-1), gram.options())));
    if (at::isfinite(vectors).all().item<bool>()) return vectors.flip(-1).contiguous();
  } catch (const c10::LinAlgError&) {
  }
  return {};
}

std::vector<at::Tensor> init_basis(at::TensorList grams) {
  std::vector<at::Tensor> bases(grams.size());
  constexpr int64_t together = 64; // an ATen call for each of 4,000 4 x 4 matrices would take longer than LAPACK
  for_each_batch(grams, together, [&](const std::vector<int64_t>& batch) {
    if (batch.size() > 1) {
      std::vector<at::Tensor> members;
      for (int64_t i : batch) members.push_back(grams[i]);
      const at::Tensor vectors = eigenvectors(at::stack(members));
      if (vectors.defined()) {
        for (size_t k = 0; k < batch.size(); ++k) bases[batch[k]] = vectors[k].clone(); // not views of one storage
        return;
      }
    }
    for (int64_t i : batch) {
      bases[i] = eigenvectors(grams[i]);
      // Near-degenerate float32 input is what eigh fails on; in float64 its clusters are apart.
      if (!bases[i].defined()) bases[i] = eigenvectors(grams[i].to(at::kDouble));
      bases[i] = bases[i].defined() ? bases[i].to(grams[i].scalar_type()) : at::empty({0, 0}, grams[i].options());
    }
  });
  return bases;
}

} // namespace

TORCH_LIBRARY_IMPL(soap_opt, CPU, m) {
  m.impl("refresh_basis_", &refresh_basis_);
  m.impl("init_basis", &init_basis);
}

} // namespace soap_opt
