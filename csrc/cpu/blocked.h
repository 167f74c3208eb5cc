// Mode products and Grams of one parameter on one core, in pieces that stay in its cache (tiles.h).
//
// x is arranged [D_1, .., D_k] in memory order and contiguous. Seen from one group it is [A, D, B].
#pragma once

#include <algorithm>

#include "factor.h"
#include "layout.h"
#include "loops.h"
#include "products.h"
#include "tiles.h"
#include "wide.h"

namespace soap_opt {

// Elements of a chunk; the inner groups are multiplied chunk by chunk. 64 KiB of floats, so that a chunk, its result and the
// packed pieces of both fit in L2 together.
constexpr int64_t kChunk = int64_t(1) << 14;

// Columns of a product that are packed at once
constexpr int64_t kColumns = 128;

// Rows that a Gram adds up in registers before the sum goes to memory. The limit also keeps the rounding small.
constexpr int64_t kGramRows = 256;

// Products of at most so many multiplications are plain loops: packing would cost more.
constexpr int64_t kLoopProduct = 16 * 16 * 16;

// How a parameter is cut. Groups before `outer` are multiplied over the whole tensor, the inner groups in chunks of `count`
// slabs. A slab is the part of the tensor at one index of the outer groups.
struct Cut {
  size_t outer = 0;
  int64_t slab = 1, count = 1;
  bool outer_modes = false; // whether an outer group is preconditioned

  explicit Cut(const Layout& layout) {
    outer = layout.mode_groups.size();
    while (outer > 0) {
      const ModeGroup& group = layout.mode_groups[outer - 1];
      if (slab * group.width > kChunk || (!group.positions.empty() && group.width > kTileWidth)) break;
      slab *= group.width;
      --outer;
    }
    for (size_t g = 0; g < outer; ++g) outer_modes |= !layout.mode_groups[g].positions.empty();
    const int64_t slabs = layout.numel / std::max<int64_t>(slab, 1),
                  most = std::min(slabs, std::max<int64_t>(1, kChunk / std::max<int64_t>(slab, 1)));
    count = most;
    // The inner groups' columns (or rows) are multiplied sixteen at a time: take the count that wastes least of them
    double best = 0;
    for (int64_t n = most; outer < layout.mode_groups.size() && most > 1 && 2 * n > most; --n) {
      double useful = 0, padded = 0;
      int64_t before = n;
      for (size_t g = outer; g < layout.mode_groups.size(); ++g) {
        const int64_t columns = n * slab / layout.mode_groups[g].width;
        if (!layout.mode_groups[g].positions.empty()) {
          useful += double(columns) * layout.mode_groups[g].width;
          padded += double(panels_of<float>(columns) * kPackedWidth<float>) * layout.mode_groups[g].width;
        }
        before *= layout.mode_groups[g].width;
      }
      if (padded == 0) break;
      if (useful / padded > best + 0.005) {
        best = useful / padded;
        count = n;
      }
    }
  }
  int64_t chunk() const { return slab * count; }
};

// Whether a product with a packed matrix, without a sink, puts several slabs [D, B] of [A, D, B] side by side. It writes
// nothing after its result's end then. (step.cpp counts on that where threads write neighbouring slabs.)
inline bool side_by_side(int64_t after) { return after > 1 && after < kColumns / 2; }

// Elements of room that product() needs for a group of this width.
template <typename T>
int64_t product_room(int64_t width) {
  return width > kTileWidth ? wide_room<T>(width) : packed_numel<T>(width, kColumns) + (width + 1) * kColumns;
}

// Starts to read x [rows, n], row stride ld, into L2. (A processor foresees the rest of a row, but not the next row.)
template <typename T>
void fetch_rows(const T* x, int64_t ld, int64_t rows, int64_t n) {
#if defined(__GNUC__)
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; i += kPackedWidth<T>) __builtin_prefetch(x + r * ld + i, 0, 2);
#endif
}

