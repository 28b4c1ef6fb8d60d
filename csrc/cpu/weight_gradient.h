// weight_gradient: sums over all tokens of rank times wide activation.
//
//   block[b][c, i]  = s * sum_t v[t, b*r + c] * x'[t, b*w + i]         general[c, b*w + i] = s * sum_t v[t, k*r + c] * x'[...]
//
// w = width/k; x' is x after dropout. U and g give dB and dBg; dH and x give dA and dAg. An item owns a strip of columns
// of x for all tokens: x is read once, the sums (r + h ranks by the strip) stay in L2. Tokens are taken in blocks of
// kTokens, each summed by itself and then added in order: no reduction between threads, so their number changes nothing.
#pragma once

#include "panels.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Acc>
struct WeightGradient {
  static constexpr int64_t kTokens = 128;
  static constexpr int64_t kSumElements = 1 << 15;
  static constexpr int64_t kMaxColumns = 256;

  int64_t T, width, k, r, h;
  const Acc* v;
  Rows x;
  Mask mask;
  Acc scale;
  Param block;    // [k, ranks, w] by its strides; data == nullptr: not wanted
  Param general;  // [k, h, w] by its strides, k blocks along the wide dimension; likewise

  void run(int threads) const {
    const int64_t w = width / k;
    const int64_t ranks = r + h;
    int64_t columns = smaller(kMaxColumns, larger(kSumElements / ranks, kTile<Acc>));
    columns = smaller(columns, ceil_div(width, 4 * threads));
    columns = smaller(round_up(columns, kTile<Acc>), round_up(w, kTile<Acc>));
    const int64_t strips = ceil_div(w, columns);
    const ThreadBuffers<Acc> buffers(threads, ranks * columns + kTokens * (columns + ranks + kMaxRows) + columns);
    parallel_items(k * strips, threads, [&](int64_t item, int thread) {
      const int64_t b = item / strips, i0 = item % strips * columns;
      sum_strip(b, i0, smaller(columns, w - i0), buffers.of(thread));
    });
  }

 private:
  void sum_strip(int64_t b, int64_t i0, int64_t columns, Acc* sums) const {
    const int64_t padded = round_up(columns, kTile<Acc>), ldv = k * r + h;
    Acc* xs = sums + (r + h) * padded;
    Acc* ranks = xs + kTokens * padded;
    Acc* factor = ranks + kTokens * (r + h);
    for (int64_t i = 0; i < (r + h) * padded; i++) sums[i] = Acc(0);
    for (int64_t t0 = 0; t0 < T; t0 += kTokens) {
      const int64_t tokens = smaller(kTokens, T - t0);
      read_tiles<Acc>(x, t0, tokens, b * (width / k) + i0, columns, width, mask, xs, factor);
      add_tokens(tokens, v + t0 * ldv + b * r, r, xs, padded, ranks, sums);
      if (h > 0) add_tokens(tokens, v + t0 * ldv + k * r, h, xs, padded, ranks, sums + r * padded);
    }
    if (block.data != nullptr) write(block, b, i0, r, columns, padded, sums);
    if (h > 0 && general.data != nullptr) write(general, b, i0, h, columns, padded, sums + r * padded);
  }

  // sums[c, i] += sum_t v[t, c] * xs[t, i]; the ranks of a group lie together in `ranks`, so that a token is one line.
  void add_tokens(int64_t tokens, const Acc* from, int64_t count, const Acc* xs, int64_t padded, Acc* ranks,
                  Acc* sums) const {
    const int64_t ldv = k * r + h;
    for_row_groups(count, [&](auto mr, int64_t c0) {
      constexpr int MR = decltype(mr)::value;
      for (int64_t t = 0; t < tokens; t++)
        for (int m = 0; m < MR; m++) ranks[c0 * tokens + t * MR + m] = from[t * ldv + c0 + m];
    });
    for (int64_t i = 0; i < padded; i += kTile<Acc>)
      for_row_groups(count, [&](auto mr, int64_t c0) {
        constexpr int MR = decltype(mr)::value;
        constexpr int NV = 2;
        Vec<Acc> acc[MR][NV] = {};
        multiply<Acc, MR, NV>(tokens, ranks + c0 * tokens, 1, MR, xs + i * tokens, kTile<Acc>, acc);
        for (int m = 0; m < MR; m++)
          for (int vec = 0; vec < NV; vec++) {
            Acc* at = sums + (c0 + m) * padded + i + vec * kWidth<Acc>;
            store<Acc>(at, load<Acc>(at) + acc[m][vec]);
          }
      });
  }

  void write(const Param& to, int64_t b, int64_t i0, int64_t ranks, int64_t columns, int64_t padded,
             const Acc* sums) const {
    for_dtype<Acc>(to.dtype, [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      P* out = static_cast<P*>(to.data) + b * to.block_stride + i0 * to.column_stride;
      if (to.row_stride == 1 && to.column_stride != 1) {
        write_transposed(out, to.column_stride, ranks, columns, padded, sums);
        return;
      }
      for (int64_t c = 0; c < ranks; c++)
        for (int64_t i = 0; i < columns; i++)
          out[c * to.row_stride + i * to.column_stride] = from_acc<P>(scale * sums[c * padded + i]);
    });
  }

  template <class P>
  void write_transposed(P* out, int64_t stride, int64_t ranks, int64_t columns, int64_t padded, const Acc* sums) const {
    constexpr int64_t W = kWidth<Acc>;
    const int64_t whole_ranks = ranks / W * W, whole_columns = columns / W * W;
    Acc block[W * W];
    for (int64_t i = 0; i < whole_columns; i += W)
      for (int64_t c = 0; c < whole_ranks; c += W) {
        transpose_block<Acc>(sums + c * padded + i, padded, block, W);
        for (int64_t m = 0; m < W; m++) store<Acc>(out + (i + m) * stride + c, scale * load<Acc>(block + m * W));
      }
    for (int64_t i = 0; i < columns; i++)
      for (int64_t c = i < whole_columns ? whole_ranks : 0; c < ranks; c++)
        out[i * stride + c] = from_acc<P>(scale * sums[c * padded + i]);
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
