// SPDX-License-Identifier: Apache-2.0
// Runs the kernels once in a process of its own, as the sanitizers need it. Each buffer is a heap block of its exact size.
// Arguments: T N M k r h, dtypes of x and adapter, splits of columns (0: chosen; 2: u is made again) and tokens, dropout in per cent, order, seed, copies.
// Exits with 0, 2 (wrong arguments), 3 (a launch failed) or 4 (a result is not finite).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "calls.h"
#include "intrinsics.cuh"

namespace {

// Values of one of the dtypes; NaN where nothing is given.
struct Values {
  Values(int64_t count, int64_t dtype, float deviation = NAN) : count(count), dtype(dtype) {
    bytes.reset(new char[size_t(count) * (dtype == 0 ? 4 : 2)]);
    std::mt19937 generator(static_cast<unsigned>(count));
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < count; i++) set(i, std::isnan(deviation) ? NAN : deviation * normal(generator));
  }
  void set(int64_t i, float value) {
    if (dtype == 0) reinterpret_cast<float*>(bytes.get())[i] = value;
    if (dtype == 1) reinterpret_cast<__nv_bfloat16*>(bytes.get())[i] = __float2bfloat16(value);
    if (dtype == 2) reinterpret_cast<__half*>(bytes.get())[i] = __float2half(value);
  }
  float get(int64_t i) const {
    if (dtype == 0) return reinterpret_cast<const float*>(bytes.get())[i];
    if (dtype == 1) return __bfloat162float(reinterpret_cast<const __nv_bfloat16*>(bytes.get())[i]);
    return __half2float(reinterpret_cast<const __half*>(bytes.get())[i]);
  }
  bool finite() const {
    for (int64_t i = 0; i < count; i++)
      if (!std::isfinite(get(i))) return false;
    return true;
  }
  operator void*() const { return bytes.get(); }
  operator float*() const { return reinterpret_cast<float*>(bytes.get()); }

  int64_t count, dtype;
  std::unique_ptr<char[]> bytes;
};

int failed() {
  fprintf(stderr, "%s\n", gralora_emulator_error());
  return 3;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 15) return 2;
  const auto number = [&](int i) { return strtoll(argv[i], nullptr, 10); };
  Call c{};
  c.T = number(1), c.N = number(2), c.M = number(3), c.k = number(4), c.r = number(5), c.h = number(6);
  c.x_dtype = c.base_dtype = number(7), c.adapter_dtype = number(8);
  c.x_row = c.dx_row = c.N, c.base_row = c.y_row = c.grad_row = c.M, c.weight_row = c.N, c.weight_column = 1;
  c.needs = 31, c.keep_u = number(9) != 2, c.column_splits = number(9), c.token_splits = number(10);
  c.seed = 77, c.scaling = 0.75, c.dropout = double(number(11)) / 100.0;
  if (gralora_emulator_configure(int(number(12)), uint64_t(number(13)), int(number(14))) != 0) return failed();
  const Values x(c.T * c.N, c.x_dtype, 1.0f), base(c.T * c.M, c.x_dtype, 1.0f), grad(c.T * c.M, c.x_dtype, 1.0f);
  const Values A(c.N * c.r, c.adapter_dtype, 0.1f), B(c.M * c.r, c.adapter_dtype, 0.1f);
  const Values A_general(c.h * c.N, c.adapter_dtype, 0.1f), B_general(c.M * c.h, c.adapter_dtype, 0.1f);
  const Values y(c.T * c.M, c.x_dtype), u(c.T * (c.k * c.r + c.h), 0);
  const Values forward_workspace(test_workspace(&c, 0) / 4, 0), backward_workspace(test_workspace(&c, 1) / 4, 0);
  if (test_forward(&c, x, base, y, A, B, A_general, B_general, u, forward_workspace) != 0) return failed();

  const Values dx(c.T * c.N, c.x_dtype), dA(c.N * c.r, c.adapter_dtype), dB(c.M * c.r, c.adapter_dtype);
  const Values dA_general(c.h * c.N, c.adapter_dtype), dB_general(c.M * c.h, c.adapter_dtype);
  if (test_backward(&c, x, grad, u, A, B, A_general, B_general, dx, dA, dB, dA_general, dB_general,
                    backward_workspace) != 0)
    return failed();

  const Values weight(c.M * c.N, c.x_dtype, 1.0f);
  if (test_merge(&c, weight, A, B, A_general, B_general) != 0) return failed();
  for (const Values* result : {&y, &dx, &dA, &dB, &dA_general, &dB_general, &weight})
    if (!result->finite()) {
      fprintf(stderr, "a result is not finite\n");
      return 4;
    }
  return 0;
}