// to <- from x_g M, both [A, D, B]; `to` and `from` are different buffers, and `to` has kPackedWidth elements to spare, or the
// slabs are side_by_side().
// sink(offset, values, n), where given, takes the result in runs, and `to` is not used: for a packed M, and A = 1 < B.
// sink.fetch(offset, ld, rows, n) announces runs.
struct NoSink {
  template <typename T>
  void operator()(int64_t, const T*, int64_t) const {}
  void fetch(int64_t, int64_t, int64_t, int64_t) const {}
};
template <typename T, typename Sink = NoSink>
void product(const T* from, T* to, int64_t before, int64_t after, const Factor<T>& m, T* room, const Sink& sink = {}) {
  constexpr bool to_sink = !std::is_same_v<Sink, NoSink>;
  const int64_t width = m.width;
  if (m.packed == nullptr) { // too small to be packed, or too wide to be packed whole
    if (is_wide(width, before, after))
      product_wide<T>(from, to, before, after, m, /*threads=*/1, room, 0);
    else if (before * after * width * width > kLoopProduct)
      multiply<T>(from, to, before, width, after, m.matrix());
    else if (after == 1)
      small_gemm(to, width, from, width, 1, m.data, m.row_stride(), m.column_stride(), before, width, width, 1, 0);
    else
      for (int64_t a = 0; a < before; ++a)
        small_gemm(to + a * width * after, after, m.data, m.column_stride(), m.row_stride(), from + a * width * after, after, 1,
                   width, after, width, 1, 0);
  } else if (after == 1 && width <= kUnpackedWidth) {
    multiply_rows<T>(to, before, from, m.packed, width);
  } else if (after == 1) {
    for (int64_t a = 0; a < before; a += kColumns) {
      const int64_t rows = std::min(kColumns, before - a);
      pack_transposed<T>(room, width, 0, from + a * width, width, width, rows);
      multiply_panels<T>(to + a * width, width, rows, width, room, m.packed, width);
    }
  } else if (to_sink || !side_by_side(after)) {
    constexpr int64_t panel = kPackedWidth<T>;
    T* result = room + packed_numel<T>(width, kColumns); // [W, kColumns]
    const int64_t last = (after - 1) / kColumns * kColumns;
    for (int64_t a = 0; a < before; ++a)
      for (int64_t b = last; b >= 0; b -= kColumns) { // downwards: see multiply_panels
        const int64_t columns = std::min(kColumns, after - b), place = a * width * after + b;
        pack_rows<T>(room, width, 0, from + place, after, width, columns);
        // Row panel by row panel, while the columns that come next, and what the sink needs, are on their way to the cache
        const int64_t next = b > 0 ? place - kColumns : place - b + width * after + last;
        const bool more = b > 0 || a + 1 < before;
        for (int64_t i = 0; i < width; i += panel) {
          const int64_t rows = std::min(panel, width - i), at = place + i * after;
          if (more) fetch_rows(from + next + i * after, after, rows, kColumns);
          if (!to_sink) {
            multiply_panels<T>(to + at, after, rows, columns, m.packed + i * width, room, width);
          } else {
            sink.fetch(at, after, rows, columns);
            multiply_panels<T>(result, kColumns, rows, columns, m.packed + i * width, room, width);
            for (int64_t j = 0; j < rows; ++j) sink(at + j * after, result + j * kColumns, columns);
          }
        }
      }
  } else {
    const int64_t most = std::max<int64_t>(1, kColumns / after);
    T* result = room + packed_numel<T>(width, kColumns); // [D, kColumns]
    const int64_t slab = width * after;
    for (int64_t a = 0; a < before; a += most) {
      const int64_t count = std::min(most, before - a);
      pack_runs<T>(room, width, from + a * slab, slab, count, after);
      multiply_panels<T>(result, kColumns, width, count * after, m.packed, room, width);
      unpack_runs<T>(to + a * slab, slab, count, after, result, kColumns, width);
    }
  }
}

