// SPDX-License-Identifier: Apache-2.0
// See passes.h.
#pragma once

#include "dropout.cuh"
#include "expand.cuh"
#include "fused_forward.cuh"
#include "passes.h"
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

template <class P>
Factor<P> factor(const Param& p) {
  const int64_t other = p.column_stride == 1 ? p.row_stride : p.column_stride;
  return {static_cast<const P*>(p.data), p.block_stride, p.row_stride, p.column_stride,
          (p.column_stride == 1 || p.row_stride == 1) && other % 4 == 0 && p.block_stride % 4 == 0 &&
              reinterpret_cast<uintptr_t>(p.data) % (4 * sizeof(P)) == 0};
}

inline Ranks partial_ranks(const Shape& s, float* data, int splits, float* kept) {
  return {data, s.T, int(s.k), int(s.r), int(s.h), splits, kept};
}
inline Ranks kept_ranks(const Shape& s, const void* data) {
  return {static_cast<float*>(const_cast<void*>(data)), s.T, int(s.k), int(s.r), int(s.h), 0, nullptr};
}

template <class X, class P>
ProjectSide<X, P> project_side(const Activation& x, const Param& P_block, const Param& P_general, const Ranks& ranks,
                               int64_t width, double scale, const Mask& mask) {
  const int64_t w = width / ranks.k;
  return {activation<const X>(x, w), factor<P>(P_block), factor<P>(P_general), ranks, w, float(scale), mask};
}

template <class X, class P, int columns>
cudaError_t launch_project(const ProjectSides<X, P>& sides, int count, const Ranks& ranks, cudaStream_t stream) {
  using Tile = ProjectKernelTile<X, P, columns>;
  const int groups = ceil_div(ranks.r + ranks.h, columns);
  return launch("project", project_kernel<X, P, columns>,
                dim3(unsigned(ceil_div(ranks.T, kTokens) * groups), unsigned(count * ranks.k), unsigned(ranks.splits)),
                dim3(kThreads), sizeof(typename Tile::Shared), stream, sides);
}

// `count` sides, of the same ranks in number and splits
template <class X, class P>
cudaError_t project(const ProjectSides<X, P>& sides, int count, cudaStream_t stream) {
  const Ranks& ranks = sides.side[0].ranks;
  if (ranks.T == 0) return cudaSuccess;
  if (ranks.r + ranks.h <= 16) return launch_project<X, P, 16>(sides, count, ranks, stream);
  if (ranks.r + ranks.h <= 32) return launch_project<X, P, 32>(sides, count, ranks, stream);
  return launch_project<X, P, 64>(sides, count, ranks, stream);
}

template <class Y, class P>
ExpandSide<Y, P> expand_side(const Param& Q, const Param& G, const Activation& base, const Activation& y, int64_t w,
                             int r, int h, const Mask& mask) {
  return {factor<P>(Q), factor<P>(G), activation<const Y>(base, w), activation<Y>(y, w), int(w), r, h, mask};
}

template <class Left, class Y, class P, int kRanks>
cudaError_t launch_expand(const char* name, const Left& ranks, int row_tiles, int k, const ExpandSide<Y, P>& side,
                          double scale, cudaStream_t stream) {
  if (row_tiles == 0) return cudaSuccess;
  constexpr int kTilesOfABlock = 8;  // of 64 columns: enough to use the ranks often, few enough to fill the device
  const int all = ceil_div(side.w, kColumns), tiles = all < kTilesOfABlock ? all : kTilesOfABlock;
  return launch(name, expand_kernel<Left, Y, P, kRanks>,
                dim3(unsigned(row_tiles), unsigned(ceil_div(all, tiles)), unsigned(k)), dim3(kThreads),
                sizeof(typename ExpandKernelTile<Left, Y, P, kRanks>::Shared), stream, ranks, side, tiles,
                float(scale));
}

template <class Left, class Y, class P>
cudaError_t expand(const char* name, const Left& ranks, int row_tiles, int k, const ExpandSide<Y, P>& side,
                   double scale, cudaStream_t stream) {
  const auto launcher = side.r + side.h <= 32 ? launch_expand<Left, Y, P, 32> : launch_expand<Left, Y, P, 64>;
  return launcher(name, ranks, row_tiles, k, side, scale, stream);
}

template <class X, class P, int columns>
cudaError_t launch_fused_forward(const ProjectSide<X, P>& from, const ExpandSide<X, P>& to, double scale,
                                 cudaStream_t stream) {
  return launch("fused_forward", fused_forward_kernel<X, P, columns>, dim3(unsigned(ceil_div(from.ranks.T, kTokens))),
                dim3(kThreads), sizeof(typename FusedTile<X, P, columns>::Shared), stream, from, to, float(scale));
}

template <class X, int kRanks>
cudaError_t launch_weight_gradient(GradientSides<X> sides, int splits, cudaStream_t stream) {
  using Tile = GradientTile<X, kRanks>;
  int tiles = 0;
  for (GradientSide<X>& side : sides.side) {
    side.column_tiles = ceil_div(side.w, Tile::kColumns);
    side.rank_tiles = ceil_div(side.ranks.r + side.ranks.h, Tile::kRanks);
    tiles += side.tiles();
  }
  return launch("weight_gradient", weight_gradient_kernel<X, kRanks>, dim3(unsigned(tiles), unsigned(splits)),
                dim3(kThreads), sizeof(typename Tile::Shared), stream, sides, splits);
}

