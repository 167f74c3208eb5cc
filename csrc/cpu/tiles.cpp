// The register tiles, and the packing that feeds them.
#include "tiles.h"

#include <algorithm>
#include <type_traits>

#include "simd.h"

namespace soap_opt {
namespace {

// How a tile's sums are stored
enum class Store { set, add, average }; // to <- sum, to <- to + sum, to <- keep to + weight sum

// The operands of a tile, a [k, W] and b [k, kPanels W]. Entry (l, i) lies at start + l step() + offset(i).
template <typename T>
struct Panel { // packed; a only
  const T* start;
  static constexpr int64_t step() { return kPackedWidth<T>; }
  static constexpr int64_t offset(int i) { return i; }
};
template <typename T>
struct Panels { // packed, side by side
  const T* start;
  int64_t k;
  static constexpr int64_t step() { return kPackedWidth<T>; }
  SOAP_OPT_INLINE int64_t offset(int i) const {
    constexpr int width = kPackedWidth<T>;
    return i / width * k * width + i % width;
  }
  SOAP_OPT_INLINE Panel<T> left(int64_t i) const { return {start + i * k}; }
  SOAP_OPT_INLINE Panels right(int64_t j) const { return {start + j * k, k}; }
};
template <typename T>
struct Rows { // of a matrix [k, n]
  const T* start;
  int64_t ld;
  SOAP_OPT_INLINE int64_t step() const { return ld; }
  static constexpr int64_t offset(int i) { return i; }
  SOAP_OPT_INLINE Rows left(int64_t i) const { return {start + i, ld}; }
  SOAP_OPT_INLINE Rows right(int64_t j) const { return {start + j, ld}; }
};
template <typename T>
struct Columns { // of a matrix [n, k]; a only
  const T* start;
  int64_t ld;
  static constexpr int64_t step() { return 1; }
  SOAP_OPT_INLINE int64_t offset(int i) const { return i * ld; }
};

// Registers that hold sums: half of them; the rest is for b's row and the loads that the compiler keeps in flight. With AVX2 12
// of 16, tiles of 6 x 16: eight sums are no more than two units with four cycles of latency need, and 6 x 16 is 8 loads for 12
// multiplications where 4 x 16 is 6 for 8 (k = 512, one Zen 3 core: 101 against 94 GF/s).
template <typename I>
constexpr int kSums = std::is_same_v<I, Avx2> ? 12 : I::registers / 2;

// Rows [first, first + kRows) of a tile (below). Only those before `valid` are written.
template <typename I, int kRows, int kPanels, Store kStore, typename T, typename A, typename B>
SOAP_OPT_INLINE void tile_rows(T* SOAP_OPT_RESTRICT to, int64_t ld, A a, B b, int64_t k, int first, int valid, T keep,
                               T weight) {
  using V = Vector<T, I>;
  constexpr int columns = kPanels * (kPackedWidth<T> / V::lanes);
  V sums[kRows][columns];
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < columns; ++c) sums[r][c].zero();
  const T *left = a.start + a.offset(first), *right = b.start;
  for (int64_t l = 0; l < k; ++l, left += a.step(), right += b.step()) {
    V line[columns];
    for (int c = 0; c < columns; ++c) line[c].load(right + b.offset(c * V::lanes));
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < columns; ++c) sums[r][c].fma(left[a.offset(r)], line[c]);
  }
  to += first * ld;
  // Left to itself, GCC may keep these loops, for which the sums would have to be in memory
  SOAP_OPT_UNROLL
  for (int r = 0; r < kRows; ++r, to += ld) {
    if (first + r >= valid) break;
    SOAP_OPT_UNROLL
    for (int c = 0; c < columns; ++c) {
      T* place = to + c * V::lanes;
      if constexpr (kStore == Store::add) {
        V old;
        old.load(place);
        sums[r][c].add(old);
      } else if constexpr (kStore == Store::average) {
        V old, sum;
        old.load(place);
        sum.zero();
        sum.fma(keep, old);
        sum.fma(weight, sums[r][c]);
        sums[r][c] = sum;
      }
      sums[r][c].store(place);
    }
  }
}

