// The arguments of soap_opt::step_: checks of its lists and options, and their tasks, one for each parameter.
#pragma once

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>

#include <algorithm>
#include <cstring>

#include "refresh_basis.h"
#include "task.h"

namespace soap_opt {

// The options that all parameters of a call share. Options.step_row (soap_opt/options.py) writes them as one list of numbers;
// the fields are in its order. Flags are 1 or 0.
struct StepOptions {
  double beta1;
  double beta2;
  double eps;
  double shampoo_beta;
  double precondition_frequency;
  double normalize_grads;
  double correct_bias;
  double refresh; // kTogether, kStaggered or kAdaptive
  double refresh_tolerance;
  double maximize;
};
constexpr double kTogether = 0, kStaggered = 1, kAdaptive = 2; // soap_opt/schedule.py: POLICIES

struct Options : StepOptions {
  double scale; // divides the gradients

  Options(at::ArrayRef<double> numbers, double scale) : StepOptions(read(numbers)), scale(scale) {
    TORCH_CHECK(refresh == kTogether || refresh == kStaggered || refresh == kAdaptive, "step_: no refresh policy ", refresh);
    TORCH_CHECK(precondition_frequency >= 1, "step_: precondition_frequency must be at least 1, not ", precondition_frequency);
  }

  static StepOptions read(at::ArrayRef<double> numbers) {
    constexpr size_t count = sizeof(StepOptions) / sizeof(double);
    TORCH_CHECK(numbers.size() == count, "step_: options are ", count, " numbers, not ", numbers.size());
    StepOptions options;
    std::memcpy(&options, numbers.data(), sizeof options);
    return options;
  }