// Elements of room that gram_ema_blocked needs for a group of this width.
template <typename T>
int64_t gram_room(int64_t width) {
  if (width > kTileWidth) return wide_gram_room<T>(width);
  const int64_t padded = panels_of<T>(width) * kPackedWidth<T>;
  return 2 * padded * padded + padded * kGramRows;
}

// G_i <- beta G_i + (1 - beta) (x [A, D, B] contracted with itself over all modes but i), for the modes of one group. It runs
// on one core; wide groups take gram_wide (wide.h).
template <typename T>
void gram_ema_group(const ModeGroup& group, const T* x, int64_t before, int64_t after, T* const* grams, T* room, double beta) {
  const int64_t width = group.width;
  if (width > kTileWidth) {
    gram_wide<T>(grams[group.positions[0]], x, before, width, after, room, beta);
    return;
  }
  int64_t ld = panels_of<T>(width) * kPackedWidth<T>;
  T* sum = room;
  T* trace = room + ld * ld;
  T* panels = trace + ld * ld;
  if (before * width * after * width <= kLoopProduct) {
    ld = width;
    for (int64_t a = 0; a < before; ++a) {
      const T* piece = x + a * width * after;
      small_gemm(sum, ld, piece, after, 1, piece, 1, after, width, width, after, 1, a == 0 ? 0 : 1);
    }
  } else {
    std::fill_n(sum, ld * ld, T(0));
    if (after == 1) {
      for (int64_t a = 0; a < before; a += kGramRows) {
        const int64_t rows = std::min(kGramRows, before - a);
        if (width <= kUnpackedWidth && (before - a - rows) * width >= kPackedWidth<T>) { // what is read after the end is x's
          accumulate_gram_of_rows<T>(sum, width, x + a * width, rows);
          continue;
        }
        pack_rows<T>(panels, rows, 0, x + a * width, width, rows, width);
        accumulate_gram<T>(sum, width, panels, rows);
      }
    } else if (before == 1 || after > kGramRows) {
      for (int64_t a = 0; a < before; ++a)
        for (int64_t b = 0; b < after; b += kGramRows) {
          const int64_t rows = std::min(kGramRows, after - b);
          const T* piece = x + a * width * after + b; // [D, rows]
          for (int64_t j = 0; j < width; j += kPackedWidth<T>) {
            const int64_t next = j + kPackedWidth<T>, columns = std::min(next, width) - j;
            fetch_rows(piece + next * after, after, std::min(kPackedWidth<T>, width - next), rows);
            pack_transposed<T>(panels + j * rows, rows, 0, piece + j * after, after, rows, columns);
          }
          accumulate_gram<T>(sum, width, panels, rows);
        }
    } else {
      const int64_t most = kGramRows / after;
      for (int64_t a = 0; a < before; a += most) {
        const int64_t count = std::min(most, before - a);
        for (int64_t k = 0; k < count; ++k)
          pack_transposed<T>(panels, count * after, k * after, x + (a + k) * width * after, after, after, width);
        accumulate_gram<T>(sum, width, panels, count * after);
      }
    }
  }
  for (size_t f = 0; f < group.positions.size(); ++f) {
    const int64_t d = group.sizes[f];
    T* gram = grams[group.positions[f]];
    if (d == width) {
      average_triangle(gram, sum, ld, d, beta);
    } else {
      partial_trace(sum, ld, group, f, trace);
      average_triangle(gram, trace, d, d, beta);
    }
    mirror<T>(gram, d, 0, d);
  }
}

// gram_ema_group for all groups of a parameter.
template <typename T>
void gram_ema_blocked(const Layout& layout, const T* x, T* const* grams, T* room, double beta) {
  int64_t before = 1;
  for (const ModeGroup& group : layout.mode_groups) {
    if (!group.positions.empty()) gram_ema_group<T>(group, x, before, layout.numel / (before * group.width), grams, room, beta);
    before *= group.width;
  }
}