// to [W, kPanels W] (row stride ld) <- a^T b for a [k, W] and b [k, kPanels W], as many rows at a time as there are registers
// for. Only the first `valid` rows are written.
template <typename I, int kPanels, Store kStore, typename T, typename A, typename B>
SOAP_OPT_INLINE void tile(T* to, int64_t ld, A a, B b, int64_t k, int valid = kPackedWidth<T>, T keep = 1, T weight = 1) {
  constexpr int width = kPackedWidth<T>, columns = kPanels * width / Vector<T, I>::lanes;
  constexpr int most = std::clamp(kSums<I> / columns, 1, width), parts = (width + most - 1) / most;
  constexpr int rows = width / parts, larger = width % parts * (rows + 1); // 16 = 6 + 5 + 5
  int first = 0;
  for (; first < std::min(larger, valid); first += rows + 1)
    tile_rows<I, rows + 1, kPanels, kStore>(to, ld, a, b, k, first, valid, keep, weight);
  for (; first < valid; first += rows) tile_rows<I, rows, kPanels, kStore>(to, ld, a, b, k, first, valid, keep, weight);
}

// The number of panels of b side by side in a tile. With AVX-512 it is two: 8 x 32 floats take as many registers for sums as
// 16 x 16, and need 10 loads for 16 multiplications instead of 17. A core that multiplies twice a cycle is bound by the loads
// (Sapphire Rapids: 162 to 168 GF/s against 138); a core that multiplies once is not (Zen 4: 117 with either). Below AVX-512
// there are too few registers for two panels. An element is the same sum in the same order with either number.
template <typename I>
constexpr int kTilePanels = I::bytes == Avx512::bytes ? 2 : 1;

// c [W, n] (row stride ld) <- a^T b for a [k, W] and b [k, n], columns from the last panel to the first: the last tile of a row
// writes past its end into the start of the next row, which is written later.
template <typename I, Store kStore, typename T, typename A, typename B>
SOAP_OPT_INLINE void multiply_row(T* c, int64_t ld, A a, B b, int64_t n, int64_t k, int valid) {
  constexpr int panels = kTilePanels<I>;
  constexpr int64_t width = kPackedWidth<T>, across = panels * width; // columns of a tile
  int64_t j = panels_of<T>(n) * width;
  while (j % across != 0) { // a panel that is left over
    j -= width;
    tile<I, 1, kStore>(c + j, ld, a, b.right(j), k, valid);
  }
  while (j > 0) {
    j -= across;
    tile<I, panels, kStore>(c + j, ld, a, b.right(j), k, valid);
  }
}

template <typename I, Store kStore, typename T>
SOAP_OPT_INLINE void multiply_panels_as(T* c, int64_t ld, int64_t m, int64_t n, const T* a, const T* b, int64_t k) {
  const Panels<T> rows{a, k}, columns{b, k};
  constexpr int panels = kTilePanels<I>;
  constexpr int64_t width = kPackedWidth<T>, across = panels * width; // columns of a tile
  // The larger matrix is read once; the smaller one stays in cache and is read for each panel of the larger.
  if (m >= n) {
    for (int64_t i = 0; i < m; i += width)
      multiply_row<I, kStore>(c + i * ld, ld, rows.left(i), columns, n, k, int(std::min(width, m - i)));
  } else { // columns downwards here too
    int64_t j = panels_of<T>(n) * width;
    while (j % across != 0) {
      j -= width;
      for (int64_t i = 0; i < m; i += width)
        tile<I, 1, kStore>(c + i * ld + j, ld, rows.left(i), columns.right(j), k, int(std::min(width, m - i)));
    }
    while (j > 0) {
      j -= across;
      for (int64_t i = 0; i < m; i += width)
        tile<I, panels, kStore>(c + i * ld + j, ld, rows.left(i), columns.right(j), k, int(std::min(width, m - i)));
    }
  }
}

template <typename I, typename T>
SOAP_OPT_INLINE void multiply_panels_body(T* c, int64_t ld, int64_t m, int64_t n, const T* a, const T* b, int64_t k, bool add) {
  if (add)
    multiply_panels_as<I, Store::add>(c, ld, m, n, a, b, k);
  else
    multiply_panels_as<I, Store::set>(c, ld, m, n, a, b, k);
}

// c [W, count W] (row stride ld) <- a^T b for W columns of a [k, W] and the first `count` panels of b
template <typename I, Store kStore, typename T, typename A, typename B>
SOAP_OPT_INLINE void gram_row(T* c, int64_t ld, A a, B b, int64_t k, int64_t count, int valid = kPackedWidth<T>, T keep = 1,
                              T weight = 1) {
  constexpr int panels = kTilePanels<I>;
  constexpr int64_t width = kPackedWidth<T>;
  int64_t j = 0;
  for (; j + panels <= count; j += panels)
    tile<I, panels, kStore>(c + j * width, ld, a, b.right(j * width), k, valid, keep, weight);
  for (; j < count; ++j) tile<I, 1, kStore>(c + j * width, ld, a, b.right(j * width), k, valid, keep, weight);
}

