// soap_opt::step_ on the CPU: steps 1 to 6 of SOAP for a list of parameters, in one call.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>
#include <numeric>

#include "layout.h"
#include "loops.h"
#include "products.h"
#include "refresh_basis.h"

namespace soap_opt {
namespace {

struct Options {
  double lr, beta1, beta2, shampoo_beta, eps, weight_decay;
  int64_t frequency;
  bool normalize, correct_bias, together, adaptive, maximize;
  double tolerance;
  double scale; // the gradients are divided by it
};

// One parameter's share of the lists.
struct Task {
  const Layout* layout;
  at::Tensor param, grad, exp_avg, exp_avg_sq;
  at::Tensor step;
  at::TensorList grams, bases;
  std::vector<int64_t> due; // positions of the modes to refresh in this step
  double cost;
  bool* usable;
};

// Elements a thread gets of an elementwise loop; inside a worker these loops run in place.
constexpr int64_t kGrain = 1 << 15;

template <typename T>
T parallel_sum_squares(const T* x, int64_t n) {
  if (n <= kGrain) return sum_squares(x, n);
  return at::parallel_reduce(0, n, kGrain, T(0), [&](int64_t b, int64_t e, T sum) { return sum + sum_squares(x + b, e - b); },
                             std::plus<T>());
}

// The tensor with its dimensions in memory order, contiguous; the tensor's own memory wherever that is so already.
at::Tensor arranged(const at::Tensor& x, const Layout& layout) { return x.permute(layout.order).contiguous(); }

template <typename T, typename P>
void apply_update(P* p, const T* u, int64_t n, double size, double keep) {
  at::parallel_for(0, n, kGrain, [&](int64_t b, int64_t e) { apply(p + b, u + b, e - b, size, keep); });
}

template <typename T>
void apply_update(const at::Tensor& param, const T* u, const Layout& layout, double size, double keep) {
  const at::Tensor view = param.permute(layout.order);
  const at::Tensor memory = view.contiguous();
  switch (param.scalar_type()) {
    case at::kBFloat16:
      if constexpr (std::is_same_v<T, float>) apply_update(memory.data_ptr<at::BFloat16>(), u, layout.numel, size, keep);
      break;
    case at::kHalf:
      if constexpr (std::is_same_v<T, float>) apply_update(memory.data_ptr<at::Half>(), u, layout.numel, size, keep);
      break;
    default:
      apply_update(memory.data_ptr<T>(), u, layout.numel, size, keep);
  }
  if (memory.data_ptr() != view.data_ptr()) view.copy_(memory); // strides with holes or of another order
}

// Step 6 for the due modes of one parameter: v permuted, m turned, Q replaced. m, v: arranged, contiguous.
template <typename T>
void refresh_modes(const Task& task, T* m, T* v, T* buffer, T* room, const Options& options) {
  const Layout& layout = *task.layout;
  std::vector<std::optional<Refresh>> refreshed(layout.modes);
  bool any = false;
  for (int64_t position : task.due) {
    refreshed[position] = refresh_basis(task.grams[position], task.bases[position], options.adaptive ? options.tolerance : -1);
    any |= refreshed[position].has_value();
  }
  if (!any) return;
  int64_t before = 1;
  for (const Group& group : layout.groups) {
    const int64_t width = group.width, after = layout.numel / (before * width);
    if (std::any_of(group.positions.begin(), group.positions.end(), [&](int64_t p) { return refreshed[p].has_value(); })) {
      // The group's permutation and rotation: those of its modes, the identity for modes that are not due
      std::vector<int64_t> order(1, 0);
      at::Tensor rotation = at::ones({1, 1}, task.exp_avg.options());
      for (size_t f = 0; f < group.positions.size(); ++f) {
        const auto& mode = refreshed[group.positions[f]];
        std::vector<int64_t> next;
        const int64_t* ranks = mode ? mode->order.template const_data_ptr<int64_t>() : nullptr;
        for (int64_t i : order)
          for (int64_t j = 0; j < group.sizes[f]; ++j) next.push_back(i * group.sizes[f] + (ranks ? ranks[j] : j));
        order = std::move(next);
        rotation = at::kron(rotation, mode ? mode->rotation : at::eye(group.sizes[f], rotation.options()));
      }
      at::parallel_for(0, before, std::max<int64_t>(1, kGrain / (width * after)), [&](int64_t b, int64_t e) {
        for (int64_t a = b; a < e; ++a)
          for (int64_t j = 0; j < width; ++j) {
            const T* from = v + (a * width + order[j]) * after;
            T* to = buffer + (a * width + j) * after;
            if (after == 1)
              *to = *from;
            else
              std::copy_n(from, after, to);
          }
      });
      std::copy_n(buffer, layout.numel, v);
      multiply<T>(m, buffer, before, width, after, {rotation.template const_data_ptr<T>(), width, width});
      std::copy_n(buffer, layout.numel, m);
    }
    before *= width;
  }
  for (int64_t position : task.due)
    if (refreshed[position]) task.bases[position].copy_(refreshed[position]->basis);
}

template <typename T>
void run(const Task& task, T* scratch, int64_t largest, const Options& options) {
  const Layout& layout = *task.layout;
  const int64_t n = layout.numel;
  if (n == 0) return;
  T* converted = scratch;
  T* ping = scratch + largest;
  T* pong = scratch + 2 * largest;
  T* room = scratch + 3 * largest;

  // The gradient of what is minimised, arranged; a copy only where something is to be changed
  at::Tensor grad = arranged(task.grad, layout);
  if (grad.scalar_type() != task.exp_avg.scalar_type() || options.scale != 1 || options.maximize) {
    at::Tensor copy = at::from_blob(converted, {n}, task.exp_avg.options());
    copy.copy_(grad.reshape({n}));
    if (options.scale != 1) copy.div_(options.scale);
    if (options.maximize) copy.neg_();
    grad = copy;
  }
  const T* g = grad.const_data_ptr<T>();
  *task.usable = std::isfinite(parallel_sum_squares(g, n));
  if (!*task.usable) return;

  const at::Tensor exp_avg = arranged(task.exp_avg, layout), exp_avg_sq = arranged(task.exp_avg_sq, layout);
  T* m = exp_avg.data_ptr<T>();
  T* v = exp_avg_sq.data_ptr<T>();
  c10::SmallVector<const T*, 6> bases;
  c10::SmallVector<T*, 6> grams;
  for (int64_t k = 0; k < layout.modes; ++k) {
    bases.push_back(task.bases[k].const_data_ptr<T>());
    grams.push_back(task.grams[k].mutable_data_ptr<T>());
  }
  float* step = task.step.mutable_data_ptr<float>();

  // 1 project
  T* update = project(layout, g, bases.data(), ping, pong, room, /*back=*/false);
  const double t = *step += 1;

  // 2 adam
  at::parallel_for(0, n, kGrain, [&](int64_t b, int64_t e) {
    adam(m + b, v + b, update + b, e - b, options.beta1, options.beta2, options.eps);
  });

  // 3 project back. Orthogonal bases keep the norm: rms(U) = rms(U')
  double size = options.lr;
  if (options.correct_bias) size *= std::sqrt(1 - std::pow(options.beta2, t)) / (1 - std::pow(options.beta1, t));
  if (options.normalize) size /= 1e-30 + std::sqrt(double(parallel_sum_squares(update, n)) / n);
  update = project(layout, static_cast<const T*>(update), bases.data(), ping, pong, room, /*back=*/true);

  // 4 apply
  apply_update(task.param, update, layout, size, 1 - options.lr * options.weight_decay);

  // 5 gram EMA
  gram_ema(layout, g, grams.data(), ping, room, options.shampoo_beta);

  // 6 refresh
  if (!task.due.empty()) refresh_modes(task, m, v, ping, room, options);

  if (m != task.exp_avg.const_data_ptr<T>()) { // state that is not dense in the layout's order
    task.exp_avg.permute(layout.order).copy_(exp_avg);
    task.exp_avg_sq.permute(layout.order).copy_(exp_avg_sq);
  }
}

at::Tensor step_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                 at::TensorList grams, at::TensorList bases, at::TensorList refresh_offsets, at::TensorList state_steps,
                 const at::Tensor& table, const at::Tensor& scratch, const std::optional<at::Tensor>& grad_scale, double lr,
                 double beta1, double beta2, double shampoo_beta, double eps, double weight_decay,
                 int64_t precondition_frequency, bool normalize_grads, bool correct_bias, c10::string_view refresh,
                 double refresh_tolerance, bool maximize) {
  const std::vector<Layout> layouts = decode(table);
  const int64_t n = params.size();
  TORCH_CHECK(int64_t(layouts.size()) == n && int64_t(grads.size()) == n && int64_t(exp_avgs.size()) == n &&
                  int64_t(exp_avg_sqs.size()) == n && int64_t(state_steps.size()) == n,
              "step_: lists of ", n, " parameters, ", layouts.size(), " layouts, ", grads.size(), " gradients, ", exp_avgs.size(),
              ", ", exp_avg_sqs.size(), " moments and ", state_steps.size(), " steps");
  at::Tensor usable = at::ones({n}, at::kBool);
  if (n == 0) return usable;
  const Options options{lr,
                        beta1,
                        beta2,
                        shampoo_beta,
                        eps,
                        weight_decay,
                        precondition_frequency,
                        normalize_grads,
                        correct_bias,
                        refresh == "together",
                        refresh == "adaptive",
                        maximize,
                        refresh_tolerance,
                        grad_scale ? grad_scale->item<double>() : 1.0};
  const at::ScalarType dtype = exp_avgs[0].scalar_type();
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  TORCH_CHECK(scratch.is_contiguous() && scratch.scalar_type() == dtype && scratch.numel() >= scratch_numel(layouts, threads),
              "step_: scratch must be contiguous, ", dtype, ", of at least ", scratch_numel(layouts, threads), " elements, not ",
              scratch.numel());

  std::vector<Task> tasks(n);
  int64_t first = 0, small_largest = 0, large_largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Layout& layout = layouts[i];
    Task& task = tasks[i];
    TORCH_CHECK(params[i].numel() == layout.numel && grads[i].sizes() == params[i].sizes() &&
                    exp_avgs[i].sizes() == params[i].sizes() && exp_avg_sqs[i].sizes() == params[i].sizes() &&
                    exp_avgs[i].scalar_type() == dtype && first + layout.modes <= int64_t(grams.size()),
                "step_: parameter ", i, " of shape ", params[i].sizes(), " does not fit its gradient, state or layout");
    task.layout = &layout;
    task.param = params[i];
    task.grad = grads[i];
    task.exp_avg = exp_avgs[i];
    task.exp_avg_sq = exp_avg_sqs[i];
    task.step = state_steps[i];
    task.grams = grams.slice(first, layout.modes);
    task.bases = bases.slice(first, layout.modes);
    task.usable = usable.data_ptr<bool>() + i;
    task.cost = 3 * layout.flops() + 50.0 * layout.numel; // 50: elementwise passes, in flops of a gemm
    const int64_t t = int64_t(*task.step.const_data_ptr<float>()) + 1;
    for (int64_t k = 0; k < layout.modes; ++k) {
      const int64_t offset = options.together ? 0 : *refresh_offsets[first + k].const_data_ptr<int64_t>();
      if ((t + offset) % precondition_frequency == 0) {
        task.due.push_back(k);
        const double d = task.bases[k].size(0);
        task.cost += 20 * d * d * d + 4.0 * layout.numel * d; // QR runs at about a third of gemm's rate
      }
    }
    first += layout.modes;
    auto& largest = layout.numel > kParallelNumel ? large_largest : small_largest;
    largest = std::max(largest, layout.numel);
  }