  // Whether a mode is due at t. "together" ignores its offset. (A frequency is cut to 2^53, which no t reaches.)
  bool due(int64_t t, int64_t offset) const {
    const int64_t frequency = std::min(precondition_frequency, 0x1p53);
    return (t + (refresh == kTogether ? 0 : offset)) % frequency == 0;
  }
  // The off-diagonal share up to which a due basis is not refreshed; negative: every due basis is refreshed.
  double tolerance() const { return refresh == kAdaptive ? refresh_tolerance : -1; }
};

// The operator's lists over n parameters, and over their preconditioned modes, parameter after parameter.
struct StepLists {
  at::TensorList params, grads, exp_avgs, exp_avg_sqs; // [n] of [*shape]
  at::TensorList grams, bases, refresh_offsets;        // [modes] of [d, d], [d, d], 0-d
  at::TensorList state_steps;                          // [n] of 0-d
  at::ArrayRef<double> lr, weight_decay;               // [1] or [n]
};

inline void check(const StepLists& lists, const Layouts& layouts) {
  const int64_t n = lists.params.size();
  TORCH_CHECK(layouts.size == n && int64_t(lists.grads.size()) == n && int64_t(lists.exp_avgs.size()) == n &&
                  int64_t(lists.exp_avg_sqs.size()) == n && int64_t(lists.state_steps.size()) == n,
              "step_: lists of ", n, " parameters, ", layouts.size, " layouts, ", lists.grads.size(), " gradients, ",
              lists.exp_avgs.size(), ", ", lists.exp_avg_sqs.size(), " moments and ", lists.state_steps.size(), " steps");
  int64_t modes = 0;
  for (int64_t i = 0; i < n; ++i) modes += layouts[i].modes;
  TORCH_CHECK(int64_t(lists.grams.size()) == modes && int64_t(lists.bases.size()) == modes &&
                  int64_t(lists.refresh_offsets.size()) == modes,
              "step_: ", modes, " preconditioned modes, but ", lists.grams.size(), " Grams, ", lists.bases.size(),
              " bases and ", lists.refresh_offsets.size(), " refresh offsets");
  for (const auto& [name, list] : {std::pair("lr", lists.lr), std::pair("weight_decay", lists.weight_decay)})
    TORCH_CHECK(list.size() == 1 || int64_t(list.size()) == n, "step_: ", name, " must be one number, or one for each of ", n,
                " parameters, not ", list.size());
}

// Written tensors of parameter i whose elements share memory (an expanded one) fail here, not when they are written back and
// others have changed.
inline void check_writable(const at::Tensor& x, const char* name, int64_t i) {
  TORCH_CHECK(at::has_internal_overlap(x) != at::MemOverlap::Yes, "step_: elements of ", name, " of parameter ", i,
              ", of shape ", x.sizes(), " and strides ", x.strides(), ", share memory and cannot be written; clone() it");
}

// Checks parameter i of the lists, without its matrices.
inline void check_parameter(const StepLists& lists, const Layout& layout, int64_t i, at::ScalarType dtype) {
  const at::Tensor& param = lists.params[i];
  TORCH_CHECK(param.numel() == layout.numel && param.dim() == int64_t(layout.order.size()) &&
                  lists.grads[i].sizes() == param.sizes() && lists.exp_avgs[i].sizes() == param.sizes() &&
                  lists.exp_avg_sqs[i].sizes() == param.sizes() && lists.exp_avgs[i].scalar_type() == dtype &&
                  lists.exp_avg_sqs[i].scalar_type() == dtype,
              "step_: parameter ", i, " of shape ", param.sizes(), " does not fit its gradient, state or layout");
  const at::ScalarType own = param.scalar_type();
  TORCH_CHECK(own == dtype || (dtype == at::kFloat && (own == at::kBFloat16 || own == at::kHalf)), "step_: parameter ", i,
              " is ", own, ", its state ", dtype);
  TORCH_CHECK(at::isFloatingType(lists.grads[i].scalar_type()), "step_: the gradient of parameter ", i, " is ",
              lists.grads[i].scalar_type());
  TORCH_CHECK(
      lists.state_steps[i].scalar_type() == at::kFloat && lists.state_steps[i].numel() == 1 && !lists.state_steps[i].is_neg(),
      "step_: step of parameter ", i, " must be one float32, no negative view, not ", lists.state_steps[i].scalar_type());
  check_writable(param, "the values", i);
  check_writable(lists.exp_avgs[i], "exp_avg", i);
  check_writable(lists.exp_avg_sqs[i], "exp_avg_sq", i);
}

// Checks one mode of parameter i: G and Q [d, d], and the refresh offset.
inline void check_mode(const at::Tensor& param, const at::Tensor& gram, const at::Tensor& basis, const at::Tensor& offset,
                       int64_t i, int64_t d, at::ScalarType dtype) {
  TORCH_CHECK(gram.scalar_type() == dtype && basis.scalar_type() == dtype && gram.dim() == 2 && gram.size(0) == d &&
                  gram.size(1) == d && basis.dim() == 2 && basis.size(0) == d && basis.size(1) == d,
              "step_: parameter ", i, " of shape ", param.sizes(), " needs Grams and bases of ", d, " x ", d, ", ", dtype,
              ", but has ", gram.sizes(), " and ", basis.sizes());
  TORCH_CHECK(offset.scalar_type() == at::kLong && offset.numel() == 1 && !offset.is_neg(),
              "step_: the refresh offset of parameter ", i, " must be one int64, no negative view, not ", offset.sizes(), ", ",
              offset.scalar_type());
  check_writable(gram, "a Gram", i);
  check_writable(basis, "a basis", i);
}

// A task for each parameter, with the modes that are due in this step. lists: checked by check(), and not empty.
inline std::vector<Task> tasks_of(const StepLists& lists, const Layouts& layouts, const Options& options) {
  const int64_t n = lists.params.size();
  const at::ScalarType dtype = lists.exp_avgs[0].scalar_type();
  std::vector<Task> tasks(n);
  int64_t first = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Layout& layout = layouts[i];
    check_parameter(lists, layout, i, dtype);
    Task& task = tasks[i];
    task = {&layout,
            &lists.params[i],
            &lists.grads[i],
            &lists.exp_avgs[i],
            &lists.exp_avg_sqs[i],
            &lists.state_steps[i],
            lists.grams.slice(first, layout.modes),
            lists.bases.slice(first, layout.modes),
            {},
            false,
            3 * layout.flops() + 50.0 * layout.numel}; // 50: elementwise passes, in flops of a gemm
    task.lr = lists.lr[lists.lr.size() == 1 ? 0 : i];
    task.keep = 1 - task.lr * lists.weight_decay[lists.weight_decay.size() == 1 ? 0 : i];
    const int64_t t = int64_t(*task.step->const_data_ptr<float>()) + 1;
    double refreshes = 0; // flops
    for (const ModeGroup& group : layout.mode_groups)
      for (size_t f = 0; f < group.positions.size(); ++f) {
        const int64_t k = group.positions[f], d = group.sizes[f];
        const at::Tensor& refresh_offset = lists.refresh_offsets[first + k];
        check_mode(lists.params[i], task.grams[k], task.bases[k], refresh_offset, i, d, dtype);
        if (options.due(t, *refresh_offset.const_data_ptr<int64_t>())) {
          task.due.push_back(k);
          task.refresh_in_parallel |= d > kThreadedSize;
          refreshes += 20.0 * d * d * d + 4.0 * layout.numel * d; // (they run at a third to two thirds of gemm's rate)
        }
      }
    if (!task.refresh_in_parallel) task.cost += refreshes;
    first += layout.modes;
  }
  return tasks;
}

} // namespace soap_opt
