// soap_opt::gram_ema_ on the CPU: the Grams of a list of gradients, in one call. (A steady step updates its Grams itself.)

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "blocked.h"
#include "products.h"
#include "task.h"

namespace soap_opt {
namespace {

// ||x||^2 of x [n], 0 only for zeros. It is added in float64 where squares may vanish or overflow in float32.
template <typename T>
double squared_norm(const T* x, int64_t n) {
  const double quick = sum_squares(x, n);
  if (std::isfinite(quick) && quick > 1e-20) return quick;
  double sums[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int64_t j = 0; j < 8; ++j) sums[j] += double(x[i + j]) * double(x[i + j]);
  for (; i < n; ++i) sums[0] += double(x[i]) * double(x[i]);
  const double norm = std::accumulate(sums, sums + 8, 0.0);
  if (norm != 0 || std::all_of(x, x + n, [](T each) { return !(std::abs(each) >= std::numeric_limits<T>::min()); }))
    return norm;
  return std::numeric_limits<double>::min(); // (squares may vanish in float64 too)
}

// ||G||^2 of one gradient. The Grams are averaged where this is at most kLargestSquaredNorm.
template <typename T>
double gram_ema_one(const Task& task, T* scratch, double scale, double beta) {
  const Layout& layout = *task.layout;
  const int64_t n = layout.numel;
  constexpr double limit = kLargestSquaredNorm<T>;
  if (n == 0) return 0;
  if (task.parallel) {
    const ParallelWorkspace<T> work(layout, free_threads(), scratch);
    const T* g = arranged_gradient(task, work.converted, scale, /*maximize=*/false);
    const double norm = squared_norm(g, n);
    if (!(norm <= limit)) return norm;
    Matrices<T> matrices(task);
    gram_ema_parallel<T>(layout, g, matrices.grams.data(), work, beta);
    matrices.write_back(task);
    return norm;
  }
  const Workspace<T> work(layout, Cut(layout), scratch);
  const T* g = arranged_gradient(task, work.converted, scale, /*maximize=*/false);
  const double norm = squared_norm(g, n);
  if (!(norm <= limit)) return norm;
  Matrices<T> matrices(task);
  gram_ema_blocked<T>(layout, g, matrices.grams.data(), work.gram, beta);
  matrices.write_back(task);
  return norm;
}

at::Tensor gram_ema_(at::TensorList grads, at::TensorList grams, const at::Tensor& table, const at::Tensor& scratch,
                     const std::optional<at::Tensor>& grad_scale, double beta) {
  const Layouts layouts(table);
  const int64_t n = grads.size();
  TORCH_CHECK(layouts.size == n, "gram_ema_: ", n, " gradients but ", layouts.size, " layouts");
  at::Tensor norms = at::zeros({n}, at::TensorOptions(at::kCPU).dtype(at::kDouble));
  const double scale = grad_scale ? grad_scale->item<double>() : 1.0;
  std::vector<Task> tasks(n);
  int64_t first = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Layout& layout = layouts[i];
    TORCH_CHECK(grads[i].numel() == layout.numel && grads[i].dim() == int64_t(layout.order.size()) &&
                    at::isFloatingType(grads[i].scalar_type()) && first + layout.modes <= int64_t(grams.size()),
                "gram_ema_: gradient ", i, " of shape ", grads[i].sizes(), " does not fit its layout or Grams");
    for (const ModeGroup& group : layout.mode_groups)
      for (size_t f = 0; f < group.positions.size(); ++f) {
        const at::Tensor& gram = grams[first + group.positions[f]];
        TORCH_CHECK(gram.scalar_type() == scratch.scalar_type() && gram.numel() == group.sizes[f] * group.sizes[f],
                    "gram_ema_: gradient ", i, " of shape ", grads[i].sizes(), " needs a Gram of ", group.sizes[f], " x ",
                    group.sizes[f], ", ", scratch.scalar_type(), ", not ", gram.sizes(), ", ", gram.scalar_type());
      }
    Task& task = tasks[i];
    task.layout = &layout;
    task.grad = &grads[i];
    task.grams = task.bases = grams.slice(first, layout.modes);
    task.cost = layout.flops();
    first += layout.modes;
  }
  choose_parallel(tasks);
  double* results = norms.mutable_data_ptr<double>();
  AT_DISPATCH_FLOATING_TYPES(scratch.scalar_type(), "soap_opt::gram_ema_", [&] {
    for_each_task<scalar_t>(tasks, layouts, scratch, [&](const Task& task, scalar_t* memory) {
      results[&task - tasks.data()] = gram_ema_one<scalar_t>(task, memory, scale, beta);
    });
  });
  return norms;
}

} // namespace

TORCH_LIBRARY_IMPL(soap_opt, CPU, m) { m.impl("gram_ema_", &gram_ema_); }

} // namespace soap_opt
