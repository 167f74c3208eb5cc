// Householder reflectors in panels, and Q made of them: loops make the reflectors of a panel, register tiles its products.
#include "householder.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "simd.h"
#include "tiles.h"

namespace soap_opt {
namespace {

constexpr int64_t kReflectors = 32; // of a panel; more of them make its loops longer, but its products deeper

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

// Rows [first, first + count) of a [d, d] become reflectors v_k, H_k = I - tau_k v_k v_k^T. The entries of v_k are written from
// `first` on: 0 up to the diagonal, 1 on it. noise [d]: noise_of_column of each row. taus [count].
template <typename I, typename T>
SOAP_OPT_INLINE void reflect_rows_body(T* a, int64_t d, int64_t first, int64_t count, const T* noise, T* taus) {
  for (int64_t k = first; k < first + count; ++k) {
    T* SOAP_OPT_RESTRICT v = a + k * d;
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
      T* SOAP_OPT_RESTRICT x = a + j * d;
      const T weight = tau * dot<I>(v + k, x + k, d - k);
      for (int64_t i = k; i < d; ++i) x[i] -= weight * v[i];
    }
  }
}

template <typename T>
void reflect_rows(T* a, int64_t d, int64_t first, int64_t count, const T* noise, T* taus);

} // namespace

#define SOAP_OPT_FOR(T)                                                                        \
  namespace {                                                                                  \
  SOAP_OPT_VERSIONS(template <>, void, reflect_rows, reflect_rows_body,                        \
                    (T * a, int64_t d, int64_t first, int64_t count, const T* noise, T* taus), \
                    (a, d, first, count, noise, taus))                                         \
  }
SOAP_OPT_FOR(float)
SOAP_OPT_FOR(double)
#undef SOAP_OPT_FOR

namespace {

// A panel of w reflectors as one matrix: H_1 .. H_w = I - V T V^T. The columns of V are the rows of the panel.
template <typename T>
struct Reflection {
  int64_t first, count, length;          // length = d - first
  std::unique_ptr<T[]> by_depth;         // V packed [length, count]
  T triangle[kReflectors * kReflectors]; // T, upper triangular, row-major
};

template <typename T>
class Reflections {
 public:
  Reflections(int64_t d)
      : d_(d),
        room_(new T[packed_numel<T>(d, d) + 2 * packed_numel<T>(kReflectors, d) + (d + 1) * kReflectors +
                    packed_numel<T>(kReflectors, d) + kReflectors * (d + kPackedWidth<T>)+4 * kReflectors * kReflectors]) {
    T* next = room_.get();
    const auto take = [&](int64_t n) {
      T* place = next;
      next += n;
      return place;
    };
    packed_ = take(packed_numel<T>(d, d));
    vectors_ = take(packed_numel<T>(kReflectors, d));
    turned_ = take(packed_numel<T>(kReflectors, d));
    product_ = take((d + 1) * kReflectors);
    product_packed_ = take(packed_numel<T>(kReflectors, d));
    rows_ = take(kReflectors * (d + kPackedWidth<T>));
    small_ = take(2 * kReflectors * kReflectors);
    small_packed_ = take(2 * kReflectors * kReflectors);
  }

  // Makes reflectors of a's rows [first, first + count), and returns their panel with T.
  Reflection<T> factor(T* a, int64_t first, int64_t count, const T* noise) {
    Reflection<T> panel{first, count, d_ - first, std::unique_ptr<T[]>(new T[packed_numel<T>(d_ - first, count)]), {}};
    T taus[kReflectors];
    reflect_rows(a, d_, first, count, noise, taus);
    pack_transposed<T>(panel.by_depth.get(), panel.length, 0, a + first * d_ + first, d_, panel.length, count);
    multiply_panels<T>(small_, kReflectors, count, count, panel.by_depth.get(), panel.by_depth.get(), panel.length); // V^T V
    T* triangle = panel.triangle;
    for (int64_t k = 0; k < count; ++k) {
      for (int64_t i = 0; i < k; ++i) {
        T sum = 0;
        for (int64_t l = i; l < k; ++l) sum += triangle[i * kReflectors + l] * small_[l * kReflectors + k];
        triangle[i * kReflectors + k] = -taus[k] * sum;
      }
      triangle[k * kReflectors + k] = taus[k];
    }
    return panel;
  }

