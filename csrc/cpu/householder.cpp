// Householder reflectors in panels, and Q made of them: loops make the reflectors of a panel, register tiles its products.
#include "householder.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "simd.h"
#include "tiles.h"
#include "wide.h"

namespace soap_opt {
namespace {

constexpr int64_t kReflectors = 32; // of a panel; more of them make its loops longer, but its products deeper
constexpr int64_t kBlock = 128;     // reflectors, in panels, that are applied to a matrix beyond L2 in one pass
constexpr int64_t kRows = 32;       // rows (columns of the decomposed matrix) that a thread turns at once
constexpr int64_t kColumns = 256;   // columns of -T V^T that a thread makes at once

template <typename I, typename T>
SOAP_OPT_INLINE T dot(const T* SOAP_OPT_RESTRICT x, const T* SOAP_OPT_RESTRICT y, int64_t n) {
  constexpr int64_t lanes = 128 / sizeof(T); // independent sums, because the compiler may not reorder a single sum
  T sums[lanes] = {};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int64_t j = 0; j < lanes; ++j) sums[j] += x[i + j] * y[i + j];
  for (int64_t j = 0; i + j < n; ++j) sums[j] += x[i + j] * y[i + j];
  T total = 0;
  for (int64_t j = 0; j < lanes; ++j) total += sums[j];
  return total;
}

// Rows [first, first + count) of a [d, d], row stride ld, become reflectors v_k, H_k = I - tau_k v_k v_k^T. The entries of v_k
// are written from `first` on: 0 up to the diagonal, 1 on it. noise [d]: noise_of_column of each row. taus [count].
template <typename I, typename T>
SOAP_OPT_INLINE void reflect_rows_body(T* a, int64_t ld, int64_t d, int64_t first, int64_t count, const T* noise, T* taus) {
  for (int64_t k = first; k < first + count; ++k) {
    T* SOAP_OPT_RESTRICT v = a + k * ld;
    T below = dot<I>(v + k + 1, v + k + 1, d - k - 1), alpha = v[k];
    bool left = alpha * alpha + below > noise[k] * noise[k];
    if (alpha * alpha + below < kTinySquare<T>) {
      // A block of a Gram that is 1e-22 of the rest would cost Q its orthogonality: take the norm again, scaled.
      const T largest = largest_magnitude(v + k, d - k);
      left = largest > noise[k];
      if (left) scale_tiny(v + k, d - k, 1, largest);
      below = dot<I>(v + k + 1, v + k + 1, d - k - 1);
      alpha = v[k];
    }
    std::fill(v + first, v + k, T(0));
    v[k] = 1;
    T& tau = taus[k - first];
    if (!left || below == 0) { // nothing to reflect: H = I
      tau = 0;
      std::fill(v + k + 1, v + d, T(0));
      continue;
    }
    const Reflector<T> reflector(alpha, below);
    tau = reflector.tau;
    for (int64_t i = k + 1; i < d; ++i) v[i] *= reflector.inverse;
    for (int64_t j = k + 1; j < first + count; ++j) {
      T* SOAP_OPT_RESTRICT x = a + j * ld;
      const T weight = tau * dot<I>(v + k, x + k, d - k);
      for (int64_t i = k; i < d; ++i) x[i] -= weight * v[i];
    }
  }
}

template <typename T>
void reflect_rows(T* a, int64_t ld, int64_t d, int64_t first, int64_t count, const T* noise, T* taus);

} // namespace

#define SOAP_OPT_FOR(T)                                                                                    \
  namespace {                                                                                              \
  SOAP_OPT_VERSIONS(template <>, void, reflect_rows, reflect_rows_body,                                    \
                    (T * a, int64_t ld, int64_t d, int64_t first, int64_t count, const T* noise, T* taus), \
                    (a, ld, d, first, count, noise, taus))                                                 \
  }
SOAP_OPT_FOR(float)
SOAP_OPT_FOR(double)
#undef SOAP_OPT_FOR

namespace {

// to [d, d] <- from^T, from [d, d] with row stride ld
template <typename T>
void transpose(const T* from, int64_t ld, T* to, int64_t d) {
  for_each_copied_block(d, [&](int64_t c) { // columns of `from`
    for (int64_t r = 0; r < d; r += kCopied)
      for (int64_t i = c; i < std::min(d, c + kCopied); ++i)
        for (int64_t j = r; j < std::min(d, r + kCopied); ++j) to[i * d + j] = from[j * ld + i];
  });
}

// w reflectors as one matrix: H_1 .. H_w = I - V T V^T. The columns of V are rows of the matrix that was decomposed.
template <typename T>
struct Reflection {
  int64_t first, count, length;  // length = d - first
  std::unique_ptr<T[]> by_depth; // V [length, count], packed in pieces of kDepth rows, one after the other
  std::unique_ptr<T[]> triangle; // T^T [count, count], lower triangular, row-major
};

// A thread's own memory
template <typename T>
struct ReflectionRoom {
  int64_t numel = 0;
  T *vectors, *rows, *piece, *product, *product_packed;