template <typename I, typename T>
SOAP_OPT_INLINE void average_gram_row_body(T* gram, int64_t n, int64_t i, const T* a, int64_t k, T keep, T weight) {
  constexpr int64_t width = kPackedWidth<T>;
  const int valid = int(std::min(width, n - i));
  const Panels<T> all{a, k};
  gram_row<I, Store::average>(gram + i * n, n, all.left(i), all, k, i / width, valid, keep, weight);
  alignas(64) T diagonal[width * width]; // (the tile on the diagonal may end beyond the matrix)
  tile<I, 1, Store::set>(diagonal, width, all.left(i), all.right(i), k);
  for (int64_t r = 0; r < valid; ++r)
    for (int64_t c = 0; c <= r; ++c) {
      T& place = gram[(i + r) * n + i + c];
      place = keep * place + weight * diagonal[r * width + c];
    }
}

// c [p, p] += a^T a for a [k, n], p = W panels_of(n)
template <typename I, typename T, typename X>
SOAP_OPT_INLINE void add_gram(T* c, int64_t n, X a, int64_t k) {
  constexpr int64_t width = kPackedWidth<T>;
  const int64_t count = panels_of<T>(n), ld = count * width;
  for (int64_t i = 0; i < count; ++i) gram_row<I, Store::add>(c + i * width * ld, ld, a.left(i * width), a, k, i + 1);
}

template <typename I, typename T>
SOAP_OPT_INLINE void accumulate_gram_body(T* c, int64_t n, const T* a, int64_t k) {
  add_gram<I>(c, n, Panels<T>{a, k}, k);
}

template <typename I, typename T>
SOAP_OPT_INLINE void accumulate_gram_of_rows_body(T* c, int64_t n, const T* x, int64_t k) {
  add_gram<I>(c, n, Rows<T>{x, n}, k);
}

template <typename I, typename T>
SOAP_OPT_INLINE void pack_rows_body(T* panels, int64_t k, int64_t first, const T* x, int64_t ld, int64_t rows, int64_t n) {
  constexpr int64_t width = kPackedWidth<T>;
  for (int64_t j = 0; j < n; j += width) {
    T* to = panels + j * k + first * width;
    const int64_t columns = std::min(width, n - j);
    if (columns == width) {
      for (int64_t r = 0; r < rows; ++r) std::memcpy(to + r * width, x + r * ld + j, sizeof(T) * width);
    } else {
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t q = 0; q < width; ++q) to[r * width + q] = q < columns ? x[r * ld + j + q] : T(0);
    }
  }
}

// to [4, 4] <- x^T, in registers: half the time of single elements
SOAP_OPT_INLINE void transpose_4x4(float* to, int64_t to_ld, const float* x, int64_t ld) {
#if defined(__GNUC__)
  typedef float Four __attribute__((vector_size(16)));
  Four row[4];
  for (int r = 0; r < 4; ++r) std::memcpy(&row[r], x + r * ld, 16);
  const Four a = __builtin_shufflevector(row[0], row[1], 0, 4, 1, 5), b = __builtin_shufflevector(row[0], row[1], 2, 6, 3, 7);
  const Four c = __builtin_shufflevector(row[2], row[3], 0, 4, 1, 5), d = __builtin_shufflevector(row[2], row[3], 2, 6, 3, 7);
  const Four turned[4] = {__builtin_shufflevector(a, c, 0, 1, 4, 5), __builtin_shufflevector(a, c, 2, 3, 6, 7),
                          __builtin_shufflevector(b, d, 0, 1, 4, 5), __builtin_shufflevector(b, d, 2, 3, 6, 7)};
  for (int r = 0; r < 4; ++r) std::memcpy(to + r * to_ld, &turned[r], 16);
#else
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c) to[c * to_ld + r] = x[r * ld + c];
#endif
}
SOAP_OPT_INLINE void transpose_4x4(double* to, int64_t to_ld, const double* x, int64_t ld) {
  for (int r = 0; r < 4; ++r)
    for (int c = 0; c < 4; ++c) to[c * to_ld + r] = x[r * ld + c];
}

