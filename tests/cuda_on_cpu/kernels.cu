// See calls.h. All kernels in one source: an emulated library has one emulator.
#include "calls.h"

#include "bfloat16.cu"
#include "float16.cu"
#include "float32.cu"
#include "launch.cu"

using namespace gralora;

namespace {

constexpr DType kDTypes[] = {DType::f32, DType::bf16, DType::f16, DType::f64};

Rows rows(const void* data, int64_t dtype, int64_t T, int64_t stride) {
  Rows to;
  to.data = const_cast<void*>(data), to.dtype = kDTypes[dtype];
  to.leading_dims = 1, to.sizes[0] = T, to.strides[0] = stride;
  return to;
}

Param param(const void* data, int64_t dtype, int64_t rows, int64_t columns) {
  Param to;
  to.data = const_cast<void*>(data), to.dtype = kDTypes[dtype];
  to.block_stride = rows * columns, to.row_stride = columns, to.column_stride = 1;
  return to;
}

// A, B, A_general, B_general as PEFT stores them; the last two may be null.
Adapter adapter(const Call& c, const void* const (&data)[4]) {
  const int64_t type = c.adapter_dtype;
  Adapter to{param(data[0], type, c.N / c.k, c.r), param(data[1], type, c.r, c.M / c.k), {}, {}};
  if (c.h > 0) to.A_general = param(data[2], type, c.h, c.N), to.B_general = param(data[3], type, c.M, c.h);
  return to;
}

bool f64(const Call& c) { return c.x_dtype == 3 || c.base_dtype == 3 || c.adapter_dtype == 3; }

ForwardParams forward_params(const Call& c, const void* x, const void* base, void* y, const Adapter& adapter, void* u) {
  ForwardParams p;
  p.shape = {c.T, c.N, c.M, c.k, c.r, c.h}, p.adapter = adapter;
  p.x = rows(x, c.x_dtype, c.T, c.x_row);
  p.base = rows(base, c.base_dtype, c.T, c.y_row), p.y = rows(y, c.base_dtype, c.T, c.y_row);
  p.u = c.keep_u ? u : nullptr, p.scaling = c.scaling, p.dropout = {c.dropout, &c.seed}, p.accumulate_f64 = f64(c);
  return p;
}

BackwardParams backward_params(const Call& c, const void* x, const void* grad_y, const void* u, const Adapter& adapter,
                               void* dx, Adapter grad) {
  BackwardParams p;
  p.shape = {c.T, c.N, c.M, c.k, c.r, c.h}, p.adapter = adapter;
  p.x = rows(x, c.x_dtype, c.T, c.x_row), p.grad_y = rows(grad_y, c.base_dtype, c.T, c.y_row);
  if (c.needs & 1) p.grad_x = rows(dx, c.x_dtype, c.T, c.x_row);
  if (c.needs & 2) p.grad.A = grad.A;
  if (c.needs & 4) p.grad.B = grad.B;
  if (c.needs & 8) p.grad.A_general = grad.A_general;
  if (c.needs & 16) p.grad.B_general = grad.B_general;
  p.u = c.keep_u ? u : nullptr, p.scaling = c.scaling, p.dropout = {c.dropout, &c.seed}, p.accumulate_f64 = f64(c);
  return p;
}

// For pointers that are only compared with null
int64_t some = 0;
Adapter some_adapter(const Call& c) { return adapter(c, {&some, &some, &some, &some}); }

__global__ void mask_kernel(cuda::Mask mask, int64_t t, int64_t column, uint8_t* kept) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  kept[i] = uint8_t(mask.kept(mask.key(), t, column + 8 * i));
}

}  // namespace

int test_mask(const int64_t* seed, int64_t threshold, int64_t width, int64_t t, int64_t column, uint8_t* kept,
              int count) {
  const cuda::Mask mask{seed, uint32_t(threshold), width};
  return int(cuda::launch("mask", mask_kernel, dim3(unsigned(count)), dim3(1), 0, nullptr, mask, t, column, kept));
}

int64_t test_workspace(const Call* c, int backward) {
  const Adapter parameters = some_adapter(*c);
  const ForwardParams forward = forward_params(*c, &some, &some, &some, parameters, &some);
  const BackwardParams back = backward_params(*c, &some, &some, &some, parameters, &some, parameters);
  if (c->column_splits == 0) return backward ? cuda::workspace_bytes(back) : cuda::workspace_bytes(forward);
  return 4 * (backward ? cuda::BackwardPlan::of(back, int(c->column_splits), int(c->token_splits)).floats()
                       : cuda::ForwardPlan::of(forward.shape, int(c->column_splits)).floats);
}

void test_plan(const Call* c, int backward, int64_t splits[2]) {
  const Adapter parameters = some_adapter(*c);
  const cuda::Device device = cuda::current_device();
  if (backward) {
    const auto p = backward_params(*c, &some, &some, &some, parameters, &some, parameters);
    splits[0] = cuda::plan_of(p, device).splits, splits[1] = cuda::plan_of(p, device).token_splits;
  } else {
    splits[0] = cuda::plan_of(forward_params(*c, &some, &some, &some, parameters, &some), device).splits, splits[1] = 0;
  }
}

int test_forward(const Call* c, const void* x, const void* base, void* y, const void* A, const void* B,
                 const void* A_general, const void* B_general, void* u, void* workspace) {
  const ForwardParams p = forward_params(*c, x, base, y, adapter(*c, {A, B, A_general, B_general}), u);
  if (c->column_splits == 0) return cuda::forward(p, workspace, nullptr);
  const auto plan = cuda::ForwardPlan::of(p.shape, int(c->column_splits));
  return cuda::for_pair(p.x.dtype, p.adapter.A.dtype, [&](auto pair) {
    using Types = decltype(pair);
    return cuda::forward<typename Types::Activations, typename Types::Parameters>(
        p, plan, static_cast<float*>(workspace), nullptr);
  });
}

int test_backward(const Call* c, const void* x, const void* grad_y, const void* u, const void* A, const void* B,
                  const void* A_general, const void* B_general, void* dx, void* dA, void* dB, void* dA_general,
                  void* dB_general, void* workspace) {
  const BackwardParams p = backward_params(*c, x, grad_y, u, adapter(*c, {A, B, A_general, B_general}), dx,
                                           adapter(*c, {dA, dB, dA_general, dB_general}));
  if (c->column_splits == 0) return cuda::backward(p, workspace, nullptr);
  const auto plan = cuda::BackwardPlan::of(p, int(c->column_splits), int(c->token_splits));
  return cuda::for_pair(p.x.dtype, p.adapter.A.dtype, [&](auto pair) {
    using Types = decltype(pair);
    return cuda::backward<typename Types::Activations, typename Types::Parameters>(
        p, plan, static_cast<float*>(workspace), nullptr);
  });
}

int test_merge(const Call* c, void* weight, const void* A, const void* B, const void* A_general,
               const void* B_general) {
  MergeParams p;
  p.shape = {0, c->N, c->M, c->k, c->r, c->h};
  p.adapter = adapter(*c, {A, B, A_general, B_general});
  p.weight = param(weight, c->base_dtype, 0, 0);
  p.weight.row_stride = c->weight_row, p.weight.column_stride = c->weight_column;
  p.scaling = c->scaling, p.accumulate_f64 = f64(*c);
  return cuda::merge(p, nullptr);
}
