// Step 6 of a parameter: its due modes refreshed, and v and m brought into the new bases.
#pragma once

#include "factor.h"
#include "refresh_basis.h"
#include "step_arguments.h"
#include "task.h"

namespace soap_opt {

// v [A, D, B] <- v with its dimension D permuted, in place. buffer [D, B].
template <typename T>
void permute(T* v, const std::vector<int64_t>& order, int64_t before, int64_t after, T* buffer) {
  const int64_t width = order.size(), slab = width * after;
  for (int64_t a = 0; a < before; ++a, v += slab) {
    std::copy_n(v, slab, buffer);
    if (after == 1)
      for (int64_t j = 0; j < width; ++j) v[j] = buffer[order[j]];
    else
      for (int64_t j = 0; j < width; ++j) copy_runs<T>(v + j * after, 0, buffer + order[j] * after, 0, 1, after);
  }
}

// The change of basis of one group of a parameter [A, D, B], from the refreshed modes of the group.
template <typename T>
struct Turn {
  size_t group;
  int64_t before, after;
  std::vector<int64_t> order;             // [D] permutes v
  std::vector<T> rotation;                // [D, D], where it turns m
  c10::SmallVector<Factor<T>, 2> factors; // turn m one after the other: the rotation; or Q^T, then Q'
};

// Whether m [A, D, B] is turned by the rotation Q^T Q' of a mode, or by Q^T and then by Q', which takes fewer flops where
// A B < D: 4 D^2 A B instead of 2 D^3 + 2 D^2 A B.
inline bool turned_by_rotation(const Layout& layout, const ModeGroup& group) {
  return group.positions.size() > 1 || layout.numel >= group.width * group.width;
}

// Step 6 for the due modes of one parameter: v permuted, m turned, Q replaced. m, v: arranged, contiguous.
// turn(Turn): m <- m x_g its factors. buffer [numel]. Allocations, which may fail, come before the first write. Returns the
// number of modes that failed and stay as they were.
template <typename T, typename Function>
int32_t refresh_modes(const Task& task, const Matrices<T>& matrices, T* v, T* buffer, const Options& options,
                      const Function& turn) {
  const Layout& layout = *task.layout;
  std::vector<Refresh<T>> refreshed(layout.modes);
  for (const ModeGroup& group : layout.mode_groups)
    for (int64_t k : group.positions)
      if (std::find(task.due.begin(), task.due.end(), k) != task.due.end())
        refreshed[k] = refresh_basis<T>(matrices.grams[k], matrices.bases[k], task.bases[k].size(0), options.tolerance(),
                                        turned_by_rotation(layout, group));
  int32_t failed = 0;
  for (const Refresh<T>& mode : refreshed) failed += mode.outcome == Outcome::failed;
  std::vector<Turn<T>> turns;
  turns.reserve(layout.mode_groups.size()); // a copy's factors would point to the original's rotation
  int64_t before = 1;
  for (size_t g = 0; g < layout.mode_groups.size(); ++g) {
    const ModeGroup& group = layout.mode_groups[g];
    const int64_t outside = before;
    before *= group.width;
    if (std::none_of(group.positions.begin(), group.positions.end(), [&](int64_t k) { return refreshed[k].done(); })) continue;
    Turn<T> whole{g, outside, layout.numel / before, {0}, {T(1)}, {}};
    if (group.positions.size() == 1) {
      Refresh<T>& mode = refreshed[group.positions[0]];
      whole.order = std::move(mode.order);
      whole.rotation = std::move(mode.rotation);
      if (!turned_by_rotation(layout, group))
        whole.factors = {{matrices.bases[group.positions[0]], group.width, /*transposed=*/true},
                         {mode.basis.data(), group.width}};
    } else {
      // The Kronecker products of the modes' orders and rotations, with identities for modes that were not refreshed
      for (size_t f = 0; f < group.positions.size(); ++f) {
        const Refresh<T>& mode = refreshed[group.positions[f]];
        const int64_t left = whole.order.size(), d = group.sizes[f], size = left * d;
        std::vector<int64_t> order(size);
        std::vector<T> rotation(size * size);
        for (int64_t i = 0; i < left; ++i)
          for (int64_t k = 0; k < d; ++k) {
            order[i * d + k] = whole.order[i] * d + (mode.done() ? mode.order[k] : k);
            for (int64_t j = 0; j < left; ++j)
              for (int64_t l = 0; l < d; ++l)
                rotation[(i * d + k) * size + j * d + l] =
                    whole.rotation[i * left + j] * (mode.done() ? mode.rotation[k * d + l] : T(k == l));
          }
        whole.order = std::move(order);
        whole.rotation = std::move(rotation);
      }
    }
    if (whole.factors.empty()) whole.factors = {{whole.rotation.data(), group.width}};
    turns.push_back(std::move(whole));
  }
  for (const Turn<T>& one : turns) {
    permute(v, one.order, one.before, one.after, buffer);
    turn(one);
  }
  for (int64_t k : task.due) {
    if (!refreshed[k].done()) continue;
    const at::Tensor& basis = task.bases[k];
    if (is_row_major(basis)) // (copy_ and its view cost as much as the QR of a tiny matrix)
      std::copy_n(refreshed[k].basis.data(), basis.numel(), basis.template mutable_data_ptr<T>());
    else
      basis.copy_(at::from_blob(refreshed[k].basis.data(), basis.sizes(), basis.options()));
  }
  return failed;
}

} // namespace soap_opt
