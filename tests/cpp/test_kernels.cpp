// SPDX-License-Identifier: Apache-2.0
// The kernels against the formulas of gralora.h written as plain loops in double, for a grid of small shapes.
#include <cmath>
#include <random>
#include <vector>

#include "check.h"
#include "gralora.h"
#include "guarded.h"

using namespace gralora;

namespace {

using Vector = std::vector<float, GuardedAllocator<float>>;

struct Case {
  int64_t T, N, M, k, r, h;
};

constexpr Case kCases[] = {{1, 4, 4, 1, 1, 0},      {5, 12, 20, 2, 4, 0},      {7, 33, 66, 3, 6, 2},
                           {40, 64, 48, 8, 8, 0},   {130, 70, 90, 5, 10, 3},   {3, 520, 8, 4, 32, 16},
                           {200, 96, 64, 2, 16, 0}, {260, 576, 128, 1, 64, 5}, {61, 270, 576, 2, 12, 0},
                           {2, 39, 51, 3, 9, 5},    {4, 70, 110, 2, 10, 7},    {1, 600, 76, 2, 72, 35},
                           {600, 64, 64, 2, 64, 0}, {1100, 96, 96, 8, 8, 3}};
// With three and eight, threads share tokens, blocks and chunks, in one and in several waves of segments.
constexpr int kThreads[] = {3, 8};
constexpr double kScaling = 0.75;
constexpr double kTolerance = 1e-5;  // float sums of up to 520 products of standard normals, relative in norm

std::mt19937 generator(7);

Vector random_vector(int64_t count) {
  std::normal_distribution<float> normal;
  Vector values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

double relative_error(const Vector& got, const std::vector<double>& want) {
  double difference = 0.0, norm = 0.0;
  for (size_t i = 0; i < want.size(); i++) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return std::sqrt(difference / norm);
}

Activation rows(Vector& values, int64_t T, int64_t width) {
  Activation rows;
  rows.data = values.data();
  rows.leading_dims = 1;
  rows.sizes[0] = T;
  rows.strides[0] = width;
  return rows;
}

Param param(Vector& values, int64_t rows, int64_t columns) {
  return {values.data(), DType::f32, rows * columns, columns, 1};
}

// An adapter of random values, and its dense form dW [M, N] (without the scaling) by the formula of merge.
struct Fixture {
  Case c;
  Vector A, B, A_general, B_general;
  std::vector<double> dense;

  explicit Fixture(const Case& shape)
      : c(shape),
        A(random_vector(c.N * c.r)),
        B(random_vector(c.r * c.M)),
        A_general(random_vector(c.h * c.N)),
        B_general(random_vector(c.M * c.h)),
        dense(c.M * c.N, 0.0) {
    const int64_t rb = c.r / c.k, n_width = c.N / c.k, m_width = c.M / c.k;
    for (int64_t row = 0; row < c.M; row++) {
      for (int64_t column = 0; column < c.N; column++) {
        const int64_t j = row / m_width, o = row % m_width, n = column / n_width;
        double& sum = dense[row * c.N + column];
        for (int64_t q = 0; q < rb; q++) {
          sum += double(A[column * c.r + j * rb + q]) * B[(j * c.r + n * rb + q) * m_width + o];
        }
        for (int64_t g = 0; g < c.h; g++) sum += double(B_general[row * c.h + g]) * A_general[g * c.N + column];
      }
    }
  }

  Shape shape() const { return {c.T, c.N, c.M, c.k, c.r, c.h}; }

  Adapter adapter() {
    Adapter adapter{param(A, c.N / c.k, c.r), param(B, c.r, c.M / c.k), {}, {}};
    if (c.h > 0) adapter.A_general = param(A_general, c.h, c.N), adapter.B_general = param(B_general, c.M, c.h);
    return adapter;
  }
};

Vector run_forward(Fixture& f, Vector& x, Vector& base, Vector& u, int threads) {
  Vector y(base.size());
  ForwardParams p;
  p.shape = f.shape();
  p.adapter = f.adapter();
  p.x = rows(x, f.c.T, f.c.N);
  p.base = rows(base, f.c.T, f.c.M);
  p.y = rows(y, f.c.T, f.c.M);
  p.u = u.data();
  p.scaling = kScaling;
  p.threads = threads;
  cpu::forward(p);
  return y;
}

void test_forward_is_the_dense_product(const Case& c) {
  Fixture f(c);
  Vector x = random_vector(c.T * c.N), base = random_vector(c.T * c.M), u(c.T * (c.k * c.r + c.h));
  std::vector<double> want(base.begin(), base.end());
  for (int64_t t = 0; t < c.T; t++) {
    for (int64_t m = 0; m < c.M; m++) {
      for (int64_t n = 0; n < c.N; n++) want[t * c.M + m] += kScaling * f.dense[m * c.N + n] * x[t * c.N + n];
    }
  }
  const Vector y = run_forward(f, x, base, u, 1);
  EXPECT(relative_error(y, want) < kTolerance);
  for (const int threads : kThreads) EXPECT(run_forward(f, x, base, u, threads) == y);
}

struct Gradients {
  Vector dx, dA, dB, dA_general, dB_general;
  bool operator==(const Gradients& other) const {
    return dx == other.dx && dA == other.dA && dB == other.dB && dA_general == other.dA_general &&
           dB_general == other.dB_general;
  }
};

Gradients run_backward(Fixture& f, Vector& grad, Vector& x, Vector& u, int threads) {
  const Case& c = f.c;
  Gradients g{Vector(x.size()), Vector(f.A.size()), Vector(f.B.size()), Vector(f.A_general.size()),
              Vector(f.B_general.size())};
  BackwardParams p;
  p.shape = f.shape();
  p.adapter = f.adapter();
  p.grad_y = rows(grad, c.T, c.M);
  p.x = rows(x, c.T, c.N);
  p.grad_x = rows(g.dx, c.T, c.N);
  p.grad = {param(g.dA, c.N / c.k, c.r), param(g.dB, c.r, c.M / c.k), {}, {}};
  if (c.h > 0) p.grad.A_general = param(g.dA_general, c.h, c.N), p.grad.B_general = param(g.dB_general, c.M, c.h);
  p.u = u.data();
  p.scaling = kScaling;
  p.threads = threads;
  cpu::backward(p);
  return g;
}

// dB_j = s U_j^T g_j, by the u that forward left
std::vector<double> gradient_of_B(const Case& c, const Vector& grad, const Vector& u) {
  const int64_t width = c.M / c.k, row = c.k * c.r + c.h;
  std::vector<double> want(c.r * c.M, 0.0);
  for (int64_t t = 0; t < c.T; t++)
    for (int64_t j = 0; j < c.k; j++)
      for (int64_t q = 0; q < c.r; q++)
        for (int64_t o = 0; o < width; o++)
          want[(j * c.r + q) * width + o] +=
              kScaling * double(u[t * row + j * c.r + q]) * grad[t * c.M + j * width + o];
  return want;
}

void test_backward_is_the_transposed_product(const Case& c) {
  Fixture f(c);
  Vector x = random_vector(c.T * c.N), base = random_vector(c.T * c.M), u(c.T * (c.k * c.r + c.h));
  run_forward(f, x, base, u, 1);
  Vector grad = random_vector(c.T * c.M);
  std::vector<double> want(x.size(), 0.0);
  for (int64_t t = 0; t < c.T; t++) {
    for (int64_t m = 0; m < c.M; m++) {
      for (int64_t n = 0; n < c.N; n++) want[t * c.N + n] += kScaling * f.dense[m * c.N + n] * grad[t * c.M + m];
    }
  }
  const Gradients got = run_backward(f, grad, x, u, 1);
  EXPECT(relative_error(got.dx, want) < kTolerance);
  EXPECT(relative_error(got.dB, gradient_of_B(c, grad, u)) < kTolerance);
  for (const int threads : kThreads) EXPECT(run_backward(f, grad, x, u, threads) == got);
}

void test_merge_adds_the_dense_weight(const Case& c) {
  Fixture f(c);
  Vector weight = random_vector(c.M * c.N);
  std::vector<double> want(weight.begin(), weight.end());
  for (size_t i = 0; i < want.size(); i++) want[i] += kScaling * f.dense[i];
  MergeParams p;
  p.shape = f.shape();
  p.adapter = f.adapter();
  p.weight = param(weight, c.M, c.N);
  p.scaling = kScaling;
  cpu::merge(p);
  EXPECT(relative_error(weight, want) < kTolerance);
}

Vector run_linear(Fixture& f, Vector& in, Vector& weight, Vector* bias, bool transposed, int threads) {
  const int64_t columns = transposed ? f.c.N : f.c.M;
  Vector out(f.c.T * columns);
  LinearParams p;
  p.shape = f.shape();
  p.adapter = f.adapter();
  p.in = rows(in, f.c.T, transposed ? f.c.M : f.c.N);
  p.out = rows(out, f.c.T, columns);
  p.weight = param(weight, f.c.M, f.c.N);
  p.bias = bias == nullptr ? nullptr : bias->data();
  p.transposed = transposed;
  p.scaling = kScaling;
  p.threads = threads;
  cpu::linear(p);
  return out;
}

void test_linear_multiplies_by_the_merged_weight(const Case& c) {
  Fixture f(c);
  Vector x = random_vector(c.T * c.N), g = random_vector(c.T * c.M), weight = random_vector(c.M * c.N),
         bias = random_vector(c.M);
  std::vector<double> y(c.T * c.M), dx(c.T * c.N, 0.0);
  for (int64_t t = 0; t < c.T; t++) {
    for (int64_t m = 0; m < c.M; m++) {
      double& sum = y[t * c.M + m];
      sum = bias[m];
      for (int64_t n = 0; n < c.N; n++) {
        const double merged = weight[m * c.N + n] + kScaling * f.dense[m * c.N + n];
        sum += merged * x[t * c.N + n], dx[t * c.N + n] += merged * g[t * c.M + m];
      }
    }
  }
  const Vector got_y = run_linear(f, x, weight, &bias, false, 1), got_dx = run_linear(f, g, weight, nullptr, true, 1);
  EXPECT(relative_error(got_y, y) < kTolerance);
  EXPECT(relative_error(got_dx, dx) < kTolerance);
  EXPECT(run_linear(f, x, weight, &bias, false, 3) == got_y);
  EXPECT(run_linear(f, g, weight, nullptr, true, 3) == got_dx);
}

}  // namespace

int main() {
  for (const Case& c : kCases) {
    test_forward_is_the_dense_product(c);
    test_backward_is_the_transposed_product(c);
    test_merge_adds_the_dense_weight(c);
    test_linear_multiplies_by_the_merged_weight(c);
  }
  return check::result();
}
