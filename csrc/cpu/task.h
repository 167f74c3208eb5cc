// Tasks, each one parameter's share of an operator's lists, and the order in which the cores take them.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <atomic>
#include <numeric>

#include "blocked.h"
#include "layout.h"
#include "loops.h"
#include "parallel.h"

namespace soap_opt {

// From so many flops on, several threads are worth their barriers: some tenths of a millisecond of one core
constexpr double kWorthThreads = 5e7;

struct Task {
  const Layout* layout;
  const at::Tensor *param, *grad, *exp_avg, *exp_avg_sq, *step; // (for Grams alone, only grad is set)
  at::TensorList grams, bases;
  c10::SmallVector<int64_t, 4> due; // positions of the modes to refresh in this step
  bool refresh_in_parallel;         // whether a due mode is large: the refresh then waits until all threads are free
  double cost;                      // flops
  bool parallel = false;            // whether all threads step it, while no other parameter is stepped
  double lr = 0, keep = 1;          // keep: 1 - lr weight_decay
};

// Whether a wide group has other groups before it and so few elements after it that its products go to BLAS.
inline bool calls_blas(const Layout& layout) {
  int64_t before = 1;
  for (const ModeGroup& group : layout.mode_groups) {
    const int64_t after = layout.numel / std::max<int64_t>(1, before * group.width);
    if (!group.positions.empty() && group.width > kTileWidth && !is_wide(group.width, before, after)) return true;
    before *= group.width;
  }
  return false;
}

// Chooses the parameters that all threads step: very large parameters, and parameters that would keep one core busy for longer
// than all other parameters together keep the other cores. (One core is better where all cores have enough to do: it shares no
// cache and waits for no other.)
//
// The two ways of stepping add in different orders. With torch.use_deterministic_algorithms(True) the choice is therefore by
// the layout alone, so that the result does not depend on the number of threads. Workers never call BLAS, which some wide
// groups need.
inline void choose_parallel(std::vector<Task>& tasks) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const bool deterministic = at::globalContext().deterministicAlgorithms();
  std::vector<Task*> rest;
  double total = 0;
  for (Task& task : tasks) {
    task.parallel = task.layout->numel > kParallelNumel || (deterministic && calls_blas(*task.layout));
    if (task.parallel || task.cost < kWorthThreads) continue;
    rest.push_back(&task);
    total += task.cost;
  }
  if (deterministic) return;
  std::sort(rest.begin(), rest.end(), [](const Task* a, const Task* b) { return a->cost > b->cost; });
  for (Task* task : rest) {
    if (threads == 1 || task->cost <= total / threads) break;
    task->parallel = true;
    total -= task->cost;
  }
}

// Elements of an elementwise loop that a thread takes at once; inside a worker these loops run on its own thread.
constexpr int64_t kGrain = 1 << 15;

// sum(x^2) of x [n], added piece by piece in order, so that it does not depend on the number of threads.
template <typename T>
T parallel_sum_squares(const T* x, int64_t n) {
  if (n <= kGrain) return sum_squares(x, n);
  std::vector<T> sums((n + kGrain - 1) / kGrain);
  parallel_for(0, sums.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] = sum_squares(x + i * kGrain, std::min(kGrain, n - i * kGrain));
  });
  return std::accumulate(sums.begin(), sums.end(), T(0));
}

// Whether the tensor lies in memory in the order of its layout, without holes.
inline bool in_order(const at::Tensor& x, const Layout& layout) {
  int64_t expected = 1;
  if (x.is_neg()) return false; // its memory holds the negatives
  for (size_t i = layout.order.size(); i-- > 0;) {
    const int64_t size = x.size(layout.order[i]);
    if (size != 1 && x.stride(layout.order[i]) != expected) return false;
    expected *= size;
  }
  return true;
}

// A tensor's memory in the layout's order: the tensor's own memory, or a copy, which write_back() writes back.
template <typename T>
class Arranged {
 public:
  Arranged(const at::Tensor& x, const Layout& layout) : x_(x), layout_(layout) {
    if (!in_order(x, layout)) copy_ = x.permute(layout.order).resolve_neg().contiguous();
  }
  T* data() const { return copy_.defined() ? copy_.template mutable_data_ptr<T>() : x_.template mutable_data_ptr<T>(); }
  void write_back() const {
    if (copy_.defined()) x_.permute(layout_.order).copy_(copy_);
  }

 private:
  const at::Tensor& x_;
  const Layout& layout_;
  at::Tensor copy_;
};