  AT_DISPATCH_FLOATING_TYPES(dtype, "soap_opt::step_", [&] {
    scalar_t* memory = scratch.data_ptr<scalar_t>();
    std::vector<Task*> small;
    double total = 0;
    for (Task& task : tasks) {
      if (task.layout->numel > kParallelNumel) {
        at::AutoDispatchBelowADInplaceOrView guard;
        run<scalar_t>(task, memory, large_largest, options);
      } else {
        small.push_back(&task);
        total += task.cost;
      }
    }
    // Longest first: the last to finish is then a short one. Tiny ones are handed out in chunks. Which thread takes which
    // parameter does not change a bit of the result.
    std::stable_sort(small.begin(), small.end(), [](const Task* a, const Task* b) { return a->cost > b->cost; });
    const double share = std::min(total / (8.0 * threads), 1e6);
    std::vector<size_t> chunks{0};
    double chunk = 0;
    for (size_t i = 0; i < small.size(); ++i) {
      chunk += small[i]->cost;
      if (chunk >= share || i + 1 == small.size()) {
        chunks.push_back(i + 1);
        chunk = 0;
      }
    }
    std::atomic<size_t> next{0};
    at::parallel_for(0, std::min<int64_t>(threads, chunks.size() - 1), 1, [&](int64_t begin, int64_t end) {
      at::AutoDispatchBelowADInplaceOrView guard;
      for (int64_t worker = begin; worker < end; ++worker)
        for (size_t c; (c = next++) + 1 < chunks.size();)
          for (size_t i = chunks[c]; i < chunks[c + 1]; ++i)
            run<scalar_t>(*small[i], memory + worker * worker_scratch(small_largest), small_largest, options);
    });
  });
  return usable;
}

int64_t scratch_numel_op(const at::Tensor& layouts, int64_t threads) { return scratch_numel(decode(layouts), threads); }

} // namespace

TORCH_LIBRARY_IMPL(soap_opt, CPU, m) {
  m.impl("step_", &step_);
  m.impl("scratch_numel", &scratch_numel_op);
}

} // namespace soap_opt
