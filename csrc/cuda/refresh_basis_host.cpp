// soap_opt::refresh_basis_ and init_basis on CUDA: the choice of a kernel for each matrix, and the blocked QR of matrices that
// outgrow shared memory. This file includes ATen and no CUDA headers: refresh_basis.h declares the kernels, and c10 gives the
// stream. Only init_basis waits for the device.

#include "refresh_basis.h"

#include "../refresh_arguments.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

namespace soap_opt::cuda {
namespace {

Stream current_stream(c10::Device device) {
  if (device.is_cpu()) return nullptr; // in tests/csrc/operator_on_fibers.cpp
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

// Elements of a stack of matrices: 16 matrices of 1024 x 1024. cuBLAS fills a GPU with less, and the copies of a stack (about
// 8) stay near half a gigabyte in all, or 8 d^2 floats for a single larger matrix.
#ifndef SOAP_OPT_BATCH_NUMEL
#define SOAP_OPT_BATCH_NUMEL (int64_t(1) << 24)
#endif
constexpr int64_t kBatchNumel = SOAP_OPT_BATCH_NUMEL;

// Q^T of a = Q R for a batch of matrices, as LAPACK makes it: panels of kLargePanel columns, each followed by products.
// a [B, d, d] contiguous, row j = column j of the matrix, is overwritten with V^T. The result is meaningless for matrices with
// another outcome than kRefreshed.
at::Tensor blocked_qr(const at::Tensor& a, const at::Tensor& outcomes, Stream stream) {
  const int64_t batch = a.size(0), d = a.size(1), panels = (d + kLargePanel - 1) / kLargePanel;
  const at::Tensor triangles = at::empty({panels, batch, kLargePanel, kLargePanel}, a.options());
  const auto width = [&](int64_t p) { return std::min<int64_t>(kLargePanel, d - p * kLargePanel); };
  const auto vectors = [&](int64_t p) { // V^T [B, width, d - first]
    const int64_t first = p * kLargePanel;
    return a.narrow(1, first, width(p)).narrow(2, first, d - first);
  };
  const auto triangle = [&](int64_t p) { return triangles[p].narrow(1, 0, width(p)).narrow(2, 0, width(p)); }; // T

  for (int64_t p = 0; p < panels; ++p) {
    const int64_t first = p * kLargePanel, after = first + width(p);
    factor_panel(a.mutable_data_ptr<float>(), triangles[p].mutable_data_ptr<float>(), batch, d, first, width(p),
                 outcomes.const_data_ptr<int32_t>(), stream);
    if (after == d) break;
    // The columns after the panel, in the rows that are not factored: x <- (I - V T^T V^T) x, or x^T <- x^T - ((x^T V) T) V^T
    const at::Tensor rest = a.narrow(1, after, d - after), v = vectors(p);
    const at::Tensor w = at::bmm(at::bmm(rest.narrow(2, first, d - first), v.mT()), triangle(p)); // [B, d - after, width]
    rest.narrow(2, after, d - after).baddbmm_(w, v.narrow(2, width(p), d - after), 1, -1);
  }
  const at::Tensor q = at::zeros_like(a); // [B, d, d] Q^T
  q.diagonal(0, 1, 2).fill_(1);
  for (int64_t p = panels - 1; p >= 0; --p) {
    // The part of Q that differs from the identity from here on: x <- (I - V T V^T) x
    const int64_t first = p * kLargePanel;
    const at::Tensor rest = q.narrow(1, first, d - first).narrow(2, first, d - first), v = vectors(p);
    const at::Tensor w = at::bmm(at::bmm(rest, v.mT()), triangle(p).mT()); // [B, d - first, width]
    rest.baddbmm_(w, v, 1, -1);
  }
  return q;
}

// Whether each matrix of q [*, d, d] is finite and orthogonal by the kernels' test (reflector.cuh), [*] bool.
at::Tensor orthogonal(const at::Tensor& q) {
  const int64_t d = q.size(-1);
  const at::Tensor place = at::arange(d, q.options()), turned = place * 0.6180339887498949;
  const at::Tensor entries = 1 + (turned - at::floor(turned));
  const at::Tensor probe = at::where(at::remainder(place, 2) == 0, entries, -entries).unsqueeze(-1); // [d, 1]
  const double eps =
      q.scalar_type() == at::kFloat ? std::numeric_limits<float>::epsilon() : std::numeric_limits<double>::epsilon();
  const double bound = 512 * eps * std::sqrt(double(d));
  const at::Tensor off = (at::matmul(q.mT(), at::matmul(q, probe)) - probe).abs().amax({-2, -1});
  const at::Tensor length = (q.square().sum(-2) - 1).abs().amax(-1);
  return (off <= bound).logical_and(length <= bound); // false for NaN
}

// The refresh of a batch of matrices of equal size by ATen. It has two steps, because memory may run out in the first: no basis
// is written before every batch has allocated all that it needs.
struct Batch {
  std::vector<int64_t> members;
  at::TensorList grams, bases, orders, rotations;
  const std::optional<at::Tensor>& due; // [n] bool
  double tolerance;
  std::vector<at::Tensor> kept{}; // for each member a bool on the device

  // Writes orders and outcomes. Q', or the Q that stays, waits in the rotations' memory.
  void factor(const at::Tensor& outcomes, Stream stream) {
    const auto stacked = [&](at::TensorList list) {
      std::vector<at::Tensor> chosen;
      for (int64_t i : members) chosen.push_back(list[i]);
      return at::stack(chosen);
    };
    const at::Tensor gram = stacked(grams), basis = stacked(bases); // [B, d, d]
    const at::Tensor transposed = basis.mT();
    // The power of two that brings the largest entry into [1, 2), as in power_of_two_scale
    const at::Tensor largest = gram.abs().amax({1, 2}, /*keepdim=*/true);
    const at::Tensor scale = at::exp2(-at::floor(at::log2(largest)).clamp_min(-126));
    gram.mul_(at::where((largest > 0).logical_and(at::isfinite(largest)), scale, at::ones_like(scale)));
    const at::Tensor product = at::bmm(transposed, gram.mT());   // [B, d, d] P^T
    const at::Tensor estimates = (transposed * product).sum(-1); // [B, d] e
    const at::Tensor norm = product.square().sum({1, 2});        // [B]
    const at::Tensor finite = at::isfinite(norm);
    at::Tensor wanted = at::ones_like(finite);
    if (due) {
      std::vector<at::Tensor> chosen;
      for (int64_t i : members) chosen.push_back((*due)[i]);
      wanted = at::stack(chosen);
    }
    at::Tensor chosen = finite.logical_and(wanted); // [B]
    if (tolerance >= 0) {
      const at::Tensor off = (product - transposed * estimates.unsqueeze(-1)).square().sum({1, 2});
      chosen = chosen.logical_and((norm > 0).logical_and(at::sqrt(off / norm) > tolerance));
    }
    at::Tensor failed = wanted.logical_and(finite.logical_not());
    at::Tensor outcome = (chosen.to(at::kInt) * int(kRefreshed)).contiguous();

    const at::Tensor order = estimates.argsort(/*stable=*/true, /*dim=*/-1, /*descending=*/true); // [B, d]
    const at::Tensor sorted = product.gather(1, order.unsqueeze(-1).expand_as(product)).contiguous();
    const at::Tensor q = sorted.scalar_type() == at::kFloat ? blocked_qr(sorted, outcome, stream).mT()
                                                            : std::get<0>(at::linalg_qr(sorted.mT())); // [B, d, d] Q'
    // Whatever the Gram was, only an orthogonal Q' is written
    const at::Tensor good = orthogonal(q);
    failed = failed.logical_or(chosen.logical_and(good.logical_not()));
    chosen = chosen.logical_and(good);
    outcome = chosen.to(at::kInt) * int(kRefreshed) + failed.to(at::kInt) * int(kFailed);
    const at::Tensor natural = at::arange(gram.size(1), order.options()), stays = chosen.logical_not();
    const at::Tensor next = at::where(stays.view({-1, 1, 1}), basis, q); // [B, d, d]
    for (size_t b = 0; b < members.size(); ++b) {
      const int64_t i = members[b];
      orders[i].copy_(at::where(stays[b], natural, order[b]));
      rotations[i].copy_(next[b]);
      outcomes[i].copy_(outcome[b]);
      kept.push_back(stays[b]);
    }
  }

  // Writes bases and rotations. work: at least d^2 elements.
  void finish(const at::Tensor& work) const {
    for (size_t b = 0; b < members.size(); ++b) {
      const at::Tensor &basis = bases[members[b]], &rotation = rotations[members[b]];
      at::Tensor product = work.narrow(0, 0, basis.numel()).view(basis.sizes()); // [d, d] Q^T Q'
      at::mm_out(product, basis.mT(), rotation);
      product.masked_fill_(kept[b], 0);
      product.diagonal().masked_fill_(kept[b], 1);
      basis.copy_(rotation);
      rotation.copy_(product);
    }
  }
};

void refresh_basis_(at::TensorList grams, at::TensorList bases, at::TensorList orders, at::TensorList rotations,
                    const at::Tensor& outcomes, double tolerance, const std::optional<at::Tensor>& due) {
  check_refresh(grams, bases, orders, rotations, outcomes, due);
  const int64_t n = grams.size();
  if (n == 0) return;
  const c10::Device device = grams[0].device();
  const c10::DeviceGuard guard(device);
  // No TF32 and no autocast: reduced precision in P or in the updates ruins the basis
  const at::NoTF32Guard no_tf32;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Stream stream = current_stream(device);
  const int64_t limit = shared_memory_limit();

  std::vector<Matrix> in_warps, in_blocks;
  std::map<std::pair<at::ScalarType, int64_t>, std::vector<int64_t>> batches;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t d = grams[i].size(0);
    if (grams[i].scalar_type() == at::kFloat && (d <= kWarpLimit || fits_in_block(d, limit))) {
      (d <= kWarpLimit ? in_warps : in_blocks)
          .push_back({grams[i].const_data_ptr<float>(), bases[i].mutable_data_ptr<float>(),
                      rotations[i].mutable_data_ptr<float>(), orders[i].mutable_data_ptr<int64_t>(), int32_t(d), int32_t(i)});
    } else if (d > 0) {
      batches[{grams[i].scalar_type(), d}].push_back(i);
    }
  }
  const bool* when = due ? due->const_data_ptr<bool>() : nullptr;
  int32_t* outcome = outcomes.mutable_data_ptr<int32_t>();
  // (before the first write: memory may run out)
  std::stable_sort(in_blocks.begin(), in_blocks.end(), [](const Matrix& a, const Matrix& b) { return a.size > b.size; });
  at::Tensor workspace;
  if (!in_blocks.empty())
    workspace = at::empty({block_workspace(in_blocks.data(), in_blocks.size())}, grams[in_blocks[0].index].options());
  // The largest matrices first: they take longest
  std::vector<Batch> large;
  std::map<at::ScalarType, at::Tensor> work;
  for (auto alike = batches.rbegin(); alike != batches.rend(); ++alike) {
    const auto& [kind, members] = *alike;
    const int64_t count = std::max<int64_t>(1, kBatchNumel / (kind.second * kind.second));
    for (size_t first = 0; first < members.size(); first += count) {
      const auto begin = members.begin() + first, end = members.begin() + std::min<size_t>(first + count, members.size());
      large.push_back({{begin, end}, grams, bases, orders, rotations, due, tolerance});
      large.back().factor(outcomes, stream);
    }
    if (!work.count(kind.first)) work[kind.first] = at::empty(kind.second * kind.second, grams[members[0]].options());
  }
  for (const Batch& batch : large) batch.finish(work[grams[batch.members[0]].scalar_type()]);
  if (!in_blocks.empty())
    refresh_in_blocks(in_blocks.data(), in_blocks.size(), when, tolerance, outcome, workspace.mutable_data_ptr<float>(),
                      stream);
  if (!in_warps.empty()) refresh_in_warps(in_warps.data(), in_warps.size(), when, tolerance, outcome, stream);
}

// Q = flip(eigh(G + 1e-30 I)) of grams [B, d, d]; undefined where eigh does not converge, or Q is not orthogonal.
at::Tensor eigenvectors(const at::Tensor& grams) {
  try {
    const at::Tensor damping = 1e-30 * at::eye(grams.size(-1), grams.options());
    const at::Tensor vectors = std::get<1>(at::linalg_eigh(grams + damping));
    if (orthogonal(vectors).all().item<bool>()) return vectors.flip(-1).contiguous();
  } catch (const c10::LinAlgError&) {
  }
  return {};
}

std::vector<at::Tensor> init_basis(at::TensorList grams) {
  std::vector<at::Tensor> bases(grams.size());
  std::map<std::pair<at::ScalarType, int64_t>, std::vector<int64_t>> alike;
  for (size_t i = 0; i < grams.size(); ++i) {
    TORCH_CHECK(grams[i].dim() == 2 && grams[i].size(0) == grams[i].size(1) && grams[i].device() == grams[0].device(),
                "init_basis: gram ", i, " is ", grams[i].sizes(), " on ", grams[i].device());
    alike[{grams[i].scalar_type(), grams[i].size(0)}].push_back(i);
  }
  if (grams.empty()) return bases;
  const c10::DeviceGuard guard(grams[0].device());
  for (const auto& [kind, members] : alike) {
    const int64_t count = std::max<int64_t>(1, kBatchNumel / std::max<int64_t>(1, kind.second * kind.second));
    for (size_t first = 0; first < members.size(); first += count) {
      std::vector<at::Tensor> chosen;
      for (size_t k = first; k < std::min<size_t>(first + count, members.size()); ++k) chosen.push_back(grams[members[k]]);
      const at::Tensor together = eigenvectors(at::stack(chosen));
      for (size_t b = 0; b < chosen.size(); ++b) {
        // A matrix that does not converge must not take the others to float64. clone: a view would keep the whole batch.
        at::Tensor basis = together.defined() ? together[b].clone() : eigenvectors(chosen[b]);
        if (!basis.defined()) {
          // eigh fails on near-degenerate float32 matrices; in float64 their clusters of eigenvalues are apart.
          basis = eigenvectors(chosen[b].to(at::kDouble));
          basis = basis.defined() ? basis.to(kind.first) : at::empty({0, 0}, chosen[b].options());
        }
        bases[members[first + b]] = basis;
      }
    }
  }
  return bases;
}

} // namespace

TORCH_LIBRARY_IMPL(soap_opt, CUDA, m) {
  m.impl("refresh_basis_", &refresh_basis_);
  m.impl("init_basis", &init_basis);
}

} // namespace soap_opt::cuda
