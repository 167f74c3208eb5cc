// How a parameter's modes lie: soap_opt.plan.Layout, as the int64 table that plan.layout_table writes.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <vector>

namespace soap_opt {

// Neighbouring dimensions, in memory order, that one matrix multiplies.
struct Group {
  int64_t width;                          // product of the sizes
  c10::SmallVector<int64_t, 3> positions; // which of the parameter's preconditioned modes; empty: not preconditioned
  c10::SmallVector<int64_t, 3> sizes;
};

struct Layout {
  c10::SmallVector<int64_t, 6> order; // parameter dimensions from the outermost in memory to the innermost
  c10::SmallVector<Group, 4> groups;
  int64_t numel = 1;
  int64_t modes = 0;
  bool rotating = true; // every group is preconditioned: products may rotate the dimensions

  // Flops of one pass over all modes, U = 2 numel sum(d_i), Kronecker factors counted as executed.
  double flops() const {
    double width = 0;
    for (const auto& group : groups) width += group.positions.empty() ? 0 : group.width;
    return 2.0 * numel * width;
  }
};

// Layouts of a list of parameters. Many parameters share one.
struct Layouts {
  std::vector<Layout> distinct;
  const int64_t* which; // [size], into distinct; the table's own memory
  int64_t size;

  const Layout& operator[](int64_t i) const { return distinct[which[i]]; }

  // [distinct layouts, parameters, which.., then for each layout: ndim, order.., numel, groups, then for each group: width,
  // modes, positions.., sizes..]
  explicit Layouts(const at::Tensor& table) {
    TORCH_CHECK(table.scalar_type() == at::kLong && table.is_contiguous(), "layouts must be a contiguous int64 tensor");
    const int64_t* next = table.const_data_ptr<int64_t>();
    distinct.resize(*next++);
    size = *next++;
    which = next;
    next += size;
    for (auto& layout : distinct) {
      layout.order.resize(*next++);
      for (auto& dim : layout.order) dim = *next++;
      layout.numel = *next++;
      layout.groups.resize(*next++);
      for (auto& group : layout.groups) {
        group.width = *next++;
        const int64_t modes = *next++;
        group.positions.assign(next, next + modes);
        group.sizes.assign(next + modes, next + 2 * modes);
        next += 2 * modes;
        layout.modes += modes;
        layout.rotating &= modes > 0;
      }
    }
  }
};

// Larger parameters are stepped one at a time, with all threads in BLAS; smaller ones one a core (blocked.h), several at once.
constexpr int64_t kParallelNumel = int64_t(1) << 21;

// Widest Kronecker product of tiny modes (plan.KRONECKER_MAX_WIDTH)
constexpr int64_t kKroneckerWidth = 64;

} // namespace soap_opt
