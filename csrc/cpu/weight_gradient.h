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
    const ThreadBuffers<Acc> buffers(threads, (ranks + kTokens + 1) * columns);
    parallel_items(k * strips, threads, [&](int64_t item, int thread) {
      const int64_t b = item / strips, i0 = item % strips * columns;
      Acc* sums = buffers.of(thread);
      sum_strip(b, i0, smaller(columns, w - i0), sums, sums + ranks * columns, sums + (ranks + kTokens) * columns);
    });
  }

 private:
  void sum_strip(int64_t b, int64_t i0, int64_t columns, Acc* sums, Acc* scratch, Acc* factor) const {
    const int64_t padded = round_up(columns, kWidth<Acc>), ldv = k * r + h;
    for (int64_t i = 0; i < (r + h) * padded; i++) sums[i] = Acc(0);
    for (int64_t t0 = 0; t0 < T; t0 += kTokens) {
      const int64_t tokens = smaller(kTokens, T - t0);
      const Panel<Acc> xs =
          read_rows<Acc>(x, t0, tokens, b * (width / k) + i0, columns, width, true, mask, scratch, factor);
      add_tokens(tokens, v + t0 * ldv + b * r, r, xs, padded, sums);
      if (h > 0) add_tokens(tokens, v + t0 * ldv + k * r, h, xs, padded, sums + r * padded);
    }
    if (block.data != nullptr) write(block, b, i0, r, columns, padded, sums);
    if (h > 0 && general.data != nullptr) write(general, b, i0, h, columns, padded, sums + r * padded);
  }

  void add_tokens(int64_t tokens, const Acc* ranks, int64_t count, Panel<Acc> xs, int64_t padded, Acc* sums) const {
    const int64_t ldv = k * r + h;
    for_row_groups(count, [&](auto mr, int64_t c0) {
      constexpr int MR = decltype(mr)::value;
      for_column_tiles<Acc>(padded, [&](auto nv, int64_t i) {
        constexpr int NV = decltype(nv)::value;
        Vec<Acc> acc[MR][NV] = {};
        multiply<Acc, MR, NV>(tokens, ranks + c0, 1, ldv, xs.data + i, xs.ld, acc);
        for (int m = 0; m < MR; m++)
          for (int vec = 0; vec < NV; vec++) {
            Acc* at = sums + (c0 + m) * padded + i + vec * kWidth<Acc>;
            store<Acc>(at, load<Acc>(at) + acc[m][vec]);
          }
      });
    });
  }

  void write(const Param& to, int64_t b, int64_t i0, int64_t ranks, int64_t columns, int64_t padded,
             const Acc* sums) const {
    for_dtype(to.dtype, [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      P* out = static_cast<P*>(to.data) + b * to.block_stride + i0 * to.column_stride;
      // The inner loop runs along the unit stride of the output.
      if (to.row_stride == 1)
        for (int64_t i = 0; i < columns; i++)
          for (int64_t c = 0; c < ranks; c++) out[i * to.column_stride + c] = from_acc<P>(scale * sums[c * padded + i]);
      else
        for (int64_t c = 0; c < ranks; c++)
          for (int64_t i = 0; i < columns; i++)
            out[c * to.row_stride + i * to.column_stride] = from_acc<P>(scale * sums[c * padded + i]);
    });
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
