// soap_opt::step_ on the CPU: steps 1 to 6 of SOAP for a list of parameters, in one call.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "blocked.h"
#include "products.h"
#include "reexpress.h"
#include "step.h"
#include "step_arguments.h"
#include "task.h"

namespace soap_opt {
namespace {

// lr c, over rms(U) with normalize_grads
double update_size(double t, double mean_square, const Task& task, const Options& options) {
  double size = task.lr;
  if (options.correct_bias) size *= std::sqrt(1 - std::pow(options.beta2, t)) / (1 - std::pow(options.beta1, t));
  return options.normalize_grads ? size / (1e-30 + std::sqrt(mean_square)) : size;
}

// step_parallel and step_blocked return kUnusable where the gradient is not usable, and nothing has changed; else the number of
// refreshes that failed.
constexpr int32_t kUnusable = -1;

// to <- from x_g M on all threads, both [A, D, B].
template <typename T>
void product_parallel(const T* from, T* to, int64_t before, int64_t after, Factor<T> m, const ParallelWorkspace<T>& work) {
  if (after == 1 || before == 1 || after >= kWideColumns / 4) {
    product_wide<T>(from, to, before, after, m, work.threads, work.rooms, work.room);
  } else if (m.width <= kTileWidth) { // a short B: every thread takes whole slabs of a
    static_assert(kWideColumns / 4 <= kColumns / 2, "product() must not write after the end of a thread's slabs");
    m.pack(work.packed);
    const int64_t slab = m.width * after;
    parallel_with_room(before, work.threads, work.rooms, work.room, [&](int64_t begin, int64_t end, T* room) {
      product<T>(from + begin * slab, to + begin * slab, end - begin, after, m, room);
    });
  } else {
    multiply<T>(from, to, before, m.width, after, m.matrix());
  }
}

// Steps a parameter on all threads, stage after stage over the whole tensor.
template <typename T, typename P>
int32_t step_parallel(const Task& task, P* param, T* scratch, const Options& options) {
  const Layout& layout = *task.layout;
  const int64_t n = layout.numel;
  const ParallelWorkspace<T> work(layout, free_threads(), scratch);
  const T* g = arranged_gradient(task, work.converted, options.scale, options.maximize);
  if (!(parallel_sum_squares(g, n) <= kLargestSquaredNorm<T>)) return kUnusable;

  Matrices<T> matrices(task);
  const Arranged<T> exp_avg(*task.exp_avg, layout), exp_avg_sq(*task.exp_avg_sq, layout);
  T* m = exp_avg.data();
  T* v = exp_avg_sq.data();
  T* from = work.whole;
  T* to = work.spare;
  const int64_t groups = layout.mode_groups.size();
  c10::SmallVector<int64_t, 4> before(groups, 1);
  for (int64_t i = 1; i < groups; ++i) before[i] = before[i - 1] * layout.mode_groups[i - 1].width;
  const auto turn = [&](const T* x, int64_t i, bool back) {
    const ModeGroup& group = layout.mode_groups[i];
    const Factor<T> factor{group_matrix(group, matrices.bases.data(), work.kronecker), group.width, back};
    product_parallel<T>(x, to, before[i], n / (before[i] * group.width), factor, work);
    std::swap(from, to);
  };

  // 1 project
  const T* x = g;
  for (int64_t i = 0; i < groups; ++i)
    if (!layout.mode_groups[i].positions.empty()) {
      turn(x, i, /*back=*/false);
      x = from;
    }
  if (x == g) std::copy_n(g, n, from);
  const double t = *task.step->mutable_data_ptr<float>() += 1;

  // 2 adam
  parallel_for(0, n, kGrain,
               [&](int64_t b, int64_t e) { adam(m + b, v + b, from + b, e - b, options.beta1, options.beta2, options.eps); });

  // 3 project back. Orthogonal bases keep the norm: rms(U) = rms(U')
  const double size = update_size(t, options.normalize_grads ? double(parallel_sum_squares(from, n)) / n : 1, task, options);
  for (int64_t i = groups; i-- > 0;)
    if (!layout.mode_groups[i].positions.empty()) turn(from, i, /*back=*/true);

  // 4 apply
  const double keep = task.keep;
  parallel_for(0, n, kGrain, [&](int64_t b, int64_t e) { apply(param + b, from + b, e - b, size, keep); });

  // 5 gram EMA
  gram_ema_parallel<T>(layout, g, matrices.grams.data(), work, options.shampoo_beta);
  matrices.write_back(task);
  exp_avg.write_back();
  exp_avg_sq.write_back();
  return 0; // refresh_parallel does step 6
}

// Step 6 on all threads. buffer [numel]. Returns the number of refreshes that failed.
template <typename T>
int32_t refresh_parallel(const Task& task, T* buffer, const Options& options) {
  const Layout& layout = *task.layout;
  const Matrices<T> matrices(task);
  const Arranged<T> exp_avg(*task.exp_avg, layout), exp_avg_sq(*task.exp_avg_sq, layout);
  T* m = exp_avg.data();
  const int32_t failed = refresh_modes(task, matrices, exp_avg_sq.data(), buffer, options, [&](const Turn<T>& turn) {
    T *from = m, *to = buffer;
    for (const Factor<T>& factor : turn.factors) {
      multiply<T>(from, to, turn.before, factor.width, turn.after, factor.matrix());
      std::swap(from, to);
    }
    if (from != m) std::copy_n(from, layout.numel, m);
  });
  exp_avg.write_back();
  exp_avg_sq.write_back();
  return failed;
}

// What one core multiplies a parameter with: for each group its matrix, forward and back, packed where the products go by
// tiles, and the A and B of [A, D, B]. Groups that are not preconditioned have no data.
template <typename T>
struct GroupFactors {
  c10::SmallVector<Factor<T>, 4> forward, back;
  c10::SmallVector<int64_t, 4> before, after;