template <class X, class P>
cudaError_t pass(const ForwardParams& p, const ForwardPlan& plan, float* workspace, cudaStream_t stream) {
  const Shape& s = p.shape;
  const int k = int(s.k), r = int(s.r), h = int(s.h);
  if (s.T == 0) return cudaSuccess;
  const Ranks ranks = partial_ranks(s, workspace, plan.splits, static_cast<float*>(p.u));
  const ProjectSide<X, P> from =
      project_side<X, P>(p.x, p.adapter.A, blocks_of_rows(transposed(p.adapter.A_general), s.N / k), ranks, s.N,
                         keep_scale(p.dropout), mask_of(p.dropout, s.N));
  const ExpandSide<X, P> to = expand_side<X, P>(p.adapter.B, transposed(blocks_of_rows(p.adapter.B_general, s.M / k)),
                                                p.base, p.y, s.M / k, r, h, Mask{});
  if (plan.splits == 0) {
    const auto launcher = r + h <= 16 ? launch_fused_forward<X, P, 16> : launch_fused_forward<X, P, 32>;
    return launcher(from, to, p.scaling, stream);
  }
  const cudaError_t error = project(ProjectSides<X, P>{{from}}, 1, stream);
  if (error != cudaSuccess) return error;
  return expand("expand", ranks, ceil_div(s.T, kTokens), k, to, p.scaling, stream);
}

template <class X, class P>
cudaError_t pass(const BackwardParams& p, const BackwardPlan& plan, float* workspace, cudaStream_t stream) {
  const Shape& s = p.shape;
  const int k = int(s.k), r = int(s.r), h = int(s.h);
  const int64_t w_in = s.N / k, w_out = s.M / k;
  const Mask mask = mask_of(p.dropout, s.N);
  const double kept_scale = keep_scale(p.dropout);
  float* const from_x = workspace + plan.from_g;
  float* const dH = plan.dH > 0 ? from_x + plan.from_x : nullptr;
  float* const sums_B = from_x + plan.from_x + plan.dH;
  float* const sums_A = sums_B + plan.sums_B;
  const Ranks partial_dH = partial_ranks(s, workspace, plan.splits, dH);
  const Ranks U = p.u != nullptr ? kept_ranks(s, p.u) : partial_ranks(s, from_x, plan.splits, nullptr);

  ProjectSides<X, P> sides;
  int count = 0;
  if (plan.need_dH)
    sides.side[count++] =
        project_side<X, P>(p.grad_y, transposed(p.adapter.B), blocks_of_rows(p.adapter.B_general, w_out), partial_dH,
                           s.M, p.scaling, Mask{});
  if (plan.from_x > 0)
    sides.side[count++] = project_side<X, P>(p.x, p.adapter.A, blocks_of_rows(transposed(p.adapter.A_general), w_in), U,
                                             s.N, kept_scale, mask);
  cudaError_t error = count > 0 ? project(sides, count, stream) : cudaSuccess;
  if (error != cudaSuccess) return error;

  if (p.grad_x.data != nullptr)
    error = expand("expand", partial_dH, ceil_div(s.T, kTokens), k,
                   expand_side<X, P>(transposed(p.adapter.A), blocks_of_columns(p.adapter.A_general, w_in),
                                     Activation{}, p.grad_x, w_in, r, h, mask),
                   kept_scale, stream);
  if (error != cudaSuccess || !plan.need_gradients) return error;

  const auto side = [&](const Activation& x, const Ranks& ranks, int64_t w, float* to, bool wanted, double scale,
                        const Mask& dropped) {
    return GradientSide<X>{activation<const X>(x, w), ranks, w, wanted ? to : nullptr, float(scale), dropped};
  };
  const GradientSides<X> gradients{
      {side(p.grad_y, U, w_out, sums_B, plan.sums_B > 0, p.scaling, Mask{}),
       side(p.x, dH != nullptr ? kept_ranks(s, dH) : partial_dH, w_in, sums_A, plan.sums_A > 0, kept_scale, mask)}};
  error = r + h <= 32 ? launch_weight_gradient<X, 32>(gradients, plan.token_splits, stream)
                      : launch_weight_gradient<X, 64>(gradients, plan.token_splits, stream);
  if (error != cudaSuccess) return error;

  const auto gradient = [](const Param& to) {
    return Gradient<P>{static_cast<P*>(to.data), to.block_stride, to.row_stride, to.column_stride};
  };
  const ReduceSides<P> reduce{{{gradients.side[0].sums, w_out, k, r, h, gradient(p.grad.B),
                                gradient(transposed(blocks_of_rows(p.grad.B_general, w_out)))},
                               {gradients.side[1].sums, w_in, k, r, h, gradient(transposed(p.grad.A)),
                                gradient(blocks_of_columns(p.grad.A_general, w_in))}}};
  return launch("reduce", reduce_kernel<P>,
                dim3(unsigned(ceil_div(reduce.side[0].elements() + reduce.side[1].elements(), 256))), dim3(256), 0,
                stream, reduce, plan.token_splits);
}

template <class W, class P>
cudaError_t merge(const MergeParams& p, cudaStream_t stream) {
  const Shape& s = p.shape;
  const int64_t rows = s.M / s.k, w = s.N / s.k;
  const OutputRanks<P> ranks{
      factor<P>(p.adapter.B), factor<P>(p.adapter.B_general), rows, ceil_div(rows, kTokens), int(s.r / s.k), int(s.h)};
  Activation weight;
  weight.data = p.weight.data, weight.leading_dims = 1, weight.sizes[0] = s.M, weight.strides[0] = p.weight.row_stride;
  const ExpandSide<W, P> side =
      expand_side<W, P>(transposed(p.adapter.A), blocks_of_columns(p.adapter.A_general, w),
                        p.accumulate ? weight : Activation{}, weight, w, ranks.rb, int(s.h), Mask{});
  return expand("merge", ranks, int(s.k) * ranks.tiles_per_block, int(s.k), side, p.scaling, stream);
}

}  // namespace gralora::cuda
