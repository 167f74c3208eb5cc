// soap_opt::refresh_basis_ and soap_opt::init_basis on the CPU: one core for a small matrix, all threads for a large one.
#include "refresh_basis.h"

#include "../refresh_arguments.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <map>
#include <memory>
#include <numeric>
#include <optional>

#include "householder.h"
#include "products.h"
#include "tiles.h"
#include "wide.h"

namespace soap_opt {
namespace {

// Up to this size plain loops do the QR in place: calls into ATen and LAPACK cost 17 microseconds, and the loops need one for a
// 4 x 4 matrix. For larger matrices householder.h does it.
constexpr int64_t kLoopRefresh = 32;

// a [d, d] row-major <- Q of its QR decomposition, by Householder reflections, H_k = I - tau_k v_k v_k^T with v_k[k] = 1.
template <typename T>
void small_householder_q(T* a, int64_t d) {
  T taus[kLoopRefresh], line[kLoopRefresh], noise[kLoopRefresh];
  for (int64_t k = 0; k < d; ++k) noise[k] = noise_of_column(largest_magnitude(a + k, d, d), d);
  const auto square_below = [&](int64_t k) {
    T sum = 0;
    for (int64_t i = k + 1; i < d; ++i) sum += a[i * d + k] * a[i * d + k];
    return sum;
  };
  for (int64_t k = 0; k < d; ++k) {
    T below = square_below(k), alpha = a[k * d + k];
    bool left = alpha * alpha + below > noise[k] * noise[k];
    taus[k] = 0;
    if (alpha * alpha + below < kTinySquare<T>) {
      // Squares lose their small terms to underflow: a block of a Gram that is 1e-22 of the rest would cost Q 1e-2 of its
      // orthogonality. Take the norm again, scaled.
      const T largest = largest_magnitude(a + k * d + k, d - k, d);
      left = largest > noise[k];
      if (left) scale_tiny(a + k * d + k, d - k, d, largest);
      below = square_below(k);
      alpha = a[k * d + k];
    }
    if (!left || below == 0) continue; // nothing to reflect: H = I
    const Reflector<T> reflector(alpha, below);
    taus[k] = reflector.tau;
    for (int64_t i = k + 1; i < d; ++i) a[i * d + k] *= reflector.inverse;
    // the trailing columns: A -= tau v (v^T A)
    for (int64_t j = k + 1; j < d; ++j) line[j] = a[k * d + j];
    for (int64_t i = k + 1; i < d; ++i)
      for (int64_t j = k + 1; j < d; ++j) line[j] += a[i * d + k] * a[i * d + j];
    for (int64_t j = k + 1; j < d; ++j) a[k * d + j] -= taus[k] * line[j];
    for (int64_t i = k + 1; i < d; ++i)
      for (int64_t j = k + 1; j < d; ++j) a[i * d + j] -= taus[k] * a[i * d + k] * line[j];
  }
  // Q = H_1 ... H_d I, from the last reflection to the first: entries right of and below a reflection are formed when it is
  // applied
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

// to <- from x_g M on all free threads, both [A, D, B], A or B = 1, M [D, D]
template <typename T>
void wide_product(const T* from, T* to, int64_t before, int64_t after, const T* matrix, int64_t d) {
  const int64_t threads = free_threads(), room = wide_room<T>(d);
  const std::unique_ptr<T[]> rooms(new T[threads * room]);
  product_wide<T>(from, to, before, after, {matrix, d}, threads, rooms.get(), room);
}

// columns [d, d], row stride padded_row(d): row j <- scale times column order[j] of a [d, d]
template <typename T>
void sort_columns(const T* a, const std::vector<int64_t>& order, T scale, T* columns) {
  const int64_t d = order.size(), ld = padded_row<T>(d);
  for_each_copied_block(d, [&](int64_t i) { // a's rows
    for (int64_t j = 0; j < d; ++j)
      for (int64_t r = i; r < std::min(d, i + kCopied); ++r) columns[j * ld + r] = a[r * d + order[j]] * scale;
  });
}

// The power of two that brings `largest` near 1, so that squares of scaled numbers neither vanish nor overflow; 1 for 0.
template <typename T>
T power_of_two_scale(T largest) {
  if (!(largest > 0)) return 1;
  const int exponent = std::numeric_limits<T>::max_exponent - 8; // of the numbers that can be scaled and scaled back
  return std::ldexp(T(1), -std::clamp(std::ilogb(largest), -exponent, exponent));
}

// ||Q^T P - diag(e)||_F / ||P||_F of P = G Q and Q, both [d, d], and e [d]; 0 for P = 0.
template <typename T>
double off_diagonal_share(const T* product, const T* basis, const T* eigenvalues, int64_t d) {
  double norm = 0, off = 0;
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < d; ++j) {
      const double p = product[i * d + j], rest = p - double(basis[i * d + j]) * eigenvalues[j];
      norm += p * p;
      off += rest * rest;
    }
  return norm == 0 ? 0 : std::sqrt(off / norm);
}

} // namespace

template <typename T>
Refresh<T> refresh_basis(const T* gram, const T* basis, int64_t d, double tolerance, bool rotation) {
  Refresh<T> result;
  result.outcome = Outcome::failed;
  const bool tiles = d > kLoopRefresh, threaded = d > kThreadedSize;
  // A power of two does not change Q'. Without it the Gram's products with Q would vanish or overflow near the ends of T's
  // range.
  const T largest_gram = largest_magnitude(gram, d * d);
  if (!(largest_gram <= std::numeric_limits<T>::max())) return result;
  std::unique_ptr<T[]> scaled;
  if (largest_gram > 0 && std::abs(std::ilogb(largest_gram)) > std::numeric_limits<T>::max_exponent / 4) {
    scaled.reset(new T[d * d]);
    const T scale = power_of_two_scale(largest_gram);
    for (int64_t i = 0; i < d * d; ++i) scaled[i] = gram[i] * scale;
    gram = scaled.get();
  }
  std::optional<FlushSubnormals> flush;
  if (threaded) flush.emplace(); // as in the other threads, so that their number makes no difference
  const std::unique_ptr<T[]> product(new T[d * d + kPackedWidth<T>]);
  std::unique_ptr<T[]> basis_packed, packed;
  std::vector<T> eigenvalues(d, T(0));
  if (threaded) {
    wide_product(gram, product.get(), d, 1, basis, d);
  } else if (tiles) {
    basis_packed.reset(new T[packed_numel<T>(d, d)]);
    packed.reset(new T[packed_numel<T>(d, d)]);
    pack_rows<T>(basis_packed.get(), d, 0, basis, d, d, d);
    pack_transposed<T>(packed.get(), d, 0, gram, d, d, d);
    multiply_panels<T>(product.get(), d, d, d, packed.get(), basis_packed.get(), d);
  } else {
    gemm<T>({product.get(), d, d}, {gram, d, d}, {basis, d, d});
  }
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < d; ++j) eigenvalues[j] += basis[i * d + j] * product[i * d + j];
  // An entry of P or Q that is not finite makes e not finite: 0 * inf is NaN
  if (!std::all_of(eigenvalues.begin(), eigenvalues.end(), [](T e) { return std::isfinite(e); })) return result;
  if (tolerance >= 0 && off_diagonal_share(product.get(), basis, eigenvalues.data(), d) <= tolerance) {
    result.outcome = Outcome::kept;
    return result;
  }
  result.order.resize(d);
  std::iota(result.order.begin(), result.order.end(), int64_t(0));
  std::stable_sort(result.order.begin(), result.order.end(),
                   [&](int64_t a, int64_t b) { return eigenvalues[a] > eigenvalues[b]; });
  result.basis.resize(d * d + kPackedWidth<T>);
  T* q = result.basis.data();
  const T scale = power_of_two_scale(largest_magnitude(product.get(), d * d));
  if (tiles) {
    const std::unique_ptr<T[]> columns(new T[d * padded_row<T>(d)]);
    sort_columns(product.get(), result.order, scale, columns.get());
    householder_q(columns.get(), q, d);
  } else {
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < d; ++j) q[i * d + j] = product[i * d + result.order[j]] * scale;
    small_householder_q(q, d);
  }
  // Whatever the Gram was, only an orthogonal Q' leaves this function
  eigenvalues.resize(3 * d);
  if (!is_orthogonal(q, d, eigenvalues.data())) return result;
  result.outcome = Outcome::refreshed;
  if (!rotation) return result;
  result.rotation.resize(d * d + kPackedWidth<T>); // (allocated late: the QR needs several d^2 too)
  if (threaded) {
    wide_product(q, result.rotation.data(), 1, d, basis, d);
  } else if (tiles) {
    pack_rows<T>(packed.get(), d, 0, q, d, d, d);
    multiply_panels<T>(result.rotation.data(), d, d, d, basis_packed.get(), packed.get(), d);
  } else {
    gemm<T>({result.rotation.data(), d, d}, Matrix<const T>(basis, d, d).t(), {q, d, d});
  }
  return result;
}
template Refresh<float> refresh_basis(const float*, const float*, int64_t, double, bool);
template Refresh<double> refresh_basis(const double*, const double*, int64_t, double, bool);