  GroupFactors(const Layout& layout, const Matrices<T>& matrices, const Workspace<T>& work)
      : forward(layout.mode_groups.size()),
        back(layout.mode_groups.size()),
        before(layout.mode_groups.size()),
        after(layout.mode_groups.size()) {
    int64_t outside = 1;
    for (size_t i = 0; i < layout.mode_groups.size(); ++i) {
      const ModeGroup& group = layout.mode_groups[i];
      before[i] = outside;
      after[i] = layout.numel / (outside * group.width);
      outside *= group.width;
      if (group.positions.empty()) continue;
      const T* data = group_matrix(group, matrices.bases.data(), work.kronecker);
      if (group.positions.size() > 1) {
        std::copy_n(data, group.width * group.width, work.matrix[i]);
        data = work.matrix[i];
      }
      forward[i] = {data, group.width, false};
      back[i] = {data, group.width, true};
      if (group.width <= kTileWidth && layout.numel * group.width > kLoopProduct) {
        forward[i].pack(work.forward[i]);
        back[i].pack(work.back[i]);
      }
    }
  }
};

// Step 1 of the outer groups, the first `outer` ones, of g [n]. Returns the result: `whole` [n] afterwards, or g where none of
// these groups is preconditioned. spare [n].
template <typename T>
const T* project_outer(int64_t outer, const GroupFactors<T>& factors, const T* g, T*& whole, T*& spare, T* room) {
  const T* from = g;
  for (int64_t i = 0; i < outer; ++i)
    if (factors.forward[i].data != nullptr) {
      product<T>(from, whole, factors.before[i], factors.after[i], factors.forward[i], room);
      from = whole;
      std::swap(whole, spare);
    }
  if (from != g) std::swap(whole, spare);
  return from;
}

// Step 4 of the parts of U, as they are made.
template <typename P, typename T>
struct Apply {
  P* param;
  double size, keep;
  void operator()(int64_t place, const T* values, int64_t count) const { apply(param + place, values, count, size, keep); }
  void fetch(int64_t place, int64_t ld, int64_t rows, int64_t count) const { fetch_rows(param + place, ld, rows, count); }
};

// Step 3 of the outer groups, the first `outer` ones, and step 4 behind it. whole [n]: the update, overwritten; spare [n].
template <typename T, typename Sink>
void project_back_outer(int64_t outer, const GroupFactors<T>& factors, T* whole, T* spare, int64_t n, T* room,
                        const Sink& sink) {
  for (int64_t i = outer; i-- > 0;) {
    const Factor<T>& factor = factors.back[i];
    if (factor.data == nullptr) continue;
    if (i == 0 && factor.packed != nullptr)
      return product<T>(whole, static_cast<T*>(nullptr), 1, factors.after[0], factor, room, sink);
    product<T>(whole, spare, factors.before[i], factors.after[i], factor, room);
    std::swap(whole, spare);
  }
  sink(0, whole, n);
}

// Steps a parameter on one core. The outer groups are projected over the whole tensor. Then, chunk after chunk, come the inner
// groups' products, Adam and the inner groups' products back, all in L2. The outer groups are projected back last, and the
// columns of the last product are applied as they are made.
template <typename T, typename P>
int32_t step_blocked(const Task& task, P* param, T* scratch, const Options& options) {
  const Layout& layout = *task.layout;
  const Cut cut(layout);
  const Workspace<T> work(layout, cut, scratch);
  const int64_t n = layout.numel;
  const T* g = arranged_gradient(task, work.converted, options.scale, options.maximize);
  if (!(sum_squares(g, n) <= kLargestSquaredNorm<T>)) return kUnusable;

  Matrices<T> matrices(task);
  const Arranged<T> exp_avg(*task.exp_avg, layout), exp_avg_sq(*task.exp_avg_sq, layout);
  T *m = exp_avg.data(), *v = exp_avg_sq.data();
  const double t = *task.step->mutable_data_ptr<float>() += 1;

  const GroupFactors<T> factors(layout, matrices, work);
  const auto &forward = factors.forward, &back = factors.back;
  const int64_t groups = layout.mode_groups.size();

  T *whole = work.whole, *spare = work.spare;
  const T* from = project_outer(cut.outer, factors, g, whole, spare, work.product);

  // 1 to 3 in chunks: inner groups, adam, inner groups back
  const bool finish = !cut.outer_modes && (!options.normalize_grads || cut.chunk() >= n);
  // Whether the last product goes to `whole` itself. (Others write after a chunk's end, where the next one may wait.)
  const bool in_place =
      !finish && cut.outer < size_t(groups) && back[cut.outer].packed != nullptr && side_by_side(factors.after[cut.outer]);
  double sum = 0;
  for (int64_t start = 0; start < n; start += cut.chunk()) {
    const int64_t size = std::min(cut.chunk(), n - start), slabs = size / cut.slab;
    const T* x = from + start;
    T* room[2] = {work.chunk, work.other};
    int used = 0; // the next product goes to room[used]
    const auto inner = [&](int64_t i, const Factor<T>& factor, T* to) {
      product<T>(x, to, slabs * (factors.before[i] / factors.before[cut.outer]), factors.after[i], factor, work.product);
      x = to;
      used ^= 1;
    };
    for (int64_t i = cut.outer; i < groups; ++i)
      if (forward[i].data != nullptr) inner(i, forward[i], room[used]);
    if (x == from + start) { // no inner group is preconditioned
      std::copy_n(x, size, room[used]);
      used ^= 1;
    }
    T* update = room[used ^ 1];
    adam(m + start, v + start, update, size, options.beta1, options.beta2, options.eps);
    if (options.normalize_grads) sum += double(sum_squares(update, size));
    x = update;
    for (int64_t i = groups; i-- > int64_t(cut.outer);)
      if (back[i].data != nullptr) inner(i, back[i], in_place && i == int64_t(cut.outer) ? whole + start : room[used]);
    // 4 apply, where no product and no rms is left to wait for
    if (finish)
      apply(param + start, x, size, update_size(t, sum / n, task, options), task.keep);
    else if (x != whole + start)
      std::copy_n(x, size, whole + start);
  }

  // 3 project back: outer groups, and 4 apply
  const double size = update_size(t, sum / n, task, options);
  if (!finish) project_back_outer(cut.outer, factors, whole, spare, n, work.product, Apply<P, T>{param, size, task.keep});

  // 5 gram EMA
  gram_ema_blocked<T>(layout, g, matrices.grams.data(), work.gram, options.shampoo_beta);
  matrices.write_back(task);
  exp_avg.write_back();
  exp_avg_sq.write_back();

  // 6 refresh
  int32_t failed = 0;
  if (!task.due.empty() && !task.refresh_in_parallel) {
    failed = refresh_modes(task, matrices, v, whole, options, [&](const Turn<T>& turn) {
      for (Factor<T> factor : turn.factors) {
        if (forward[turn.group].packed != nullptr) factor.pack(work.forward[turn.group]);
        product<T>(m, whole, turn.before, turn.after, factor, work.product);
        std::copy_n(whole, n, m);
      }
    });
    exp_avg.write_back();
    exp_avg_sq.write_back();
  }
  return failed;
}

template <typename T>
int32_t step_one(const Task& task, T* scratch, const Options& options) {
  const Layout& layout = *task.layout;
  if (layout.numel == 0) return 0;
  const auto run = [&](auto zero) {
    using P = decltype(zero);
    const Arranged<P> param(*task.param, layout);
    const int32_t outcome = task.parallel ? step_parallel<T, P>(task, param.data(), scratch, options)
                                          : step_blocked<T, P>(task, param.data(), scratch, options);
    if (outcome != kUnusable) param.write_back();
    return outcome;
  };
  if constexpr (std::is_same_v<T, float>) {
    if (task.param->scalar_type() == at::kBFloat16) return run(at::BFloat16());
    if (task.param->scalar_type() == at::kHalf) return run(at::Half());
  }
  return run(T());
}

// Marks the written tensors as changed, as torch's own in-place operators do: an autograd graph that holds such a tensor raises
// in its backward pass. (The operator writes through pointers, below autograd.)
void bump_versions(const Task& task) {
  const auto bump = [](const at::Tensor& x) {
    if (!x.is_inference()) x.unsafeGetTensorImpl()->bump_version();
  };
  for (const at::Tensor* x : {task.param, task.exp_avg, task.exp_avg_sq, task.step}) bump(*x);
  for (const at::Tensor& gram : task.grams) bump(gram);
  for (int64_t k : task.due) bump(task.bases[k]);
}

int64_t scratch_numel(const at::Tensor& table, int64_t threads, at::ScalarType dtype) {
  return ScratchSizes::of(Layouts(table), threads, dtype).numel(threads);
}

} // namespace

at::Tensor step_(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                 at::TensorList grams, at::TensorList bases, at::TensorList refresh_offsets, at::TensorList state_steps,
                 const at::Tensor& table, const at::Tensor& scratch, const std::optional<at::Tensor>& grad_scale,
                 at::ArrayRef<double> lr, at::ArrayRef<double> weight_decay, at::ArrayRef<double> numbers) {
  const Layouts layouts(table);
  const StepLists lists{params, grads, exp_avgs, exp_avg_sqs, grams, bases, refresh_offsets, state_steps, lr, weight_decay};
  check(lists, layouts);
  const Options options(numbers, grad_scale ? grad_scale->item<double>() : 1.0);
  const int64_t n = params.size();
  at::Tensor outcomes = at::zeros({n}, at::TensorOptions(at::kCPU).dtype(at::kInt));
  if (n == 0) return outcomes;
  const at::ScalarType dtype = exp_avgs[0].scalar_type();
  std::vector<Task> tasks = tasks_of(lists, layouts, options);
  choose_parallel(tasks);

  int32_t* outcome = outcomes.mutable_data_ptr<int32_t>();
  AT_DISPATCH_FLOATING_TYPES(dtype, "soap_opt::step_", [&] {
    for_each_task<scalar_t>(tasks, layouts, scratch, [&](const Task& task, scalar_t* memory) {
      outcome[&task - tasks.data()] = step_one<scalar_t>(task, memory, options);
    });
    for (const Task& task : tasks) {
      int32_t& result = outcome[&task - tasks.data()];
      if (task.layout->numel == 0 || result == kUnusable) continue;
      bump_versions(task);
      if ((task.parallel || task.refresh_in_parallel) && !task.due.empty()) {
        at::AutoDispatchBelowADInplaceOrView guard;
        const FlushSubnormals flush;
        result = refresh_parallel<scalar_t>(task, scratch.mutable_data_ptr<scalar_t>(), options);
      }
    }
  });
  return outcomes;
}

TORCH_LIBRARY_IMPL(soap_opt, CPU, m) {
  m.impl("step_", &step_);
  m.impl("scratch_numel", &scratch_numel);
}

// For views whose memory holds the negatives of their elements: in_order sees such views, and they are stepped in a copy.
TORCH_LIBRARY_IMPL(soap_opt, Negative, m) {
  m.impl("step_", torch::CppFunction::makeFallthrough());
  m.impl("gram_ema_", torch::CppFunction::makeFallthrough());
}

} // namespace soap_opt
