// expand: from the ranks to a wide activation, added to base where there is one.
//
//   y[t, j*w + o] = base[t, j*w + o] + f * ( sum_c s u[t, j*r + c] * Q[j][c, o]  +  sum_c s u[t, k*r + c] * G[j][c, o] )
//
// w = width/k; f is the dropout factor of the element (1 where dropout is off). Forward: U, B, Bg^T give y. Backward: dH,
// A^T, Ag give dx. base is read once, y written once (they may be the same memory), in runs along the row; a strip of Q's
// columns stays in L1 or L2 for all tokens of a segment. Each y is one sum in a fixed order, rounded once.
#pragma once

#include "panels.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Acc>
struct Expand {
  int64_t width, k, r, h;
  Param Q;  // [k, r, w]
  Param G;  // [k, h, w]
  Acc scale;
  Mask mask;
  Rows base;  // data == nullptr: none
  Rows y;

  struct Panels {
    Panel<Acc> Q, G;
  };
  int64_t panels_size(int64_t columns) const { return panel_size<Acc>(r, columns) + panel_size<Acc>(h, columns); }
  // `columns` from `first` on within block j
  Panels read_panels(int64_t j, int64_t first, int64_t columns, int64_t uses, Acc* scratch) const {
    Panels panels{read_panel<Acc>(Q, j, 0, r, first, columns, uses, scratch), {}};
    if (h > 0) panels.G = read_panel<Acc>(G, j, 0, h, first, columns, uses, scratch + panel_size<Acc>(r, columns));
    return panels;
  }

  // The ranks that meet block j, scaled, of `count` tokens, as run_rows takes them: row group by row group, (r + h) * count
  // in all, and a vector more.
  void read_ranks(const Acc* u, int64_t j, int64_t count, Acc* to) const {
    const int64_t ldu = k * r + h;
    for_row_groups(count, [&](auto mr, int64_t m) {
      constexpr int MR = decltype(mr)::value;
      interleave_rows<MR>(u + m * ldu + j * r, ldu, count - m, r, scale, to + m * (r + h));
      interleave_rows<MR>(u + m * ldu + k * r, ldu, count - m, h, scale, to + m * (r + h) + r * MR);
    });
  }

  // MR tokens from t0 on; draws: those of their elements, where there is a mask.
  template <int MR, class Y>
  void run_rows(const Panels& panels, int64_t t0, int64_t j, int64_t first, int64_t columns, const Acc* ranks,
                const uint16_t* draws, Prefetch prefetch) const {
    const int64_t start = j * (width / k) + first;
    Y* to[MR];
    const Y* from[MR];
    for (int m = 0; m < MR; m++) {
      to[m] = static_cast<Y*>(y.data) + row_offset(y, t0 + m) + start * y.column_stride;
      from[m] = base.data == nullptr
                    ? nullptr
                    : static_cast<const Y*>(base.data) + row_offset(base, t0 + m) + start * base.column_stride;
    }
    const bool unit = y.column_stride == 1 && (base.data == nullptr || base.column_stride == 1);
    for_column_tiles<Acc>(round_up(columns, kWidth<Acc>), [&](auto nv, int64_t c) {
      constexpr int NV = decltype(nv)::value;
      Vec<Acc> acc[MR][NV] = {};
      multiply<Acc, 1, MR>(r, ranks, panels.Q.at(0, c), panels.Q.ld, acc, [&](int64_t p) {
        if (p < NV * kWidth<Acc>) prefetch.rows<MR>(p);
      });
      prefetch.data += NV * kWidth<Acc> * prefetch.size;
      if (h > 0) multiply<Acc, 1, MR>(h, ranks + r * MR, panels.G.at(0, c), panels.G.ld, acc);
      if (unit && c + NV * kWidth<Acc> <= columns) {
        store_tile<MR, NV, Y>(acc, from, to, c, draws);
        return;
      }
      for_accumulators<MR, NV>([&](int m, int v) {
        const int64_t o = c + v * kWidth<Acc>;
        store_elements<Y>(acc[m][v], from[m], to[m], o, smaller(kWidth<Acc>, columns - o), draws + m * kChunk);
      });
    });
  }

 private:
  // All of base is loaded before y is stored: rows that lie 4096 bytes apart would make each load wait for a store.
  template <int MR, int NV, class Y>
  inline __attribute__((always_inline)) void store_tile(Vec<Acc> (&sum)[MR][NV], const Y* const (&from)[MR],
                                                        Y* const (&to)[MR], int64_t c, const uint16_t* draws) const {
    for_accumulators<MR, NV>([&](int m, int v) {
      if (mask.on) sum[m][v] = mask.drop(sum[m][v], draws + m * kChunk + c + v * kWidth<Acc>);
      if (base.data != nullptr) sum[m][v] += load<Acc>(from[m] + c + v * kWidth<Acc>);
    });
    for_accumulators<MR, 1>([&](int m, int) { store_row<Acc, Y, NV>(to[m] + c, sum[m]); });
  }

  template <class Y>
  __attribute__((noinline)) void store_elements(Vec<Acc> sum, const Y* from, Y* to, int64_t o, int64_t count,
                                                const uint16_t* draws) const {
    for (int64_t i = 0; i < count; i++) {
      Acc value = sum[i];
      if (mask.on) value = mask.drop(value, draws[o + i]);
      if (from != nullptr) value += to_acc<Acc>(from[(o + i) * base.column_stride]);
      to[(o + i) * y.column_stride] = from_acc<Y>(value);
    }
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