namespace {

// function(indices) for all matrices. A large matrix has a call of its own, with all threads. Calls for other matrices have one
// thread each; matrices of equal size, up to `together`, share a call.
template <typename Function>
void for_each_batch(at::TensorList matrices, int64_t together, const Function& function) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  std::map<std::pair<int64_t, at::ScalarType>, std::vector<int64_t>> by_size;
  for (size_t i = 0; i < matrices.size(); ++i) by_size[{matrices[i].size(0), matrices[i].scalar_type()}].push_back(i);
  std::vector<std::vector<int64_t>> batches; // the largest matrices first: the last call to finish is a short one
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

void refresh_basis_(at::TensorList grams, at::TensorList bases, at::TensorList orders, at::TensorList rotations,
                    const at::Tensor& outcomes, double tolerance, const std::optional<at::Tensor>& due) {
  check_refresh(grams, bases, orders, rotations, outcomes, due);
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset); // P in bfloat16 ruins the basis
  const bool* when = due ? due->const_data_ptr<bool>() : nullptr;
  int32_t* outcome = outcomes.mutable_data_ptr<int32_t>();
  for_each_batch(grams, 0, [&](const std::vector<int64_t>& batch) {
    const int64_t i = batch[0]; // each batch is one matrix
    const int64_t d = grams[i].size(0);
    if (when != nullptr && !when[i] && outcome[i] == 0) return; // order and rotation are identities already
    AT_DISPATCH_FLOATING_TYPES(grams[i].scalar_type(), "soap_opt::refresh_basis_", [&] {
      Refresh<scalar_t> refreshed;
      if (when == nullptr || when[i])
        refreshed =
            refresh_basis<scalar_t>(grams[i].const_data_ptr<scalar_t>(), bases[i].const_data_ptr<scalar_t>(), d, tolerance);
      outcome[i] = int32_t(refreshed.outcome);
      int64_t* order = orders[i].mutable_data_ptr<int64_t>();
      if (refreshed.done()) {
        std::copy(refreshed.order.begin(), refreshed.order.end(), order);
        std::copy_n(refreshed.basis.begin(), d * d, bases[i].mutable_data_ptr<scalar_t>());
        std::copy_n(refreshed.rotation.begin(), d * d, rotations[i].mutable_data_ptr<scalar_t>());
      } else {
        std::iota(order, order + d, int64_t(0));
        rotations[i].zero_().fill_diagonal_(1);
      }
    });
  });
}

