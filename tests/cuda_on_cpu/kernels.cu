// SPDX-License-Identifier: Apache-2.0
// See calls.h. All kernels in one source: an emulated library has one emulator.
#include "calls.h"

#ifdef GRALORA_TEST_FEW_PAIRS
#include "few_pairs.h"
#else
#include "bfloat16.cu"
#include "float16.cu"
#include "float32.cu"
#endif
#include "launch.cu"

using namespace gralora;

namespace {

constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};

Activation rows(const void* data, int64_t dtype, int64_t T, int64_t stride) {
  Activation to;
  to.data = const_cast<void*>(data), to.dtype = kDTypes[dtype];
  to.leading_dims = 1, to.sizes[0] = T, to.strides[0] = stride;
  return to;
}

Param param(const void* data, int64_t dtype, const int64_t (&strides)[3], int64_t rows, int64_t columns) {
  const bool given = strides[2] != 0;
  Param to;
  to.data = const_cast<void*>(data), to.dtype = kDTypes[dtype];
  to.block_stride = given ? strides[0] : rows * columns, to.row_stride = given ? strides[1] : columns;
  to.column_stride = given ? strides[2] : 1;
  return to;
}

// A, B, A_general, B_general; the last two may be null.
Adapter adapter(const Call& c, const void* const (&data)[4], const int64_t (&strides)[4][3]) {
  const int64_t rows[4] = {c.N / c.k, c.r, c.h, c.M}, columns[4] = {c.r, c.M / c.k, c.N, c.h};
  Adapter to;
  Param* const params[4] = {&to.A, &to.B, &to.A_general, &to.B_general};
  for (int i = 0; i < (c.h > 0 ? 4 : 2); i++)
    *params[i] = param(data[i], c.adapter_dtype, strides[i], rows[i], columns[i]);
  return to;
}

bool f64(const Call& c) { return c.x_dtype == 3 || c.base_dtype == 3 || c.adapter_dtype == 3; }

ForwardParams forward_params(const Call& c, const void* x, const void* base, void* y, const Adapter& adapter, void* u) {
  ForwardParams p;
  p.shape = {c.T, c.N, c.M, c.k, c.r, c.h}, p.adapter = adapter;
  p.x = rows(x, c.x_dtype, c.T, c.x_row);
  p.base = rows(base, c.base_dtype, c.T, c.base_row), p.y = rows(y, c.base_dtype, c.T, c.y_row);
  p.u = c.keep_u ? u : nullptr, p.scaling = c.scaling, p.dropout = {c.dropout, &c.seed}, p.accumulate_f64 = f64(c);
  return p;
}

BackwardParams backward_params(const Call& c, const void* x, const void* grad_y, const void* u, const Adapter& adapter,
                               void* dx, Adapter grad) {
  BackwardParams p;
  p.shape = {c.T, c.N, c.M, c.k, c.r, c.h}, p.adapter = adapter;
  p.x = rows(x, c.x_dtype, c.T, c.x_row), p.grad_y = rows(grad_y, c.base_dtype, c.T, c.grad_row);
  if (c.needs & 1) p.grad_x = rows(dx, c.x_dtype, c.T, c.dx_row), p.add_to_grad_x = c.add_to_dx;
  if (c.needs & 2) p.grad.A = grad.A;
  if (c.needs & 4) p.grad.B = grad.B;
  if (c.needs & 8) p.grad.A_general = grad.A_general;
  if (c.needs & 16) p.grad.B_general = grad.B_general;
  p.u = c.keep_u ? u : nullptr, p.scaling = c.scaling, p.dropout = {c.dropout, &c.seed}, p.accumulate_f64 = f64(c);
  return p;
}