  ReflectionRoom(int64_t width, int64_t ld, T* data) {
    const int64_t columns = std::min(kColumns, ld), depth = std::min(kDepth, ld); // (a small matrix needs less)
    const auto take = [&](int64_t n) {
      T* place = data == nullptr ? nullptr : data + numel;
      numel += n;
      return place;
    };
    vectors = take(packed_numel<T>(width, columns));
    rows = take(width * columns);
    piece = take(packed_numel<T>(depth, kRows));
    product = take((kRows + 1) * panels_of<T>(width) * kPackedWidth<T>);
    product_packed = take(packed_numel<T>(width, kRows));
  }
};

// The reflections of a [d, d], row stride padded_row<T>(d), whose columns are the rows of a: for d > kThreadedSize on all free
// threads. Every element is the same sum for any number of threads.
template <typename T>
class Reflections {
 public:
  using Room = ReflectionRoom<T>;

  // noise [d]: noise_of_column of each row
  Reflections(T* a, int64_t d, const T* noise)
      : a_(a),
        d_(d),
        ld_(padded_row<T>(d)),
        width_(std::min(d, d > kThreadedSize ? kBlock : kReflectors)),
        noise_(noise),
        threads_(d > kThreadedSize ? free_threads() : 1),
        taus_(d),
        shared_(new T[packed_numel<T>(width_, d) + 2 * packed_numel<T>(width_, width_)]),
        rooms_(new T[threads_ * Room(width_, ld_, nullptr).numel]) {
    turned_ = shared_.get();
    small_ = turned_ + packed_numel<T>(width_, d);
    small_packed_ = small_ + packed_numel<T>(width_, width_);
  }

  // The number of rows that one reflection is made of
  int64_t width() const { return width_; }

  // Makes reflectors of a's rows [first, first + count).
  Reflection<T> factor(int64_t first, int64_t count);

  // x <- H^T x (back: H x) for columns x [length], which are rows of xs [count, length] with a's row stride. Only their
  // elements from `skip` on are written, and elements after their end that fill a panel.
  void apply(const Reflection<T>& reflection, T* xs, int64_t count, bool back, int64_t skip);

 private:
  // function(i, room) for i < n
  template <typename Function>
  void each(int64_t n, const Function& function) {
    parallel_with_room(n, threads_, rooms_.get(), Room(width_, ld_, nullptr).numel, [&](int64_t begin, int64_t end, T* data) {
      const Room room(width_, ld_, data);
      for (int64_t i = begin; i < end; ++i) function(i, room);
    });
  }