// Whether all of vectors [*, d, d], contiguous, are orthogonal.
bool all_orthogonal(const at::Tensor& vectors) {
  const int64_t d = vectors.size(-1), count = vectors.numel() / std::max<int64_t>(1, d * d);
  bool good = true;
  AT_DISPATCH_FLOATING_TYPES(vectors.scalar_type(), "soap_opt::init_basis", [&] {
    std::vector<scalar_t> room(3 * d);
    const scalar_t* q = vectors.const_data_ptr<scalar_t>();
    for (int64_t i = 0; i < count; ++i) good &= is_orthogonal(q + i * d * d, d, room.data());
  });
  return good;
}

// Eigenvectors of gram [*, d, d], largest eigenvalue first; undefined where LAPACK gave up or its result is not orthogonal.
at::Tensor eigenvectors(const at::Tensor& gram) {
  try {
    const at::Tensor damped = gram + 1e-30 * at::eye(gram.size(-1), gram.options());
    const at::Tensor vectors = std::get<1>(at::linalg_eigh(damped)).flip(-1).contiguous();
    if (all_orthogonal(vectors)) return vectors;
  } catch (const c10::LinAlgError&) {
  }
  return {};
}

std::vector<at::Tensor> init_basis(at::TensorList grams) {
  // LAPACK's results depend on how many threads it may use, even where it uses one
  const SameForAllThreads same;
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
      // eigh fails on near-degenerate float32 matrices; in float64 their clusters of eigenvalues are apart.
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
