// The layouts of parameters: soap_opt.layout.Layout, decoded from the int64 table that soap_opt.cpu.layout_table writes.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <limits>
#include <vector>

namespace soap_opt {

// Widest Kronecker product of tiny modes (soap_opt.layout.KRONECKER_MAX_WIDTH)
constexpr int64_t kKroneckerWidth = 64;

constexpr int64_t kMaxNumel = int64_t(1) << 48; // 2^50 bytes and more

// Neighbouring dimensions, in memory order, that one matrix multiplies.
struct ModeGroup {
  int64_t width;                          // product of the sizes
  c10::SmallVector<int64_t, 3> positions; // indices among the parameter's preconditioned modes; empty: not preconditioned
  c10::SmallVector<int64_t, 3> sizes;
};

struct Layout {
  c10::SmallVector<int64_t, 6> order; // parameter dimensions from the outermost in memory to the innermost
  c10::SmallVector<ModeGroup, 4> mode_groups;
  int64_t numel = 1;
  int64_t modes = 0;

  // Flops of one pass over all modes, U = 2 numel sum(d_i), where a Kronecker product counts as one mode of its width.
  double flops() const {
    double width = 0;
    for (const auto& group : mode_groups) width += group.positions.empty() ? 0 : group.width;
    return 2.0 * numel * width;
  }
};

// The layouts of a list of parameters. Many parameters share a layout.
struct Layouts {
  std::vector<Layout> distinct;
  const int64_t* which; // [size] indices into distinct, in the table's own memory
  int64_t size;

  const Layout& operator[](int64_t i) const { return distinct[which[i]]; }

  // [distinct layouts, parameters, which.., then for each layout: ndim, order.., numel, groups, then for each group: width,
  // modes, positions.., sizes..]. An inconsistent table is refused, because all later code trusts it.
  explicit Layouts(const at::Tensor& table) {
    TORCH_CHECK(table.scalar_type() == at::kLong && table.is_contiguous(), "layouts must be a contiguous int64 tensor");
    const int64_t* next = table.const_data_ptr<int64_t>();
    const int64_t* const end = next + table.numel();
    // The next number of the table: a `what` that cannot be above `most`
    const auto take = [&](const char* what, int64_t most = std::numeric_limits<int64_t>::max()) {
      TORCH_CHECK(next < end, "layouts: the table of ", table.numel(), " numbers ends before ", what);
      TORCH_CHECK(*next >= 0 && *next <= most, "layouts: ", what, " is ", *next, ", not between 0 and ", most);
      return *next++;
    };
    const auto times = [](int64_t a, int64_t b) {
      TORCH_CHECK(b == 0 || a <= kMaxNumel / b, "layouts: a parameter of more than ", kMaxNumel, " elements");
      return a * b;
    };
    const auto take_count = [&](const char* what) { return take(what, end - next); }; // each stands in the table
    distinct.resize(take_count("the number of layouts"));
    size = take_count("the number of parameters");
    TORCH_CHECK(size <= end - next, "layouts: the table of ", table.numel(), " numbers ends before its ", size, " parameters");
    which = next;
    for (int64_t i = 0; i < size; ++i) take("a parameter's layout", int64_t(distinct.size()) - 1);
    for (auto& layout : distinct) {
      layout.order.resize(take_count("a layout's number of dimensions"));
      const int64_t dims = layout.order.size();
      std::vector<bool> seen(dims, false);
      for (auto& dim : layout.order) {
        dim = take("a dimension", dims - 1);
        TORCH_CHECK(!seen[dim], "layouts: dimension ", dim, " stands twice in an order");
        seen[dim] = true;
      }
      layout.numel = take("a number of elements");
      layout.mode_groups.resize(take_count("a layout's number of groups"));
      int64_t numel = 1;
      for (auto& group : layout.mode_groups) {
        group.width = take("a group's width");
        const int64_t modes = take_count("a group's number of modes");
        for (int64_t k = 0; k < modes; ++k) group.positions.push_back(take("a mode's position"));
        int64_t width = 1;
        for (int64_t k = 0; k < modes; ++k) {
          group.sizes.push_back(take("a mode's size"));
          width = times(width, group.sizes.back());
        }
        TORCH_CHECK(modes == 0 || width == group.width, "layouts: a group of width ", group.width, " has modes of ", width);
        TORCH_CHECK(modes <= 1 || width <= kKroneckerWidth, "layouts: a Kronecker product of width ", width, ", above ",
                    kKroneckerWidth);
        layout.modes += modes;
        numel = times(numel, group.width);
      }
      TORCH_CHECK(numel == layout.numel, "layouts: groups of ", numel, " elements in a parameter of ", layout.numel);
      std::vector<bool> used(layout.modes, false);
      for (const auto& group : layout.mode_groups)
        for (int64_t position : group.positions) {
          TORCH_CHECK(position < layout.modes && !used[position], "layouts: positions of ", layout.modes,
                      " modes are not 0 to ", layout.modes - 1);
          used[position] = true;
        }
    }
    TORCH_CHECK(next == end, "layouts: ", end - next, " numbers too many at the end of the table");
  }
};

// All threads step one larger parameter at a time; smaller parameters are stepped side by side, each by one core.
constexpr int64_t kParallelNumel = int64_t(1) << 21;

} // namespace soap_opt
