// SPDX-License-Identifier: Apache-2.0
// See kernels.cuh.
#pragma once

#include "expand.cuh"
#include "kernels.cuh"
#include "project.cuh"
#include "reduce.cuh"
#include "weight_gradient.cuh"

namespace gralora::cuda {

template <class T>
ActivationView<T> activation(const Activation& rows, int64_t block_width) {
  constexpr int64_t kVector = 16 / sizeof(T);
  const int64_t stride = rows.leading_dims > 0 ? rows.strides[0] : 0;
  return {static_cast<T*>(rows.data), stride,
          rows.data != nullptr && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && stride % kVector == 0 &&
              block_width % kVector == 0};
}

// Of a parameter whose rows are columns of the activation
template <class P>
Factor<P> factor(const Param& p) {
  const int64_t other = p.column_stride == 1 ? p.row_stride : p.column_stride;
  return {static_cast<const P*>(p.data), p.block_stride, p.row_stride, p.column_stride,
          (p.column_stride == 1 || p.row_stride == 1) && other % 4 == 0 && p.block_stride % 4 == 0 &&
              reinterpret_cast<uintptr_t>(p.data) % (4 * sizeof(P)) == 0};
}
template <class P>
FactorPair<P> factor_pair(const Param& block, const Param& general, int w, int r, int h) {
  return {factor<P>(block), factor<P>(general), w, r, h};
}

template <class X, class P, int kRanks>
cudaError_t launch_project(const ProjectSides<X, P>& sides, int count, cudaStream_t stream) {
  const Latents& latents = sides.side[0].latents;
  const int groups = ceil_div(latents.r + latents.h, kRanks);
  return launch(
      "project", project_kernel<X, P, kRanks>,
      dim3(unsigned(ceil_div(latents.T, kTokens) * groups), unsigned(count * latents.k), unsigned(latents.splits)),
      dim3(kThreads), sizeof(typename ProjectTile<X, P, kRanks>::Shared), stream, sides);
}

template <class X, class P>
cudaError_t project(const Projection* projections, int count, cudaStream_t stream) {
  const Latents& latents = projections[0].latents;
  if (latents.T == 0) return cudaSuccess;
  ProjectSides<X, P> sides;
  for (int i = 0; i < count; i++) {
    const Projection& from = projections[i];
    sides.side[i] = {activation<const X>(from.x, from.w), factor_pair<P>(from.P, from.G, from.w, latents.r, latents.h),
                     from.latents, float(from.scale), from.mask};
  }
  const auto launcher = latents.r + latents.h <= 16 ? launch_project<X, P, 16> : launch_project<X, P, kProjectRanks>;
  return launcher(sides, count, stream);
}

template <class Left, class Y, class P, int kRanks>
cudaError_t launch_expand(const char* name, const Left& left, int row_tiles, int k, const ExpandSide<Y, P>& side,
                          cudaStream_t stream) {
  constexpr int kTilesOfABlock = 8;  // of 64 columns: enough to use the latents often, few enough to fill the device
  const int all = ceil_div(side.factor.w, kColumns), tiles = all < kTilesOfABlock ? all : kTilesOfABlock;
  return launch(name, expand_kernel<Left, Y, P, kRanks>,
                dim3(unsigned(row_tiles), unsigned(ceil_div(all, tiles)), unsigned(k)), dim3(kThreads),
                sizeof(typename ExpandTile<Left, Y, P, kRanks>::Shared), stream, left, side, tiles);
}

// Of `row_tiles` tiles of rows; r and h: the ranks that meet one block of y
template <class Left, class Y, class P>
cudaError_t expand_rows(const char* name, const Left& left, int row_tiles, int k, const Expansion& to, int r, int h,
                        cudaStream_t stream) {
  if (row_tiles == 0) return cudaSuccess;
  const ExpandSide<Y, P> side{factor_pair<P>(to.Q, to.G, to.w, r, h), activation<const Y>(to.base, to.w),
                              activation<Y>(to.y, to.w), float(to.scale), to.mask};
  const auto launcher = r + h <= 32 ? launch_expand<Left, Y, P, 32> : launch_expand<Left, Y, P, 64>;
  return launcher(name, left, row_tiles, k, side, stream);
}

template <class Y, class P>
cudaError_t expand(const Latents& latents, const Expansion& to, cudaStream_t stream) {
  return expand_rows<Latents, Y, P>("expand", latents, ceil_div(latents.T, kTokens), latents.k, to, latents.r,
                                    latents.h, stream);
}

template <class W, class P>
cudaError_t merge(const MergeParams& p, cudaStream_t stream) {
  const Shape& s = p.shape;
  const int k = int(s.k), rb = int(s.r / s.k), h = int(s.h);
  const int64_t rows = s.M / s.k, w = s.N / s.k;
  const RowsOfB<P> left{
      factor<P>(transposed(p.adapter.B)), factor<P>(p.adapter.B_general), rows, ceil_div(rows, kTokens), rb, h};
  Activation weight;
  weight.data = p.weight.data, weight.leading_dims = 1, weight.sizes[0] = s.M, weight.strides[0] = p.weight.row_stride;
  const Expansion to{p.adapter.A,
                     transposed(blocks_of_columns(p.adapter.A_general, w)),
                     p.accumulate ? weight : Activation{},
                     weight,
                     int(w),
                     p.scaling,
                     Mask{}};
  return expand_rows<RowsOfB<P>, W, P>("merge", left, k * left.tiles_per_block, k, to, rb, h, stream);
}

template <class X, int kRanks>
cudaError_t launch_weight_gradient(GradientSides<X> sides, int splits, cudaStream_t stream) {
  using Tile = GradientTile<X, kRanks>;
  int tiles = 0;
  for (GradientSide<X>& side : sides.side) {
    side.column_tiles = ceil_div(side.w, Tile::kColumns);
    side.rank_tiles = ceil_div(side.latents.r + side.latents.h, kRanks);
    tiles += side.tiles();
  }
  if (tiles == 0) return cudaSuccess;
  return launch("weight_gradient", weight_gradient_kernel<X, kRanks>, dim3(unsigned(tiles), unsigned(splits)),
                dim3(kThreads), sizeof(typename Tile::Shared), stream, sides, splits);
}

template <class X>
cudaError_t weight_gradient(const GradientSum* gradients, int count, int splits, cudaStream_t stream) {
  GradientSides<X> sides{};
  for (int i = 0; i < count; i++) {
    const GradientSum& of = gradients[i];
    sides.side[i] = {activation<const X>(of.x, of.w), of.latents, of.w, of.sums, float(of.scale), of.mask};
  }
  const Latents& latents = gradients[0].latents;
  const auto launcher = latents.r + latents.h <= 32 ? launch_weight_gradient<X, 32> : launch_weight_gradient<X, 64>;
  return launcher(sides, splits, stream);
}

template <class P>
cudaError_t reduce(const GradientTotal (&totals)[2], const Shape& shape, int splits, cudaStream_t stream) {
  const auto gradient = [](const Param& to) {
    return Gradient<P>{static_cast<P*>(to.data), to.block_stride, to.row_stride, to.column_stride};
  };
  ReduceSides<P> sides;
  for (int i = 0; i < 2; i++)
    sides.side[i] = {totals[i].sums,
                     totals[i].w,
                     int(shape.k),
                     int(shape.r),
                     int(shape.h),
                     gradient(totals[i].block),
                     gradient(totals[i].general)};
  const int blocks = ceil_div(sides.side[0].elements() + sides.side[1].elements(), kReduceThreads);
  return launch("reduce", reduce_kernel<P>, dim3(unsigned(blocks)), dim3(kReduceThreads), 0, stream, sides, splits);
}

}  // namespace gralora::cuda