// The scratch of one core, for a step, or for the Grams alone (which need less).
template <typename T>
struct Workspace {
  T *converted, *whole, *spare, *chunk, *other, *gram;
  c10::SmallVector<T*, 4> matrix, forward, back; // for each group: its Kronecker product, the panels of M and of M^T
  T *kronecker, *product;
  int64_t numel = 0;

  Workspace(const Layout& layout, const Cut& cut, T* memory) {
    const auto take = [&](int64_t n) {
      T* place = memory == nullptr ? nullptr : memory + numel;
      numel += panels_of<T>(n) * kPackedWidth<T>; // cache lines
      return place;
    };
    int64_t widest_product = 0, widest_gram = 0;
    for (const ModeGroup& group : layout.mode_groups) {
      const int64_t width = group.width, modes = group.positions.size();
      const int64_t packed = modes > 0 && width <= kTileWidth ? packed_numel<T>(width, width) : 0;
      matrix.push_back(take(modes > 1 ? width * width : 0));
      forward.push_back(take(packed));
      back.push_back(take(packed));
      if (modes > 0) widest_product = std::max(widest_product, product_room<T>(width));
      if (modes > 0) widest_gram = std::max(widest_gram, gram_room<T>(width));
    }
    converted = take(layout.numel);
    whole = take(layout.numel + kPackedWidth<T>);
    spare = take(cut.outer_modes ? layout.numel + kPackedWidth<T> : 0);
    chunk = take(cut.chunk() + kPackedWidth<T>);
    other = take(cut.chunk() + kPackedWidth<T>);
    kronecker = take(2 * kKroneckerWidth * kKroneckerWidth);
    gram = take(widest_gram);
    product = take(widest_product);
  }
};

// The scratch of a parameter that all threads step.
template <typename T>
struct ParallelWorkspace {
  T *converted, *whole, *spare, *kronecker, *packed, *gram, *rooms;
  int64_t threads, room = 0; // elements of rooms for each thread
  int64_t numel = 0;

  ParallelWorkspace(const Layout& layout, int64_t threads, T* memory) : threads(threads) {
    const auto take = [&](int64_t n) {
      T* place = memory == nullptr ? nullptr : memory + numel;
      numel += panels_of<T>(n) * kPackedWidth<T>; // cache lines
      return place;
    };
    int64_t widest_gram = 0;
    for (const ModeGroup& group : layout.mode_groups) {
      if (group.positions.empty()) continue;
      room = std::max({room, wide_room<T>(group.width), product_room<T>(group.width)});
      widest_gram = std::max({widest_gram, wide_gram_room<T>(group.width), gram_room<T>(group.width)});
    }
    room = panels_of<T>(room) * kPackedWidth<T>;
    converted = take(layout.numel);
    whole = take(layout.numel + kPackedWidth<T>);
    spare = take(layout.numel + kPackedWidth<T>);
    kronecker = take(2 * kKroneckerWidth * kKroneckerWidth);
    packed = take(packed_numel<T>(kTileWidth, kTileWidth));
    gram = take(widest_gram);
    rooms = take(threads * room);
  }
};

// gram_ema_blocked on all threads.
template <typename T>
void gram_ema_parallel(const Layout& layout, const T* x, T* const* grams, const ParallelWorkspace<T>& work, double beta) {
  int64_t before = 1;
  for (const ModeGroup& group : layout.mode_groups) {
    const int64_t after = layout.numel / (before * group.width);
    if (group.positions.size() == 1)
      gram_wide<T>(grams[group.positions[0]], x, before, group.width, after, work.gram, beta);
    else if (!group.positions.empty()) // Kronecker pairs are small
      gram_ema_group<T>(group, x, before, after, grams, work.gram, beta);
    before *= group.width;
  }
}

} // namespace soap_opt