template <typename I, typename T>
SOAP_OPT_INLINE void pack_transposed_body(T* panels, int64_t k, int64_t first, const T* x, int64_t ld, int64_t rows,
                                          int64_t n) {
  constexpr int64_t width = kPackedWidth<T>;
  for (int64_t j = 0; j < n; j += width) {
    T* to = panels + j * k + first * width;
    const T* from = x + j * ld;
    const int64_t columns = std::min(width, n - j);
    int64_t r = 0;
    if (columns == width) {
      // A cache line of four rows at a time: where ld is a power of two, the lines of more rows would evict each other
      for (; r + width <= rows; r += width)
        for (int64_t q = 0; q < width; q += 4)
          for (int64_t s = r; s < r + width; s += 4) transpose_4x4(to + s * width + q, width, from + q * ld + s, ld);
      for (; r + 4 <= rows; r += 4)
        for (int64_t q = 0; q < width; q += 4) transpose_4x4(to + r * width + q, width, from + q * ld + r, ld);
    }
    for (; r < rows; ++r)
      for (int64_t q = 0; q < width; ++q) to[r * width + q] = q < columns ? from[q * ld + r] : T(0);
  }
}

// The number of rows [length] of a slab [k, length] from whose every element a whole line can be read, or written, inside of
// the slab.
template <typename T>
int64_t whole_lines(int64_t k, int64_t length) {
  return std::max<int64_t>(0, k - (kPackedWidth<T> + length - 1) / length);
}

template <typename I, typename T>
SOAP_OPT_INLINE void mirror_body(T* x, int64_t n, int64_t begin, int64_t end) {
  constexpr int64_t width = kPackedWidth<T>;
  for (int64_t i = begin; i < end; i += width) {
    const int64_t rows = std::min(width, end - i);
    for (int64_t r = i; r < i + rows; ++r)
      for (int64_t c = r + 1; c < i + rows; ++c) x[r * n + c] = x[c * n + r];
    int64_t j = i + rows;
    if (rows == width)
      for (; j + 4 <= n; j += 4)
        for (int64_t r = i; r < i + width; r += 4) transpose_4x4(x + r * n + j, n, x + j * n + r, n);
    for (; j < n; ++j)
      for (int64_t r = i; r < i + rows; ++r) x[r * n + j] = x[j * n + r];
  }
}

// Lines are copied whole, in ascending order: what one writes after its part is overwritten by the parts that follow.
template <typename I, typename T>
SOAP_OPT_INLINE void pack_runs_body(T* panels, int64_t k, const T* x, int64_t apart, int64_t runs, int64_t length) {
  constexpr int64_t width = kPackedWidth<T>;
  const int64_t n = runs * length, whole = whole_lines<T>(k, length);
  const T zeros[width] = {};
  struct Part { // of a run, in a panel
    int64_t to, from, count;
  };
  for (int64_t j = 0; j < n; j += width) {
    T* line = panels + j * k;
    const int64_t used = std::min(width, n - j);
    Part parts[width];
    int count = 0;
    for (int64_t at = j; at < j + used; at += parts[count++].count) {
      const int64_t inside = at % length;
      parts[count] = {at - j, at / length * apart + inside, std::min(length - inside, j + used - at)};
    }
    const T* row = x;
    for (int64_t r = 0; r < whole; ++r, line += width, row += length) {
      for (int p = 0; p < count; ++p) std::memcpy(line + parts[p].to, row + parts[p].from, sizeof zeros);
      if (used < width) std::memcpy(line + used, zeros, sizeof zeros);
    }
    for (int64_t r = whole; r < k; ++r, line += width, row += length) {
      for (int p = 0; p < count; ++p) std::copy_n(row + parts[p].from, parts[p].count, line + parts[p].to);
      std::fill(line + used, line + width, T(0));
    }
  }
}

template <typename I, typename T>
SOAP_OPT_INLINE void unpack_runs_body(T* x, int64_t apart, int64_t runs, int64_t length, const T* rows, int64_t ld, int64_t k) {
  constexpr int64_t width = kPackedWidth<T>;
  const int64_t whole = whole_lines<T>(k, length);
  for (int64_t r = 0; r < k; ++r, x += length, rows += ld)
    for (int64_t q = 0; q < runs; ++q) {
      if (r < whole)
        for (int64_t i = 0; i < length; i += width) std::memcpy(x + q * apart + i, rows + q * length + i, sizeof(T) * width);
      else
        std::copy_n(rows + q * length, length, x + q * apart);
    }
}

