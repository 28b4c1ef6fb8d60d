// SPDX-License-Identifier: Apache-2.0
// The kernels alone, without torch around them: medians of forward, backward, the layer as one product (float32) and merge on one
// shape, all tensors in one dtype, and the share of a floor that is given. For profilers, and to tell what torch's side adds; built
// with the C++ tests.
//
// usage: kernel_times T N M r k [threads [dropout [GFLOP/s GB/s [float32|bfloat16]]]]      the floor: of a GEMM and a copy, say
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "gralora.h"

using namespace gralora;

namespace {

constexpr double kSeconds = 1.0;
constexpr int kCalls = 9;  // at least

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

template <class F>
double median_seconds(F&& call) {
  call();
  std::vector<double> times;
  const double start = now();
  while (int(times.size()) < kCalls || now() - start < kSeconds) {
    const double begin = now();
    call();
    times.push_back(now() - begin);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// Normal values, repeated: their kind does not matter to the kernels.
struct Values {
  Values(int64_t count, DType dtype)
      : data(static_cast<float*>(aligned_alloc(64, size_t(count * 4 + 63) / 64 * 64)), &free), dtype(dtype) {
    std::mt19937 generator(1);
    std::normal_distribution<float> normal(0.0f, 0.1f);
    float some[4096];
    for (float& value : some) value = normal(generator);
    for (int64_t i = 0; i < count; i++) {
      if (dtype == DType::f32)
        data.get()[i] = some[i % 4095];
      else  // the upper half is the value as bfloat16
        std::memcpy(reinterpret_cast<char*>(data.get()) + 2 * i, reinterpret_cast<const char*>(&some[i % 4095]) + 2, 2);
    }
  }
  std::unique_ptr<float, decltype(&free)> data;
  DType dtype;
};

Activation rows(const Values& values, int64_t T, int64_t width) {
  Activation rows;
  rows.data = values.data.get(), rows.dtype = values.dtype;
  rows.leading_dims = 1, rows.sizes[0] = T, rows.strides[0] = width;
  return rows;
}

Param param(const Values& values, int64_t rows, int64_t columns) {
  return {values.data.get(), values.dtype, rows * columns, columns, 1};
}

void print(const char* name, double seconds, double flops, double bytes, double peak, double bandwidth) {
  std::printf("%-18s %9.3f ms  %6.1f GFLOP/s", name, seconds * 1e3, flops / seconds * 1e-9);
  if (peak > 0.0) std::printf("  %.2f of the floor", std::max(flops / peak, bytes / bandwidth) / seconds);
  std::printf("\n");
}

}  // namespace

int main(int count, char** words) {
  if (count < 6) {
    std::fprintf(stderr, "usage: kernel_times T N M r k [threads [dropout [GFLOP/s GB/s [float32|bfloat16]]]]\n");
    return 2;
  }
  const int64_t T = atoll(words[1]), N = atoll(words[2]), M = atoll(words[3]), r = atoll(words[4]), k = atoll(words[5]);
  if (T < 1 || r < 1 || k < 1 || r % k || N < k || N % k || M < k || M % k) {
    std::fprintf(stderr, "kernel_times: T, N, M, r, k must be positive, and k must divide N, M and r\n");
    return 2;
  }
  const int threads = count > 6 ? atoi(words[6]) : 1;
  const double dropout = count > 7 ? atof(words[7]) : 0.0;
  const bool in_bfloat16 = count > 10 && std::strcmp(words[10], "bfloat16") == 0;
  if (count > 10 && !in_bfloat16 && std::strcmp(words[10], "float32") != 0) {
    std::fprintf(stderr, "kernel_times: the dtype must be float32 or bfloat16, but is %s\n", words[10]);
    return 2;
  }
  const DType dtype = in_bfloat16 ? DType::bf16 : DType::f32;
  const double peak = count > 9 ? atof(words[8]) * 1e9 : 0.0, bandwidth = count > 9 ? atof(words[9]) * 1e9 : 1.0;

  const int64_t seed = 1;
  const Values x(T * N, dtype), base(T * M, dtype), y(T * M, dtype), A(N * r, dtype), B(M * r, dtype);
  const Values g(T * M, dtype), dx(T * N, dtype), dA(N * r, dtype), dB(M * r, dtype), W(M * N, dtype);
  const Values u(T * k * r, DType::f32);
  const Adapter adapter{param(A, N / k, r), param(B, r, M / k), {}, {}};

  ForwardParams forward;
  forward.shape = {T, N, M, k, r, 0};
  forward.adapter = adapter;
  forward.x = rows(x, T, N), forward.base = rows(base, T, M), forward.y = rows(y, T, M);
  forward.u = u.data.get();
  forward.scaling = 0.5, forward.dropout = {dropout, &seed}, forward.threads = threads;
  ForwardParams in_place = forward;
  in_place.y = in_place.base;

  BackwardParams backward;
  backward.shape = forward.shape, backward.adapter = adapter;
  backward.grad_y = rows(g, T, M), backward.x = forward.x, backward.grad_x = rows(dx, T, N);
  backward.u = forward.u;
  backward.grad = {param(dA, N / k, r), param(dB, r, M / k), {}, {}};
  backward.scaling = 0.5, backward.dropout = forward.dropout, backward.threads = threads;

  MergeParams merge;
  merge.shape = forward.shape, merge.adapter = adapter;
  merge.weight = param(W, M, N);
  merge.scaling = 1e-6, merge.threads = threads;

  LinearParams linear;
  linear.shape = forward.shape, linear.adapter = adapter;
  linear.in = forward.x, linear.out = forward.y;
  linear.weight = merge.weight;
  linear.scaling = 0.5, linear.threads = threads;
  LinearParams linear_dx = linear;
  linear_dx.in = backward.grad_y, linear_dx.out = backward.grad_x, linear_dx.transposed = true;
  BackwardParams rest = backward;  // what is left of backward then, with U made again
  rest.grad_x = Activation{}, rest.u = nullptr;

  // The least work of each pass: see benchmarks/shapes.py.
  const double pass = 2.0 * double(r * (N + M) * T), dense = 2.0 * double(N * M * (r / k));
  const double bytes = in_bfloat16 ? 2.0 : 4.0;
  std::printf("T=%lld %lldx%lld r=%lld k=%lld, %d threads, %s\n", (long long)T, (long long)N, (long long)M,
              (long long)r, (long long)k, threads, in_bfloat16 ? "bfloat16" : "float32");
  print("forward", median_seconds([&] { cpu::forward(forward); }), pass, bytes * double(T * (N + 2 * M)), peak,
        bandwidth);
  print("forward, in place", median_seconds([&] { cpu::forward(in_place); }), pass, bytes * double(T * (N + 2 * M)),
        peak, bandwidth);
  print("backward", median_seconds([&] { cpu::backward(backward); }), 2 * pass, bytes * double(T * (M + 3 * N)), peak,
        bandwidth);
  print("merge", median_seconds([&] { cpu::merge(merge); }), dense, 2.0 * bytes * double(N * M), peak, bandwidth);
  if (in_bfloat16) return 0;
  const double product = 2.0 * double(N * M * T) + dense, read_weight = 4.0 * double(N * M);
  print("linear", median_seconds([&] { cpu::linear(linear); }), product, read_weight + 4.0 * double(T * (N + M)), peak,
        bandwidth);
  print("linear, dx", median_seconds([&] { cpu::linear(linear_dx); }), product, read_weight + 4.0 * double(T * (N + M)),
        peak, bandwidth);
  print("linear, dA and dB", median_seconds([&] { cpu::backward(rest); }), 2 * pass, 4.0 * double(T * (M + N)), peak,
        bandwidth);
  return 0;
}
