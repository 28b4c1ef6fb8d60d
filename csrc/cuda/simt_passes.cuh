// SPDX-License-Identifier: Apache-2.0
// The passes as batches of products (simt.cuh). forward takes 2 launches, backward 3, merge 1.
#pragma once

#include "dropout.cuh"
#include "simt.cuh"

namespace gralora::cuda::simt {

// An activation as k blocks of columns
inline View view_of(const Activation& x, int64_t block_width) {
  const int64_t row = x.leading_dims > 0 ? x.strides[0] : 0;
  return {x.data, x.dtype, block_width * x.column_stride, 0, row, x.column_stride};
}
inline View view_of(const Param& p) { return {p.data, p.dtype, p.block_stride, 0, p.row_stride, p.column_stride}; }

inline View transposed(View v) {
  const int64_t row = v.row;
  v.row = v.column, v.column = row;
  return v;
}

// The latents of T tokens, [T, k*r + h] in the accumulation type
struct KeptLatents {
  void* data;
  bool f64;
  int64_t k, r, h;

  View at(int64_t column, int64_t outer) const {
    void* to = f64 ? static_cast<void*>(static_cast<double*>(data) + column) : static_cast<float*>(data) + column;
    return {to, f64 ? DType::f64 : DType::f32, outer, 0, k * r + h, 1};
  }
  View of_output_blocks() const { return at(0, r); }
  View of_general() const { return at(k * r, 0); }
  View before_exchange() const {  // column j*rb + q of block n is rank n*rb + q of output block j
    View v = at(0, r / k);
    v.group = r / k, v.group_stride = r;
    return v;
  }
};

// latents = f * exchange(x' P), and f * x' G beside it
inline void add_project(Products& to, const Shape& s, const Activation& x, int64_t width, const Param& P,
                        const Param& G, const KeptLatents& latents, double scale, const Mask& mask) {
  Product p;
  p.blocks = s.k, p.rows = s.T, p.columns = s.r, p.depth[0] = width / s.k;
  p.left[0] = view_of(x, width / s.k), p.right[0] = view_of(P), p.out = latents.before_exchange();
  p.scale = scale, p.left_mask = mask, p.mask_width = width / s.k;
  to.add(p);
  if (s.h == 0) return;
  p.blocks = 1, p.columns = s.h, p.depth[0] = width, p.right[0] = view_of(G), p.out = latents.of_general();
  to.add(p);
}

// y = base + f * (latents Q), and latents G beside it
inline Product expand(const Shape& s, const KeptLatents& latents, const Param& Q, const Param& G,
                      const Activation& base, const Activation& y, int64_t width, double scale, const Mask& mask) {
  Product p;
  p.blocks = s.k, p.rows = s.T, p.columns = width / s.k, p.depth[0] = s.r, p.depth[1] = s.h;
  p.left[0] = latents.of_output_blocks(), p.left[1] = latents.of_general();
  p.right[0] = view_of(Q), p.right[1] = view_of(G);
  p.right[1].outer = width / s.k * p.right[1].column;
  p.base = view_of(base, width / s.k), p.out = view_of(y, width / s.k);
  p.scale = scale, p.sum_mask = mask, p.mask_width = width / s.k;
  return p;
}

// gradient[b] = f * latents[b]^T x'[b], and that of the general part
inline void add_gradient(Products& to, const Shape& s, const KeptLatents& latents, const Activation& x, int64_t width,
                         const Param& block, const Param& general, double scale, const Mask& mask) {
  Product p;
  p.blocks = s.k, p.rows = s.r, p.columns = width / s.k, p.depth[0] = s.T;
  p.left[0] = transposed(latents.of_output_blocks()), p.right[0] = view_of(x, width / s.k), p.out = view_of(block);
  p.scale = scale, p.right_mask = mask, p.mask_width = width / s.k;
  if (block.data != nullptr) to.add(p);
  p.blocks = 1, p.rows = s.h, p.columns = width, p.left[0] = transposed(latents.of_general()), p.out = view_of(general);
  if (general.data != nullptr) to.add(p);
}

inline int64_t workspace_bytes(const Shape& s, bool f64, int sets) {
  return sets * s.T * (s.k * s.r + s.h) * int64_t(f64 ? sizeof(double) : sizeof(float));
}

inline int64_t workspace(const ForwardParams& p) { return workspace_bytes(p.shape, p.accumulate_f64, p.u == nullptr); }
inline cudaError_t pass(const ForwardParams& p, void* workspace, cudaStream_t stream) {
  const Shape& s = p.shape;
  const KeptLatents u{p.u != nullptr ? p.u : workspace, p.accumulate_f64, s.k, s.r, s.h};
  Products latents, y;
  add_project(latents, s, p.x, s.N, p.adapter.A, gralora::transposed(p.adapter.A_general), u, keep_scale(p.dropout),
              mask_of(p.dropout, s.N));
  y.add(expand(s, u, p.adapter.B, gralora::transposed(p.adapter.B_general), p.base, p.y, s.M, p.scaling, Mask{}));
  const cudaError_t error = launch_products(latents, p.accumulate_f64, stream);
  return error != cudaSuccess ? error : launch_products(y, p.accumulate_f64, stream);
}

inline int64_t workspace(const BackwardParams& p) {
  return workspace_bytes(p.shape, p.accumulate_f64, p.u == nullptr ? 2 : 1);
}
inline cudaError_t pass(const BackwardParams& p, void* workspace, cudaStream_t stream) {
  const Shape& s = p.shape;
  const Mask mask = mask_of(p.dropout, s.N);
  const double kept = keep_scale(p.dropout);
  const KeptLatents dH{workspace, p.accumulate_f64, s.k, s.r, s.h};
  void* remade = static_cast<char*>(workspace) + workspace_bytes(s, p.accumulate_f64, 1);
  const KeptLatents u{p.u != nullptr ? const_cast<void*>(p.u) : remade, p.accumulate_f64, s.k, s.r, s.h};
  Products latents, dx, gradients;
  add_project(latents, s, p.grad_y, s.M, gralora::transposed(p.adapter.B), p.adapter.B_general, dH, p.scaling, Mask{});
  if (p.u == nullptr)
    add_project(latents, s, p.x, s.N, p.adapter.A, gralora::transposed(p.adapter.A_general), u, kept, mask);
  if (p.grad_x.data != nullptr)
    dx.add(expand(s, dH, gralora::transposed(p.adapter.A), p.adapter.A_general,
                  p.add_to_grad_x ? p.grad_x : Activation{}, p.grad_x, s.N, kept, mask));
  add_gradient(gradients, s, u, p.grad_y, s.M, p.grad.B, gralora::transposed(p.grad.B_general), p.scaling, Mask{});
  add_gradient(gradients, s, dH, p.x, s.N, gralora::transposed(p.grad.A), p.grad.A_general, kept, mask);
  for (const Products* products : {&latents, &dx, &gradients}) {
    const cudaError_t error = launch_products(*products, p.accumulate_f64, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

// W of output block j and input block n meets the ranks n*rb .. of B_j and j*rb .. of A_n.
inline cudaError_t merge(const MergeParams& p, cudaStream_t stream) {
  const Shape& s = p.shape;
  const Adapter& a = p.adapter;
  const int64_t rb = s.r / s.k, w_in = s.N / s.k, w_out = s.M / s.k;
  Product w;
  w.blocks = s.k * s.k, w.inner_blocks = s.k, w.rows = w_out, w.columns = w_in, w.depth[0] = rb, w.depth[1] = s.h;
  w.left[0] = {a.B.data, a.B.dtype, a.B.block_stride, rb * a.B.row_stride, a.B.column_stride, a.B.row_stride};
  w.right[0] = {a.A.data, a.A.dtype, rb * a.A.column_stride, a.A.block_stride, a.A.column_stride, a.A.row_stride};
  const Param &Bg = a.B_general, &Ag = a.A_general;
  w.left[1] = {Bg.data, Bg.dtype, w_out * Bg.row_stride, 0, Bg.row_stride, Bg.column_stride};
  w.right[1] = {Ag.data, Ag.dtype, 0, w_in * Ag.column_stride, Ag.row_stride, Ag.column_stride};
  w.out = {p.weight.data,       p.weight.dtype,        w_out * p.weight.row_stride, w_in * p.weight.column_stride,
           p.weight.row_stride, p.weight.column_stride};
  if (p.accumulate) w.base = w.out;
  w.scale = p.scaling;
  Products products;
  products.add(w);
  return launch_products(products, p.accumulate_f64, stream);
}

}  // namespace gralora::cuda::simt
