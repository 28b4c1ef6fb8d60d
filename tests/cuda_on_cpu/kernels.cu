// See calls.h.
#include "calls.h"

#include "launch.cuh"

using namespace gralora;

namespace {

Rows rows(const void* data, int64_t T, int64_t width) {
  Rows to;
  to.data = const_cast<void*>(data), to.leading_dims = 1, to.sizes[0] = T, to.strides[0] = width;
  return to;
}

Param param(const void* data, int64_t rows, int64_t columns) {
  Param to;
  to.data = const_cast<void*>(data), to.block_stride = rows * columns, to.row_stride = columns, to.column_stride = 1;
  return to;
}

// A, B, A_general, B_general as PEFT stores them; the last two may be null.
Adapter adapter(const Call& c, const void* const (&data)[4]) {
  Adapter to{param(data[0], c.N / c.k, c.r), param(data[1], c.r, c.M / c.k), {}, {}};
  if (c.h > 0) to.A_general = param(data[2], c.h, c.N), to.B_general = param(data[3], c.M, c.h);
  return to;
}

template <class F>
int for_dtypes(const Call& c, F&& f) {
  using cuda::bf16;
  const int64_t both = c.x_dtype * 3 + c.adapter_dtype;
  if (both == 0) return int(f(float{}, float{}));
  if (both == 3) return int(f(bf16{}, float{}));
  if (both == 4) return int(f(bf16{}, bf16{}));
  if (both == 6) return int(f(__half{}, float{}));
  if (both == 8) return int(f(__half{}, __half{}));
  return int(cudaErrorInvalidValue);
}

__global__ void mask_kernel(cuda::Mask mask, int64_t t, int64_t column, uint8_t* kept) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  kept[i] = uint8_t(mask.kept(t, column + 8 * i));
}

}  // namespace

int test_mask(const int64_t* seed, int64_t threshold, int64_t width, int64_t t, int64_t column, uint8_t* kept,
              int count) {
  const cuda::Mask mask{seed, uint32_t(threshold), width};
  return int(cuda::launch("mask", mask_kernel, dim3(unsigned(count)), dim3(1), 0, nullptr, mask, t, column, kept));
}

int test_forward(const Call* c, const void* x, const void* base, void* y, const void* A, const void* B,
                 const void* A_general, const void* B_general, float* u, float* partial) {
  ForwardParams p;
  p.shape = {c->T, c->N, c->M, c->k, c->r, c->h};
  p.adapter = adapter(*c, {A, B, A_general, B_general});
  p.x = rows(x, c->T, c->N), p.base = rows(base, c->T, c->M), p.y = rows(y, c->T, c->M);
  p.u = u, p.scaling = c->scaling, p.dropout = {c->dropout, &c->seed};
  return for_dtypes(*c, [&](auto X, auto P) {
    return cuda::forward<decltype(X), decltype(P)>(p, partial, int(c->column_splits), nullptr);
  });
}

int test_backward(const Call* c, const void* x, const void* grad_y, const float* u, const void* A, const void* B,
                  const void* A_general, const void* B_general, void* dx, void* dA, void* dB, void* dA_general,
                  void* dB_general, float* partial, float* dH, float* sums) {
  BackwardParams p;
  p.shape = {c->T, c->N, c->M, c->k, c->r, c->h};
  p.adapter = adapter(*c, {A, B, A_general, B_general}), p.grad = adapter(*c, {dA, dB, dA_general, dB_general});
  p.x = rows(x, c->T, c->N), p.grad_y = rows(grad_y, c->T, c->M), p.grad_x = rows(dx, c->T, c->N);
  p.u = u, p.scaling = c->scaling, p.dropout = {c->dropout, &c->seed};
  return for_dtypes(*c, [&](auto X, auto P) {
    return cuda::backward<decltype(X), decltype(P)>(p, partial, dH, sums, int(c->column_splits), int(c->token_splits),
                                                    nullptr);
  });
}

int test_merge(const Call* c, void* weight, const void* A, const void* B, const void* A_general,
               const void* B_general) {
  MergeParams p;
  p.shape = {0, c->N, c->M, c->k, c->r, c->h};
  p.adapter = adapter(*c, {A, B, A_general, B_general});
  p.weight = param(weight, c->M, c->N), p.scaling = c->scaling;
  return for_dtypes(*c, [&](auto W, auto P) { return cuda::merge<decltype(W), decltype(P)>(p, nullptr); });
}
