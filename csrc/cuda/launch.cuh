// From Params to launches, for one pair of dtypes: X of x, base and y, P of the adapter.
#pragma once

#include <cmath>

#include "expand.cuh"
#include "gralora.h"
#include "project.cuh"
#include "reduce.cuh"
#include "weight_gradient.cuh"

namespace gralora::cuda {

inline int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

template <class T>
Activation<T> activation(const Rows& rows, int64_t block_width) {
  constexpr int64_t kVector = 16 / sizeof(T);
  const int64_t stride = rows.leading_dims > 0 ? rows.strides[0] : 0;
  return {static_cast<T*>(rows.data), stride,
          rows.data != nullptr && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && stride % kVector == 0 &&
              block_width % kVector == 0};
}

inline Mask mask_of(const Dropout& d, int64_t width) {
  if (d.p <= 0.0) return {};
  return {d.seed, uint32_t(std::nearbyint(d.p * 65536.0)), width};  // half to even, as the reference rounds
}
inline float keep_scale(const Dropout& d) { return d.p > 0.0 ? float(1.0 / (1.0 - d.p)) : 1.0f; }

template <class P>
Factor<P> factor(const Param& p) {
  return {static_cast<const P*>(p.data), p.block_stride, p.row_stride, p.column_stride};
}
template <class X, class P, int columns>
cudaError_t launch_project(const Rows& x, const Param& P_block, const Param& P_general, const Ranks& ranks,
                           int64_t width, float scale, const Mask& mask, cudaStream_t stream) {
  using Tile = ProjectTile<X, P, columns>;
  const int groups = ceil_div(ranks.r + ranks.h, columns);
  return launch("project", project_kernel<X, P, columns>,
                dim3(unsigned(ceil_div(ranks.T, kTokens)), unsigned(ranks.k * groups), unsigned(ranks.splits)),
                dim3(kThreads), sizeof(typename Tile::Shared), stream, activation<const X>(x, width / ranks.k),
                factor<P>(P_block), factor<P>(P_general), ranks, width, ranks.splits, scale, mask);
}

template <class X, class P>
cudaError_t project(const Rows& x, const Param& P_block, const Param& P_general, const Ranks& ranks, int64_t width,
                    float scale, const Mask& mask, cudaStream_t stream) {
  if (ranks.r + ranks.h <= 16)
    return launch_project<X, P, 16>(x, P_block, P_general, ranks, width, scale, mask, stream);
  if (ranks.r + ranks.h <= 32)
    return launch_project<X, P, 32>(x, P_block, P_general, ranks, width, scale, mask, stream);
  return launch_project<X, P, 64>(x, P_block, P_general, ranks, width, scale, mask, stream);
}

template <class Left, class Y, class P>
cudaError_t expand(const char* name, const Left& ranks, int row_tiles, const Param& Q, const Param& G, const Rows& base,
                   const Rows& y, int k, int h, int64_t w, float scale, const Mask& mask, cudaStream_t stream) {
  constexpr int kTilesOfABlock = 8;  // of 64 columns: enough to use the ranks often, few enough to fill the device
  const int tiles = ceil_div(w, kColumns) < kTilesOfABlock ? ceil_div(w, kColumns) : kTilesOfABlock;
  return launch(name, expand_kernel<Left, Y, P>,
                dim3(unsigned(row_tiles), unsigned(ceil_div(w, int64_t(tiles) * kColumns)), unsigned(k)),
                dim3(kThreads), sizeof(typename ExpandTile<Y, P>::Shared), stream, ranks, factor<P>(Q), factor<P>(G),
                activation<const Y>(base, w), activation<Y>(y, w), w, h, tiles, scale, mask);
}

template <class X, class P>
cudaError_t forward(const ForwardParams& p, float* workspace, int splits, cudaStream_t stream) {
  const Shape& s = p.shape;
  if (s.T == 0) return cudaSuccess;
  const int64_t w_in = s.N / s.k, w_out = s.M / s.k;
  const Ranks ranks{workspace, s.T, int(s.k), int(s.r), int(s.h), splits, static_cast<float*>(p.u)};
  const cudaError_t error = project<X, P>(p.x, p.adapter.A, blocks_of_rows(transposed(p.adapter.A_general), w_in),
                                          ranks, s.N, keep_scale(p.dropout), mask_of(p.dropout, s.N), stream);
  if (error != cudaSuccess) return error;
  return expand<Ranks, X, P>("expand", ranks, ceil_div(s.T, kTokens), p.adapter.B,
                             transposed(blocks_of_rows(p.adapter.B_general, w_out)), p.base, p.y, int(s.k), int(s.h),
                             w_out, float(p.scaling), Mask{}, stream);
}

// Four launches: dH, dx, the weight gradients' sums over splits of the tokens, the gradients.
template <class X, class P>
cudaError_t backward(const BackwardParams& p, float* partial, float* dH, float* sums, int splits, int token_splits,
                     cudaStream_t stream) {
  const Shape& s = p.shape;
  const int k = int(s.k), r = int(s.r), h = int(s.h);
  const int64_t w_in = s.N / k, w_out = s.M / k;
  const Ranks from_g{partial, s.T, k, r, h, splits, dH};
  cudaError_t error = cudaSuccess;
  if (s.T > 0)
    error = project<X, P>(p.grad_y, transposed(p.adapter.B), blocks_of_rows(p.adapter.B_general, w_out), from_g, s.M,
                          float(p.scaling), Mask{}, stream);
  if (error != cudaSuccess) return error;
  if (s.T > 0)
    error = expand<Ranks, X, P>("expand", from_g, ceil_div(s.T, kTokens), transposed(p.adapter.A),
                                blocks_of_columns(p.adapter.A_general, w_in), Rows{}, p.grad_x, k, h, w_in,
                                keep_scale(p.dropout), mask_of(p.dropout, s.N), stream);
  if (error != cudaSuccess) return error;

  using Tile = GradientTile<X>;
  const auto side = [&](const Rows& x, float* ranks, int64_t w, float* to, double scale, const Mask& mask) {
    return GradientSide<X>{
        activation<const X>(x, w),   Ranks{ranks, s.T, k, r, h, 0, nullptr}, w, to, float(scale), mask,
        ceil_div(w, Tile::kColumns), ceil_div(r + h, Tile::kRanks)};
  };
  float* sums_A = sums + int64_t(token_splits) * k * (r + h) * w_out;
  const GradientSides<X> sides{
      {side(p.grad_y, static_cast<float*>(const_cast<void*>(p.u)), w_out, sums, p.scaling, Mask{}),
       side(p.x, dH, w_in, sums_A, keep_scale(p.dropout), mask_of(p.dropout, s.N))}};
  error = launch("weight_gradient", weight_gradient_kernel<X>,
                 dim3(unsigned(sides.side[0].tiles() + sides.side[1].tiles()), unsigned(token_splits)), dim3(kThreads),
                 sizeof(typename Tile::Shared), stream, sides, token_splits);
  if (error != cudaSuccess) return error;

  const auto gradient = [](const Param& to) {
    return Gradient<P>{static_cast<P*>(to.data), to.block_stride, to.row_stride, to.column_stride};
  };
  const ReduceSides<P> reduce{
      {{sums, w_out, k, r, h, gradient(p.grad.B), gradient(transposed(blocks_of_rows(p.grad.B_general, w_out)))},
       {sums_A, w_in, k, r, h, gradient(transposed(p.grad.A)), gradient(blocks_of_columns(p.grad.A_general, w_in))}}};
  return launch("reduce", reduce_kernel<P>,
                dim3(unsigned(ceil_div(reduce.side[0].elements() + reduce.side[1].elements(), 256))), dim3(256), 0,
                stream, reduce, token_splits);
}

template <class W, class P>
cudaError_t merge(const MergeParams& p, cudaStream_t stream) {
  const Shape& s = p.shape;
  const int64_t rows = s.M / s.k, w = s.N / s.k;
  const OutputRanks<P> ranks{
      factor<P>(p.adapter.B), factor<P>(p.adapter.B_general), rows, ceil_div(rows, kTokens), int(s.r / s.k), int(s.h)};
  Rows weight;
  weight.data = p.weight.data, weight.leading_dims = 1, weight.sizes[0] = s.M, weight.strides[0] = p.weight.row_stride;
  return expand<OutputRanks<P>, W, P>("merge", ranks, int(s.k) * ranks.tiles_per_block, transposed(p.adapter.A),
                                      blocks_of_columns(p.adapter.A_general, w), p.accumulate ? weight : Rows{}, weight,
                                      int(s.k), int(s.h), w, float(p.scaling), Mask{}, stream);
}

}  // namespace gralora::cuda