// f(the parameters of a pass), with pointers that are only compared with null
template <class F>
int64_t of_pass(const Call& c, int backward, F&& f) {
  static int64_t some = 0;
  const Adapter parameters = adapter(c, {&some, &some, &some, &some}, c.strides);
  if (backward) return f(backward_params(c, &some, &some, &some, parameters, &some, parameters));
  return f(forward_params(c, &some, &some, &some, parameters, &some));
}

// As the call says
cuda::ForwardPlan plan(const Call& c, const ForwardParams& p) { return cuda::ForwardPlan::of(p, int(c.column_splits)); }
cuda::BackwardPlan plan(const Call& c, const BackwardParams& p) {
  return cuda::BackwardPlan::of(p, int(c.column_splits), int(c.token_splits));
}

int tokens(const cuda::ForwardPlan&) { return 0; }
int tokens(const cuda::BackwardPlan& plan) { return plan.token_splits; }

template <class Params>
int run(const Call& c, const Params& p, void* workspace) {
  if (c.column_splits == 0) return cuda::pass(p, workspace, nullptr);
  return cuda::tensor_cores::pass(p, plan(c, p), static_cast<float*>(workspace), nullptr);
}

__global__ void mask_kernel(cuda::Mask mask, int64_t t, int64_t column, uint16_t* kept) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  kept[i] = uint16_t(mask.kept(mask.key(), t, column + 16 * i));
}

}  // namespace

int test_mask(const int64_t* seed, int64_t threshold, int64_t width, int64_t t, int64_t column, uint16_t* kept,
              int count) {
  const cuda::Mask mask{seed, uint32_t(threshold), width};
  return int(cuda::launch("mask", mask_kernel, dim3(unsigned(count)), dim3(1), 0, nullptr, mask, t, column, kept));
}

int64_t test_workspace(const Call* c, int backward) {
  return of_pass(*c, backward, [&](const auto& p) {
    return c->column_splits == 0 ? cuda::workspace_bytes(p) : 4 * plan(*c, p).floats();
  });
}

int64_t test_place_of_latents(const Call* c, int64_t split, int64_t t, int64_t block) {
  static float first = 0.0f;
  const cuda::Latents latents{&first, c->T, int(c->k), int(c->r), int(c->h), int(c->column_splits), nullptr};
  return split < 0 ? latents.kept(t, int(block), 0) : latents.partial(int(split), t, int(block)) - &first;
}

void test_plan(const Call* c, int backward, int64_t splits[2]) {
  of_pass(*c, backward, [&](const auto& p) {
    const auto plan = cuda::plan_of(p, cuda::current_device());
    splits[0] = plan.splits, splits[1] = tokens(plan);
    return 0;
  });
}

int test_forward(const Call* c, const void* x, const void* base, void* y, const void* A, const void* B,
                 const void* A_general, const void* B_general, void* u, void* workspace) {
  return run(*c, forward_params(*c, x, base, y, adapter(*c, {A, B, A_general, B_general}, c->strides), u), workspace);
}

int test_backward(const Call* c, const void* x, const void* grad_y, const void* u, const void* A, const void* B,
                  const void* A_general, const void* B_general, void* dx, void* dA, void* dB, void* dA_general,
                  void* dB_general, void* workspace) {
  return run(*c,
             backward_params(*c, x, grad_y, u, adapter(*c, {A, B, A_general, B_general}, c->strides), dx,
                             adapter(*c, {dA, dB, dA_general, dB_general}, c->gradient_strides)),
             workspace);
}

int test_merge(const Call* c, void* weight, const void* A, const void* B, const void* A_general,
               const void* B_general) {
  MergeParams p;
  p.shape = {0, c->N, c->M, c->k, c->r, c->h};
  p.adapter = adapter(*c, {A, B, A_general, B_general}, c->strides);
  p.weight = param(weight, c->base_dtype, {0, c->weight_row, c->weight_column}, c->M, c->N);
  p.accumulate = c->overwrite == 0, p.scaling = c->scaling, p.accumulate_f64 = f64(*c);
  return cuda::merge(p, nullptr);
}
