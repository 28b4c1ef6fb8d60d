// SPDX-License-Identifier: Apache-2.0
// How a pass is cut for a device, and what memory it works in. Host code without CUDA's headers.
#pragma once

#include "device.h"
#include "gralora.h"

namespace gralora::cuda {

constexpr int kTokens = 128;  // of a tile: a warp owns 16

inline int ceil_div(int64_t a, int64_t b) { return int((a + b - 1) / b); }

// Whether the kernels on tensor cores take an activation of this dtype beside an adapter: in
// float32 beside any, in 16 bits beside the same or float32.
inline bool has_tensor_core_kernels(DType activation, DType adapter) {
  return activation != DType::f64 && adapter != DType::f64 &&
         (adapter == DType::f32 || adapter == activation || activation == DType::f32);
}

// Enough blocks to fill every multiprocessor twice, so that the last wave is short; but a split's
// partial sums are written and read again, so each takes at least so many steps of its pipeline
// (128 bytes of a row, or 32 tokens).
constexpr int kBlocksPerMultiprocessor = 2, kLeastSteps = 4;

inline int splits_to_fill(int64_t blocks, int64_t steps, const Device& device) {
  const int64_t wanted = ceil_div(int64_t(kBlocksPerMultiprocessor) * device.multiprocessors, blocks < 1 ? 1 : blocks);
  const int64_t most = steps / kLeastSteps;
  return int(wanted < most ? wanted : most < 1 ? 1 : most);
}

// Ranks of a block of project. With 64 of them, sums and totals would not fit into the registers.
constexpr int kProjectRanks = 32;

// Of the columns, where latents are made from a width
inline int column_splits(const Shape& s, int64_t width, int element_size, const Device& device) {
  const int64_t blocks = int64_t(ceil_div(s.T, kTokens)) * s.k * ceil_div(s.r + s.h, kProjectRanks);
  return splits_to_fill(blocks, ceil_div(width / s.k * element_size, 128), device);
}

// Of the tokens, where weight gradients are summed
inline int token_splits(const Shape& s, const Device& device) {
  constexpr int kTile = 64, kDepth = 32;
  const int64_t tiles = s.k * (ceil_div(s.N / s.k, kTile) + ceil_div(s.M / s.k, kTile)) * ceil_div(s.r + s.h, kTile);
  return splits_to_fill(tiles, ceil_div(s.T, kDepth), device);
}

// A forward pass: latents before the exchange between its two launches, [splits][T][k][r + h]
// floats
struct ForwardPlan {
  int splits;
  int64_t latents;

  int64_t floats() const { return latents; }

  static ForwardPlan of(const ForwardParams& p, int splits) {
    const Shape& s = p.shape;
    return {splits, splits * s.T * s.k * (s.r + s.h)};
  }
};

// The floats of a backward pass, one after the other. What is not wanted takes none.
struct BackwardPlan {
  int splits, token_splits;
  bool need_dH, need_gradients;
  int64_t from_g;  // latents of g, by split
  int64_t from_x;  // latents of x, by split, where U is made again
  int64_t dH;
  int64_t sums_B, sums_A;  // gradients, by split of the tokens

  int64_t floats() const { return from_g + from_x + dH + sums_B + sums_A; }

  static BackwardPlan of(const BackwardParams& p, int splits, int token_splits) {
    const Shape& s = p.shape;
    const bool dx = p.grad_x.data != nullptr;
    const bool dA = p.grad.A.data != nullptr || p.grad.A_general.data != nullptr;
    const bool dB = p.grad.B.data != nullptr || p.grad.B_general.data != nullptr;
    const int64_t ranks = s.r + s.h, partial = splits * s.T * s.k * ranks;
    BackwardPlan plan{splits, token_splits, dx || dA, dA || dB, 0, 0, 0, 0, 0};
    plan.from_g = dx || dA ? partial : 0;
    plan.from_x = dB && p.u == nullptr ? partial : 0;
    plan.dH = dx && dA ? s.T * (s.k * s.r + s.h) : 0;  // kept by dx for dA; alone, dA reads the partial latents
    plan.sums_B = dB ? token_splits * ranks * s.M : 0;
    plan.sums_A = dA ? token_splits * ranks * s.N : 0;
    return plan;
  }
};

}  // namespace gralora::cuda