// The gradient of the objective to minimise, in the layout's order. converted [numel] is used only where something must change.
template <typename T>
const T* arranged_gradient(const Task& task, T* converted, double scale, bool maximize) {
  const Layout& layout = *task.layout;
  const bool same = task.grad->scalar_type() == c10::CppTypeToScalarType<T>::value;
  if (same && scale == 1 && !maximize && in_order(*task.grad, layout)) return task.grad->const_data_ptr<T>();
  const at::Tensor view = task.grad->permute(layout.order);
  at::Tensor copy = at::from_blob(converted, view.sizes(), at::TensorOptions(c10::CppTypeToScalarType<T>::value));
  copy.copy_(view);
  if (scale != 1) copy.div_(scale);
  if (maximize) copy.neg_();
  return converted;
}

// Whether a matrix's memory is its entries, row by row.
inline bool is_row_major(const at::Tensor& matrix) { return matrix.is_contiguous() && !matrix.is_neg(); }

// The matrices of a parameter, as pointers to row-major memory. Matrices that are stored otherwise (a user may have put the
// column-major result of a LAPACK call into the state) are copied, and write_back() writes the Grams back.
template <typename T>
struct Matrices {
  c10::SmallVector<const T*, 6> bases;
  c10::SmallVector<T*, 6> grams;
  c10::SmallVector<at::Tensor, 0> copies;

  explicit Matrices(const Task& task) {
    for (int64_t k = 0; k < task.layout->modes; ++k) {
      bases.push_back(row_major(task.bases[k]).template const_data_ptr<T>());
      grams.push_back(row_major(task.grams[k]).template mutable_data_ptr<T>());
    }
  }
  const at::Tensor& row_major(const at::Tensor& matrix) {
    if (is_row_major(matrix)) return matrix;
    copies.push_back(matrix.resolve_neg().contiguous());
    return copies.back();
  }
  void write_back(const Task& task) const {
    for (int64_t k = 0; k < task.layout->modes && !copies.empty(); ++k)
      if (!is_row_major(task.grams[k]))
        task.grams[k].copy_(at::from_blob(grams[k], task.grams[k].sizes(), task.grams[k].options()));
  }
};

// Elements of scratch: `parallel` for any parameter that all threads step, `worker` for any parameter that one core steps.
struct ScratchSizes {
  int64_t parallel = 0, worker = 0;

  template <typename T>
  static ScratchSizes of(const Layouts& layouts, int64_t threads) {
    ScratchSizes sizes;
    for (const Layout& layout : layouts.distinct) {
      if (layout.numel > kParallelNumel || threads > 1 ||
          calls_blas(layout)) // such a parameter may come to be stepped by all threads, for a due refresh too
        sizes.parallel = std::max(sizes.parallel, ParallelWorkspace<T>(layout, threads, nullptr).numel);
      if (layout.numel <= kParallelNumel)
        sizes.worker = std::max(sizes.worker, Workspace<T>(layout, Cut(layout), nullptr).numel);
    }
    return sizes;
  }
  static ScratchSizes of(const Layouts& layouts, int64_t threads, at::ScalarType dtype) {
    return dtype == at::kDouble ? of<double>(layouts, threads) : of<float>(layouts, threads);
  }
  int64_t numel(int64_t threads) const { return std::max(parallel, threads * worker); }
};

// function(task, scratch) for every task: first the parallel tasks, one after the other; then the rest, each on one core.
template <typename T, typename Function>
void for_each_task(std::vector<Task>& tasks, const Layouts& layouts, const at::Tensor& scratch, const Function& function) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const ScratchSizes sizes = ScratchSizes::of<T>(layouts, threads);
  TORCH_CHECK(scratch.is_contiguous() && scratch.scalar_type() == c10::CppTypeToScalarType<T>::value &&
                  scratch.numel() >= sizes.numel(threads),
              "scratch must be contiguous, ", c10::CppTypeToScalarType<T>::value, ", of at least ", sizes.numel(threads),
              " elements, not ", scratch.numel(), " of ", scratch.scalar_type());
  T* memory = scratch.mutable_data_ptr<T>();
  std::vector<Task*> small;
  small.reserve(tasks.size());
  double total = 0;
  for (Task& task : tasks) {
    if (task.parallel) {
      at::AutoDispatchBelowADInplaceOrView guard;
      const FlushSubnormals flush;
      function(task, memory);
    } else {
      small.push_back(&task);
      total += task.cost;
    }
  }
  // The longest task first: the last task to finish is then a short one. Tiny tasks are handed out in chunks. The result is the
  // same to the bit, whichever thread takes a parameter.
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
  parallel_for(0, std::min<int64_t>(threads, chunks.size() - 1), 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView guard;
    for (int64_t worker = begin; worker < end; ++worker)
      for (size_t c; (c = next++) + 1 < chunks.size();)
        for (size_t i = chunks[c]; i < chunks[c + 1]; ++i) function(*small[i], memory + worker * sizes.worker);
  });
}

} // namespace soap_opt