template <typename I, typename T>
SOAP_OPT_INLINE void copy_runs_body(T* to, int64_t to_stride, const T* from, int64_t from_stride, int64_t runs,
                                    int64_t length) {
  for (int64_t r = 0; r < runs; ++r) {
    T* target = to + r * to_stride;
    const T* source = from + r * from_stride;
    int64_t i = 0; // memcpy of a constant size is a register; of a variable size, a call that costs more than 25 floats
    for (; i + 64 / int64_t(sizeof(T)) <= length; i += 64 / sizeof(T)) std::memcpy(target + i, source + i, 64);
    for (; i + 16 / int64_t(sizeof(T)) <= length; i += 16 / sizeof(T)) std::memcpy(target + i, source + i, 16);
    for (; i < length; ++i) target[i] = source[i];
  }
}

template <typename I, typename T>
SOAP_OPT_INLINE void multiply_rows_body(T* c, int64_t m, const T* x, const T* b, int64_t k) {
  constexpr int64_t width = kPackedWidth<T>;
  const Panels<T> columns{b, k};
  int64_t i = 0;
  for (; i + width <= m; i += width)
    multiply_row<I, Store::set>(c + i * k, k, Columns<T>{x + i * k, k}, columns, k, k, int(width));
  if (i < m) { // fewer rows than a tile has
    alignas(64) T packed[kUnpackedWidth * width];
    pack_transposed_body<I>(packed, k, 0, x + i * k, k, k, m - i);
    multiply_row<I, Store::set>(c + i * k, k, Panel<T>{packed}, columns, k, k, int(m - i));
  }
}

} // namespace

#define SOAP_OPT_FOR(T)                                                                                                  \
  SOAP_OPT_VERSIONS(template <>, void, multiply_panels, multiply_panels_body,                                            \
                    (T * c, int64_t ld, int64_t m, int64_t n, const T* a, const T* b, int64_t k, bool add),              \
                    (c, ld, m, n, a, b, k, add))                                                                         \
  SOAP_OPT_VERSIONS(template <>, void, average_gram_row, average_gram_row_body,                                          \
                    (T * gram, int64_t n, int64_t i, const T* a, int64_t k, T keep, T weight),                           \
                    (gram, n, i, a, k, keep, weight))                                                                    \
  SOAP_OPT_VERSIONS(template <>, void, accumulate_gram, accumulate_gram_body, (T * c, int64_t n, const T* a, int64_t k), \
                    (c, n, a, k))                                                                                        \
  SOAP_OPT_VERSIONS(template <>, void, pack_rows, pack_rows_body,                                                        \
                    (T * panels, int64_t k, int64_t first, const T* x, int64_t ld, int64_t rows, int64_t n),             \
                    (panels, k, first, x, ld, rows, n))                                                                  \
  SOAP_OPT_VERSIONS(template <>, void, pack_transposed, pack_transposed_body,                                            \
                    (T * panels, int64_t k, int64_t first, const T* x, int64_t ld, int64_t rows, int64_t n),             \
                    (panels, k, first, x, ld, rows, n))                                                                  \
  SOAP_OPT_VERSIONS(template <>, void, mirror, mirror_body, (T * x, int64_t n, int64_t begin, int64_t end),              \
                    (x, n, begin, end))                                                                                  \
  SOAP_OPT_VERSIONS(template <>, void, multiply_rows, multiply_rows_body,                                                \
                    (T * c, int64_t m, const T* x, const T* b, int64_t k), (c, m, x, b, k))                              \
  SOAP_OPT_VERSIONS(template <>, void, accumulate_gram_of_rows, accumulate_gram_of_rows_body,                            \
                    (T * c, int64_t n, const T* x, int64_t k), (c, n, x, k))                                             \
  SOAP_OPT_VERSIONS(template <>, void, pack_runs, pack_runs_body,                                                        \
                    (T * panels, int64_t k, const T* x, int64_t apart, int64_t runs, int64_t length),                    \
                    (panels, k, x, apart, runs, length))                                                                 \
  SOAP_OPT_VERSIONS(template <>, void, unpack_runs, unpack_runs_body,                                                    \
                    (T * x, int64_t apart, int64_t runs, int64_t length, const T* rows, int64_t ld, int64_t k),          \
                    (x, apart, runs, length, rows, ld, k))                                                               \
  SOAP_OPT_VERSIONS(template <>, void, copy_runs, copy_runs_body,                                                        \
                    (T * to, int64_t to_stride, const T* from, int64_t from_stride, int64_t runs, int64_t length),       \
                    (to, to_stride, from, from_stride, runs, length))
SOAP_OPT_FOR(float)
SOAP_OPT_FOR(double)
#undef SOAP_OPT_FOR

} // namespace soap_opt
