// Runs the CUDA refresh's kernels on fibers: refresh_harness INPUT OUTPUT [seed=..] [skip=place] [limit=bytes] [tolerance=..]
//
// INPUT: for every matrix int64 d, int64 due, then G [d, d] and Q [d, d] float32. OUTPUT: for every matrix int64 outcome, the
// order [d] int64, Q' [d, d] and the rotation [d, d]. Matrices beyond the shared memory take factor_panel and plain loops
// here (on the GPU, ATen's products; tests/csrc/operator_on_fibers.cpp runs that code).

#include "fibers.h"

#include "../../csrc/cuda/refresh_basis.cu"

#include <cstdlib>
#include <fstream>
#include <iostream>

using namespace soap_opt::cuda;

namespace {

struct Problem {
  int64_t size = 0, due = 1;
  // malloc'ed one by one: AddressSanitizer sees an access beyond any of them
  std::vector<float> gram, basis, rotation;
  std::vector<int64_t> order;
};

// c [m, n] += alpha a [m, k] b [k, n], by rows
void multiply(float* c, const float* a, const float* b, int m, int n, int k, float alpha, int ldc, int lda, int ldb) {
  for (int i = 0; i < m; ++i)
    for (int l = 0; l < k; ++l) {
      const float factor = alpha * a[int64_t(i) * lda + l];
      for (int j = 0; j < n; ++j) c[int64_t(i) * ldc + j] += factor * b[int64_t(l) * ldb + j];
    }
}

std::vector<float> transposed(const float* x, int rows, int columns, int pitch) {
  std::vector<float> result(int64_t(rows) * columns);
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < columns; ++j) result[int64_t(j) * rows + i] = x[int64_t(i) * pitch + j];
  return result;
}

// Q' of the columns of P in their own order: the same blocks as refresh_basis_host.cpp, without its products.
void refresh_in_panels(Problem& problem) {
  const int d = problem.size;
  std::vector<float> product(d * d, 0.0f), estimates(d, 0.0f);
  float most = 0;
  for (float entry : problem.gram) most = std::max(most, std::fabs(entry));
  multiply(product.data(), problem.gram.data(), problem.basis.data(), d, d, d, power_of_two_scale(most), d, d, d);
  for (int i = 0; i < d; ++i)
    for (int j = 0; j < d; ++j) estimates[j] += problem.basis[i * d + j] * product[i * d + j];
  std::iota(problem.order.begin(), problem.order.end(), 0);
  std::stable_sort(problem.order.begin(), problem.order.end(), [&](int a, int b) { return estimates[a] > estimates[b]; });
  std::vector<float> a(d * d); // [d, d], row j = column j of the matrix
  for (int j = 0; j < d; ++j)
    for (int i = 0; i < d; ++i) a[j * d + i] = product[i * d + problem.order[j]];

  const int panels = (d + kLargePanel - 1) / kLargePanel;
  std::vector<std::vector<float>> triangles(panels, std::vector<float>(kLargePanel * kLargePanel));
  const int32_t outcome = kRefreshed;
  // rows [n, m] of x <- rows (I - V T V^T)^(T), V^T = rows [width, m] of a
  const auto apply = [&](float* x, int n, int first, int width, const float* triangle, bool transpose) {
    const int m = d - first;
    const float* v = a.data() + first * d + first; // [width, m]
    const std::vector<float> upright = transposed(v, width, m, d);
    std::vector<float> w(n * width, 0.0f), turned(n * width, 0.0f);
    multiply(w.data(), x + first, upright.data(), n, width, m, 1, width, d, width);
    const std::vector<float> flipped = transposed(triangle, width, width, kLargePanel);
    multiply(turned.data(), w.data(), transpose ? triangle : flipped.data(), n, width, width, 1, width, width,
             transpose ? kLargePanel : width);
    multiply(x + first, turned.data(), v, n, m, width, -1, d, width, d);
  };
  for (int p = 0; p < panels; ++p) {
    const int first = p * kLargePanel, width = std::min(kLargePanel, d - first), behind = first + width;
    factor_panel(a.data(), triangles[p].data(), 1, d, first, width, &outcome, nullptr);
    apply(a.data() + behind * d, d - behind, first, width, triangles[p].data(), true);
  }
  std::vector<float> q(d * d, 0.0f);
  for (int j = 0; j < d; ++j) q[j * d + j] = 1;
  for (int p = panels - 1; p >= 0; --p) {
    const int first = p * kLargePanel, width = std::min(kLargePanel, d - first);
    apply(q.data() + first * d, d - first, first, width, triangles[p].data(), false);
  }
  const std::vector<float> upright = transposed(q.data(), d, d, d), old = transposed(problem.basis.data(), d, d, d);
  std::fill(problem.rotation.begin(), problem.rotation.end(), 0.0f);
  multiply(problem.rotation.data(), old.data(), upright.data(), d, d, d, 1, d, d, d);
  problem.basis = upright;
}