  T* a_;
  int64_t d_, ld_, width_;
  const T* noise_;
  int64_t threads_;
  std::vector<T> taus_;
  std::unique_ptr<T[]> shared_, rooms_;
  T *turned_, *small_, *small_packed_; // U, packed; two matrices [width, width]
};

template <typename T>
Reflection<T> Reflections<T>::factor(int64_t first, int64_t count) {
  T* taus = taus_.data() + first;
  if (count <= kReflectors) {
    reflect_rows(a_, ld_, d_, first, count, noise_, taus);
  } else {
    for (int64_t begin = 0; begin < count; begin += kReflectors) {
      const int64_t some = std::min(kReflectors, count - begin), end = begin + some;
      const Reflection<T> panel = factor(first + begin, some);
      if (end < count) apply(panel, a_ + (first + end) * ld_ + first + begin, count - end, /*back=*/false, some);
    }
    for (int64_t k = 0; k < count; ++k) std::fill_n(a_ + (first + k) * ld_ + first, k, T(0)); // (R is not needed)
  }
  Reflection<T> made{first, count, d_ - first, nullptr, std::unique_ptr<T[]>(new T[count * count])};
  const int64_t panels = panels_of<T>(count), ld = panels * kPackedWidth<T>;
  made.by_depth.reset(new T[made.length * ld]);
  each((made.length + kDepth - 1) / kDepth, [&](int64_t piece, const Room&) {
    const int64_t k = piece * kDepth, depth = std::min(kDepth, made.length - k);
    pack_transposed<T>(made.by_depth.get() + k * ld, depth, 0, a_ + first * ld_ + first + k, ld_, depth, count);
  });
  T* products = small_; // V^T V
  each(panels, [&](int64_t panel, const Room&) {
    const int64_t i = panel * kPackedWidth<T>;
    for (int64_t k = 0; k < made.length; k += kDepth) {
      const int64_t depth = std::min(kDepth, made.length - k);
      const T* piece = made.by_depth.get() + k * ld;
      multiply_panels<T>(products + i * ld, ld, std::min(kPackedWidth<T>, count - i), count, piece + i * depth, piece, depth,
                         k > 0);
    }
  });
  for (int64_t k = 0; k < count; ++k) {
    T* SOAP_OPT_RESTRICT column = made.triangle.get() + k * count;
    std::fill_n(column, count, T(0));
    for (int64_t l = 0; l < k; ++l) {
      const T* SOAP_OPT_RESTRICT other = made.triangle.get() + l * count;
      for (int64_t i = 0; i <= l; ++i) column[i] += other[i] * products[l * ld + k];
    }
    for (int64_t i = 0; i < k; ++i) column[i] *= -taus[k];
    column[k] = taus[k];
  }
  return made;
}

template <typename T>
void Reflections<T>::apply(const Reflection<T>& reflection, T* xs, int64_t count, bool back, int64_t skip) {
  const int64_t w = reflection.count, length = reflection.length, n = length - skip, ld = panels_of<T>(w) * kPackedWidth<T>;
  // U [w, n] = -T V^T (back: -T^T V^T)
  const T* triangle = reflection.triangle.get();
  for (int64_t i = 0; i < w; ++i)
    for (int64_t k = 0; k < w; ++k) small_[k * w + i] = -(back ? triangle[i * w + k] : triangle[k * w + i]);
  pack_rows<T>(small_packed_, w, 0, small_, w, w, w);
  const T* vectors = a_ + reflection.first * ld_ + reflection.first + skip;
  each((n + kColumns - 1) / kColumns, [&](int64_t unit, const Room& room) {
    const int64_t j = unit * kColumns, columns = std::min(kColumns, n - j);
    pack_rows<T>(room.vectors, w, 0, vectors + j, ld_, w, columns);
    const int64_t stride = padded_row<T>(columns);
    multiply_panels<T>(room.rows, stride, w, columns, small_packed_, room.vectors, w);
    pack_rows<T>(turned_ + j * w, w, 0, room.rows, stride, w, columns);
  });
  // x^T V, then x^T += (x^T V) U
  each((count + kRows - 1) / kRows, [&](int64_t unit, const Room& room) {
    const int64_t rows = std::min(kRows, count - unit * kRows);
    T* x = xs + unit * kRows * ld_;
    for (int64_t k = 0; k < length; k += kDepth) {
      const int64_t depth = std::min(kDepth, length - k);
      pack_transposed<T>(room.piece, depth, 0, x + k, ld_, depth, rows);
      multiply_panels<T>(room.product, ld, rows, w, room.piece, reflection.by_depth.get() + k * ld, depth, k > 0);
    }
    pack_transposed<T>(room.product_packed, w, 0, room.product, ld, w, rows);
    multiply_panels<T>(x + skip, ld_, rows, n, room.product_packed, turned_, w, /*add=*/true);
  });
}

} // namespace

template <typename T>
void householder_q(T* columns, T* q, int64_t d) {
  const int64_t ld = padded_row<T>(d);
  std::vector<T> noise(d);
  for (int64_t k = 0; k < d; ++k) noise[k] = noise_of_column(largest_magnitude(columns + k * ld, d), d);
  Reflections<T> reflections(columns, d, noise.data());
  std::vector<Reflection<T>> made;
  for (int64_t first = 0; first < d; first += reflections.width()) {
    const int64_t count = std::min(reflections.width(), d - first), after = first + count;
    made.push_back(reflections.factor(first, count));
    if (after < d) reflections.apply(made.back(), columns + after * ld + first, d - after, /*back=*/false, count);
  }
  // Q^T = (H_1 .. H_d I)^T, from the last reflection to the first: only the entries to its right and below are not yet those of
  // the identity
  const std::unique_ptr<T[]> transposed(new T[d * ld]());
  for (int64_t i = 0; i < d; ++i) transposed[i * ld + i] = 1;
  for (auto one = made.rbegin(); one != made.rend(); ++one)
    reflections.apply(*one, transposed.get() + one->first * ld + one->first, d - one->first, /*back=*/true, 0);
  transpose(transposed.get(), ld, q, d);
}
template void householder_q(float*, float*, int64_t);
template void householder_q(double*, double*, int64_t);

} // namespace soap_opt
