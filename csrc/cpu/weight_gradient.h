// weight_gradient: sums over tokens of rank times wide activation, for one chunk of columns of one block.
//
//   sums[c, i] = sum_t v[t, b*r + c] * x'[t, column + i]   c = 0 .. r-1       sums[r + c, i] = sum_t v[t, k*r + c] * x'[...]
//
// x' is x after dropout. U and g give dB and dBg; dH and x give dA and dAg. Tokens are taken in blocks of kTokens, each
// summed in registers, then added in order, so that long sums lose less; `sums` stays in L2.
#pragma once

#include "panels.h"

namespace gralora::cpu::GRALORA_ISA {

constexpr int64_t kTokens = 128;

template <class Acc>
struct WeightGradient {
  int64_t k, r, h;

  // The ranks of `count` tokens that meet block b, as add() takes them: (r + h) * count, and a vector beyond
  void read_ranks(const Acc* v, int64_t b, int64_t count, Acc* to) const {
    read_group(v + b * r, r, count, to);
    read_group(v + k * r, h, count, to + r * count);
  }

  // sums (+)= the part of tokens first .. first + tokens of the `count` in `ranks`; x: their rows; ahead: those of as many
  // tokens, which will be read next.
  void add(const Acc* ranks, int64_t count, int64_t first, int64_t tokens, Source<Acc> x, int64_t columns,
           bool accumulate, Acc* sums, Prefetch ahead) const {
    if (x.ld == kRow<Acc>)
      add_rows<kRow<Acc>>(ranks, count, first, tokens, x, columns, accumulate, sums, ahead);
    else
      add_rows<0>(ranks, count, first, tokens, x, columns, accumulate, sums, ahead);
  }

  // One chunk's sums, scaled, as columns [first, first + columns) of block b of the gradient [k, ranks, w]
  static void write(const Param& to, int64_t b, int64_t first, int64_t ranks, int64_t columns, Acc scale,
                    const Acc* sums) {
    for_dtype<Acc>(to.dtype, [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      P* out = static_cast<P*>(to.data) + b * to.block_stride + first * to.column_stride;
      if (to.row_stride == 1 && to.column_stride != 1) return write_transposed(out, to, ranks, columns, scale, sums);
      for (int64_t c = 0; c < ranks; c++) {
        int64_t i = 0;
        if (to.column_stride == 1)
          for (; i + kWidth<Acc> <= columns; i += kWidth<Acc>)
            store<Acc>(out + c * to.row_stride + i, scale * load<Acc>(sums + c * kChunk + i));
        for (; i < columns; i++)
          out[c * to.row_stride + i * to.column_stride] = from_acc<P>(scale * sums[c * kChunk + i]);
      }
    });
  }

 private:
  // ldx: the distance of x's rows where it is known, which saves 2 %; else 0
  template <int ldx>
  void add_rows(const Acc* ranks, int64_t count, int64_t first, int64_t tokens, Source<Acc> x, int64_t columns,
                bool accumulate, Acc* sums, Prefetch ahead) const {
    int64_t groups = 0;  // of ranks: each fetches its part of what lies ahead
    for_row_groups(r, [&](auto, int64_t) { groups++; });
    for_column_tiles<Acc>(round_up(columns, kWidth<Acc>), [&](auto nv, int64_t i) {
      constexpr int NV = decltype(nv)::value;
      int64_t begun = 0;
      const auto add_group = [&](int64_t group, const Acc* from, Acc* to) {
        for_row_groups(group, [&](auto mr, int64_t c) {
          constexpr int MR = decltype(mr)::value;
          const Acc* a = from + c * count + first * MR;
          int64_t turn = begun++ * kSteps;
          tile<MR, NV, ldx>(tokens, a, x.data + i, x.ld, accumulate, to + c * kChunk + i, [&](int64_t t) {
            if (t == turn) ahead.template rows_of<NV * kWidth<Acc>>(t, i), turn += groups * kSteps;
          });
        });
      };
      add_group(r, ranks, sums);
      add_group(h, ranks + r * count, sums + r * kChunk);
    });
  }

  // A function of its own, as in Expand.
  template <int MR, int NV, int ldx, class Each>
  __attribute__((noinline)) static void tile(int64_t tokens, const Acc* ranks, const Acc* x, int64_t any_ldx,
                                             bool accumulate, Acc* sums, Each&& each) {
    Vec<Acc> acc[MR][NV] = {};
    multiply_packed<Acc>(tokens, ranks, x, ldx > 0 ? ldx : any_ldx, acc, each);
    for_accumulators<MR, NV>([&](int m, int v) {
      Acc* at = sums + m * kChunk + v * kWidth<Acc>;
      store<Acc>(at, accumulate ? load<Acc>(at) + acc[m][v] : acc[m][v]);
    });
  }

  // to[c*count + t*MR + m] = v[t, c + m] for each group of MR ranks
  void read_group(const Acc* v, int64_t group, int64_t count, Acc* to) const {
    for_row_groups(group, [&](auto mr, int64_t c) {
      constexpr int MR = decltype(mr)::value;
      for (int64_t t = 0; t < count; t++) memcpy(to + c * count + t * MR, v + t * (k * r + h) + c, MR * sizeof(Acc));
    });
  }

  template <class P>
  static void write_transposed(P* out, const Param& to, int64_t ranks, int64_t columns, Acc scale, const Acc* sums) {
    constexpr int64_t W = kWidth<Acc>;
    const int64_t whole_ranks = ranks / W * W, whole_columns = columns / W * W;
    Acc block[W * W];
    for (int64_t i = 0; i < whole_columns; i += W)
      for (int64_t c = 0; c < whole_ranks; c += W) {
        transpose_block<Acc>(sums + c * kChunk + i, kChunk, block, W);
        for (int64_t m = 0; m < W; m++)
          store<Acc>(out + (i + m) * to.column_stride + c, scale * load<Acc>(block + m * W));
      }
    for (int64_t i = 0; i < columns; i++)
      for (int64_t c = i < whole_columns ? whole_ranks : 0; c < ranks; c++)
        out[i * to.column_stride + c] = from_acc<P>(scale * sums[c * kChunk + i]);
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