template <typename T>
void read(std::istream& file, T* data, int64_t count) {
  file.read(reinterpret_cast<char*>(data), count * sizeof(T));
}
template <typename T>
void write(std::ostream& file, const T* data, int64_t count) {
  file.write(reinterpret_cast<const char*>(data), count * sizeof(T));
}

} // namespace

int main(int argc, char** argv) try {
  if (argc < 3) throw std::runtime_error("usage: refresh_harness INPUT OUTPUT [seed=] [skip=] [limit=] [tolerance=]");
  float tolerance = -1;
  for (int i = 3; i < argc; ++i) {
    const std::string argument = argv[i], name = argument.substr(0, argument.find('='));
    const char* value = argv[i] + name.size() + 1;
    if (name == "seed") fibers::options().seed = strtoull(value, nullptr, 10);
    else if (name == "skip") fibers::options().skipped_place = atoi(value);
    else if (name == "limit") fibers::options().shared_limit = atoi(value);
    else if (name == "tolerance") tolerance = strtof(value, nullptr);
    else throw std::runtime_error("unknown argument " + argument);
  }
  std::ifstream input(argv[1], std::ios::binary);
  std::vector<Problem> problems;
  for (Problem problem; read(input, &problem.size, 1), input;) {
    const int64_t d = problem.size;
    read(input, &problem.due, 1);
    problem.gram.resize(d * d);
    problem.basis.resize(d * d);
    read(input, problem.gram.data(), d * d);
    read(input, problem.basis.data(), d * d);
    problem.rotation.assign(d * d, NAN);
    problem.order.assign(d, -1);
    problems.push_back(problem);
  }
  const int count = problems.size();
  std::unique_ptr<bool[]> due(new bool[count]);
  std::vector<int32_t> outcomes(count, -1);
  std::vector<Matrix> small, medium;
  for (int i = 0; i < count; ++i) {
    Problem& problem = problems[i];
    due[i] = problem.due != 0;
    const Matrix row{problem.gram.data(), problem.basis.data(), problem.rotation.data(), problem.order.data(),
                     int32_t(problem.size), i};
    if (problem.size <= kWarpLimit) {
      small.push_back(row);
    } else if (fits_in_block(problem.size, shared_memory_limit())) {
      medium.push_back(row);
    } else {
      refresh_in_panels(problem);
      outcomes[i] = kRefreshed;
    }
  }
  if (!small.empty()) refresh_in_warps(small.data(), small.size(), due.get(), tolerance, outcomes.data(), nullptr);
  if (!medium.empty()) {
    std::stable_sort(medium.begin(), medium.end(), [](const Matrix& a, const Matrix& b) { return a.size > b.size; });
    // Full of what must not be read: NaNs, or under every other seed what a maximum would not pass over
    std::vector<float> workspace(block_workspace(medium.data(), medium.size()), fibers::options().seed % 2 ? NAN : 1e30f);
    refresh_in_blocks(medium.data(), medium.size(), due.get(), tolerance, outcomes.data(), workspace.data(), nullptr);
  }
  std::ofstream output(argv[2], std::ios::binary);
  for (int i = 0; i < count; ++i) {
    const int64_t outcome = outcomes[i], d = problems[i].size;
    write(output, &outcome, 1);
    write(output, problems[i].order.data(), d);
    write(output, problems[i].basis.data(), d * d);
    write(output, problems[i].rotation.data(), d * d);
  }
  std::cout << "launches " << fibers::counts().launches << " switches " << fibers::counts().switches << " barriers "
            << fibers::counts().barriers << "\n";
} catch (const std::exception& error) {
  std::cerr << error.what() << "\n";
  return 3;
}