  // x <- H^T x (back: H x) for columns x, which are the rows of xs [count, d - first] with row stride d. Only their elements
  // from `skip` on are written. a: the matrix with the panel's rows.
  void apply(const Reflection<T>& panel, const T* a, T* xs, int64_t count, bool back, int64_t skip) {
    const int64_t w = panel.count, length = panel.length, n = length - skip;
    // U [w, n] = -T V (back: -T^T V), where the rows of V are the reflectors
    for (int64_t i = 0; i < w; ++i)
      for (int64_t k = 0; k < w; ++k)
        small_[k * w + i] = -(back ? panel.triangle[k * kReflectors + i] : panel.triangle[i * kReflectors + k]);
    pack_rows<T>(small_packed_, w, 0, small_, w, w, w);
    pack_rows<T>(vectors_, w, 0, a + panel.first * d_ + panel.first + skip, d_, w, n);
    const int64_t ld = panels_of<T>(n) * kPackedWidth<T>;
    multiply_panels<T>(rows_, ld, w, n, small_packed_, vectors_, w);
    pack_rows<T>(turned_, w, 0, rows_, ld, w, n);
    // x V^T, then x += (x V^T) U
    pack_transposed<T>(packed_, length, 0, xs, d_, length, count);
    multiply_panels<T>(product_, kReflectors, count, w, packed_, panel.by_depth.get(), length);
    pack_transposed<T>(product_packed_, w, 0, product_, kReflectors, w, count);
    multiply_panels<T>(xs + skip, d_, count, n, product_packed_, turned_, w, /*add=*/true);
  }

 private:
  int64_t d_;
  std::unique_ptr<T[]> room_;
  T *packed_, *vectors_, *turned_, *product_, *product_packed_, *rows_, *small_, *small_packed_;
};

} // namespace

template <typename T>
void householder_q(T* columns, T* q, int64_t d) {
  Reflections<T> reflections(d);
  std::vector<T> noise(d);
  for (int64_t k = 0; k < d; ++k) noise[k] = noise_of_column(largest_magnitude(columns + k * d, d), d);
  std::vector<Reflection<T>> panels;
  for (int64_t first = 0; first < d; first += kReflectors) {
    const int64_t count = std::min(kReflectors, d - first), after = first + count;
    panels.push_back(reflections.factor(columns, first, count, noise.data()));
    if (after < d) reflections.apply(panels.back(), columns, columns + after * d + first, d - after, /*back=*/false, count);
  }
  // q <- Q^T = (H_1 .. H_d I)^T, from the last panel to the first: only the entries to its right and below are not yet those of
  // the identity
  std::fill_n(q, d * d + kPackedWidth<T>, T(0));
  for (int64_t i = 0; i < d; ++i) q[i * d + i] = 1;
  for (auto panel = panels.rbegin(); panel != panels.rend(); ++panel)
    reflections.apply(*panel, columns, q + panel->first * d + panel->first, d - panel->first, /*back=*/true, 0);
  constexpr int64_t block = 16;
  for (int64_t i = 0; i < d; i += block)
    for (int64_t j = i; j < d; j += block)
      for (int64_t r = i; r < std::min(d, i + block); ++r)
        for (int64_t c = std::max(j, r + 1); c < std::min(d, j + block); ++c) std::swap(q[r * d + c], q[c * d + r]);
}
template void householder_q(float*, float*, int64_t);
template void householder_q(double*, double*, int64_t);

} // namespace soap_opt
