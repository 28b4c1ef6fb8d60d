// SPDX-License-Identifier: Apache-2.0
// The kernels on activations in bfloat16, with parameters in bfloat16 or float, beside the same values in float, each array at the edge
// of its memory.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "check.h"
#include "gralora.h"
#include "guarded.h"

using namespace gralora;

namespace {

template <class T>
using Array = std::vector<T, GuardedAllocator<T>>;
using Floats = Array<float>;

// As in gralora_ext/tolerances.py: of a result that is rounded to bfloat16, of one whose ranks are too, and of gradients in float
constexpr double kRounded = 4e-3, kRoundedRanks = 5e-3, kFloat = 2.5e-6;
constexpr size_t kMany = 128;  // elements; a few may be rounded in one direction
constexpr double kFew = 8e-3;

// Even and odd numbers of tokens, widths and ranks, with and without the hybrid part
constexpr Shape kShapes[] = {{64, 4, 4, 1, 2, 0},     {97, 12, 20, 2, 4, 2},     {130, 70, 90, 5, 10, 3},
                             {200, 96, 64, 2, 16, 0}, {261, 576, 128, 1, 64, 6}, {70, 270, 1128, 2, 24, 0},
                             {5, 64, 48, 8, 8, 0},    {1, 36, 68, 2, 4, 0},      {600, 64, 64, 2, 64, 0}};

uint16_t upper_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t(bits >> 16);
}
float to_float(uint16_t half) {
  const uint32_t bits = uint32_t(half) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

std::mt19937 generator(7);

// Normal values that bfloat16 holds
Floats random_floats(int64_t count) {
  std::normal_distribution<float> normal;
  Floats values(count);
  for (float& value : values) value = to_float(upper_half(normal(generator)));
  return values;
}

void copy(const Floats& from, Array<float>& to) { to = from; }
void copy(const Floats& from, Array<uint16_t>& to) {
  to.resize(from.size());
  for (size_t i = 0; i < from.size(); i++) to[i] = upper_half(from[i]);
}

constexpr DType dtype_of(float) { return DType::f32; }
constexpr DType dtype_of(uint16_t) { return DType::bf16; }

template <class T>
Activation rows(Array<T>& values, int64_t count, int64_t width) {
  Activation rows;
  rows.data = values.data(), rows.dtype = dtype_of(T());
  rows.leading_dims = 1, rows.sizes[0] = count, rows.strides[0] = width;
  return rows;
}

struct Inputs {
  Floats x, base, grad, A, B, A_general, B_general;
};

// Activations are of type T, parameters of P.
template <class T, class P>
struct Results {
  Array<T> y, dx;
  Array<P> dA, dB, dA_general, dB_general;
  bool operator==(const Results& o) const {
    return y == o.y && dx == o.dx && dA == o.dA && dB == o.dB && dA_general == o.dA_general &&
           dB_general == o.dB_general;
  }
};

template <class P>
Adapter adapter(const Shape& s, Array<P>& A, Array<P>& B, Array<P>& A_general, Array<P>& B_general) {
  const auto param = [](Array<P>& values, int64_t rows, int64_t columns) {
    return Param{values.data(), dtype_of(P()), rows * columns, columns, 1};
  };
  Adapter adapter{param(A, s.N / s.k, s.r), param(B, s.r, s.M / s.k), {}, {}};
  if (s.h > 0) adapter.A_general = param(A_general, s.h, s.N), adapter.B_general = param(B_general, s.M, s.h);
  return adapter;
}

template <class T, class P = T>
Results<T, P> run(const Shape& s, const Inputs& inputs, int threads, bool u_again = false, double dropout_p = 0.0) {
  static constexpr int64_t kSeed = 5;
  constexpr bool u_bf16 = dtype_of(T()) == DType::bf16 && dtype_of(P()) == DType::bf16;
  using U = std::conditional_t<u_bf16, uint16_t, float>;
  Array<T> x, grad;
  Array<P> A, B, A_general, B_general;
  copy(inputs.x, x), copy(inputs.grad, grad), copy(inputs.A, A), copy(inputs.B, B);
  copy(inputs.A_general, A_general), copy(inputs.B_general, B_general);
  Results<T, P> results{{},
                        Array<T>(x.size()),
                        Array<P>(A.size()),
                        Array<P>(B.size()),
                        Array<P>(A_general.size()),
                        Array<P>(B_general.size())};
  copy(inputs.base, results.y);
  Array<U> u(s.T * (s.k * s.r + s.h));

  ForwardParams forward;
  forward.shape = s;
  forward.adapter = adapter(s, A, B, A_general, B_general);
  forward.x = rows(x, s.T, s.N), forward.base = forward.y = rows(results.y, s.T, s.M);
  forward.u = u.data(), forward.u_bf16 = u_bf16;
  forward.scaling = 0.75, forward.threads = threads, forward.dropout.p = dropout_p, forward.dropout.seed = &kSeed;
  cpu::forward(forward);

  BackwardParams backward;
  backward.shape = s, backward.adapter = forward.adapter;
  backward.grad_y = rows(grad, s.T, s.M), backward.x = forward.x, backward.grad_x = rows(results.dx, s.T, s.N);
  backward.grad = adapter(s, results.dA, results.dB, results.dA_general, results.dB_general);
  backward.u = u_again ? nullptr : u.data(), backward.u_bf16 = forward.u_bf16;
  backward.scaling = 0.75, backward.threads = threads, backward.dropout = forward.dropout;
  cpu::backward(backward);
  return results;
}

double value(uint16_t number) { return to_float(number); }
double value(float number) { return number; }

template <class T>
bool near(const Array<T>& got, const Floats& want, double tolerance) {
  double difference = 0.0, norm = 0.0;
  for (size_t i = 0; i < want.size(); i++) {
    difference += std::pow(value(got[i]) - want[i], 2);
    norm += std::pow(double(want[i]), 2);
  }
  return std::sqrt(difference) <= tolerance * std::sqrt(norm);
}

template <class T>
void expect_near(const Array<T>& got, const Floats& want, double rounded) {
  const double few = want.size() < kMany ? kFew : rounded;
  EXPECT(near(got, want, dtype_of(T()) == DType::f32 ? kFloat : few));
}

template <class P>
void expect_near(const Results<uint16_t, P>& got, const Results<float, float>& want) {
  constexpr double kOf = dtype_of(P()) == DType::bf16 ? kRoundedRanks : kRounded;
  expect_near(got.y, want.y, kOf), expect_near(got.dx, want.dx, kOf);
  expect_near(got.dA, want.dA, kOf), expect_near(got.dB, want.dB, kOf);
  expect_near(got.dA_general, want.dA_general, kOf), expect_near(got.dB_general, want.dB_general, kOf);
}

template <class Make>
Inputs inputs_by(const Shape& s, Make&& make) {
  return {make(s.T * s.N), make(s.T * s.M), make(s.T * s.M), make(s.N * s.r),
          make(s.r * s.M), make(s.h * s.N), make(s.M * s.h)};
}

template <class P>
void test_bfloat16_is_near_float(const Shape& s, const Inputs& inputs) {
  const Results<float, float> want = run<float>(s, inputs, 1);
  const Results<uint16_t, P> got = run<uint16_t, P>(s, inputs, 1);
  expect_near(got, want);
  for (const int threads : {3, 8}) EXPECT((run<uint16_t, P>(s, inputs, threads) == got));
  constexpr bool all_bfloat16 = dtype_of(P()) == DType::bf16;
  // U made again; fewer tokens are summed in another order, and U of bfloat16 is always kept
  if (s.T > 4) EXPECT(run<float>(s, inputs, 2, true) == want);
  if (s.T > 4 && !all_bfloat16) EXPECT((run<uint16_t, P>(s, inputs, 2, true) == got));
  const Results<uint16_t, P> dropped = run<uint16_t, P>(s, inputs, 1, false, 0.25);
  expect_near(dropped, run<float>(s, inputs, 1, false, 0.25));
  EXPECT((run<uint16_t, P>(s, inputs, 2, false, 0.25) == dropped));
  if (s.T > 4 && !all_bfloat16) EXPECT((run<uint16_t, P>(s, inputs, 3, true, 0.25) == dropped));
  // Scratch is kept from call to call: nothing that another one left there counts.
  run<uint16_t, P>(s, inputs_by(s, [](int64_t count) { return Floats(count, NAN); }), 2);
  EXPECT((run<uint16_t, P>(s, inputs, 2) == got));
}

}  // namespace

int main() {
  for (const Shape& s : kShapes) {
    Inputs inputs = inputs_by(s, random_floats);
    test_bfloat16_is_near_float<uint16_t>(s, inputs);
    for (Floats* parameter : {&inputs.A, &inputs.B, &inputs.A_general, &inputs.B_general})
      for (float& number : *parameter) number *= 1.0f + 0x1p-23f * float(generator() % 65536);  // no longer bfloat16
    test_bfloat16_is_near_float<float>(s, inputs);
  }
  return check::result();
}
