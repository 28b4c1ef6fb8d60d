// expand: from the ranks to a wide activation, added to base where there is one.
//
//   y[t, j*w + o] = base[t, j*w + o] + s * f * ( sum_c u[t, j*r + c] * Q[j][c, o]  +  sum_c u[t, k*r + c] * G[j][c, o] )
//
// w = width/k; f is the dropout factor of the element (1 where dropout is off). Forward: U, B, Bg^T give y. Backward: dH,
// A^T, Ag give dx. base is read once, y written once, in runs along the row; a block of Q's columns stays in L2 for all
// tokens of a tile. Each y is one sum in a fixed order, rounded once.
#pragma once

#include "panels.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Acc>
struct Expand {
  static constexpr int64_t kTileRows = 4 * kMaxRows;
  static constexpr int64_t kPanelElements = 1 << 17;  // of Q and G: half a MiB in float
  static constexpr int64_t kMaskColumns = 512;

  int64_t T, width, k, r, h;
  const Acc* u;
  const Panels<Acc>& Q;
  const Panels<Acc>& G;
  Acc scale;
  Mask mask;
  Rows base;  // data == nullptr: none
  Rows y;

  void run(int threads) const {
    for_dtype<Acc>(y.dtype, [&](auto* type) { run_typed<std::remove_pointer_t<decltype(type)>>(threads); });
  }

 private:
  int64_t columns_per_item(int64_t tiles, int threads) const {
    int64_t columns = kPanelElements / (r + h);
    if (mask.on) columns = smaller(columns, kMaskColumns);
    columns = smaller(columns, ceil_div(width * tiles, 4 * threads));  // few tokens: let every thread have some
    return larger(round_up(columns, kTile<Acc>), kTile<Acc>);
  }

  template <class Y>
  void run_typed(int threads) const {
    const int64_t w = width / k, tiles = ceil_div(T, kTileRows);
    const int64_t columns = smaller(columns_per_item(tiles, threads), round_up(w, kTile<Acc>));
    const int64_t strips = ceil_div(w, columns);
    const ThreadBuffers<Acc> factors(threads, mask.on ? kMaxRows * columns : 0);
    parallel_items(tiles * k * strips, threads, [&](int64_t item, int thread) {
      const int64_t first = item / (k * strips) * kTileRows, j = item / strips % k, o0 = item % strips * columns;
      for_row_groups(smaller(kTileRows, T - first), [&](auto mr, int64_t m0) {
        constexpr int MR = decltype(mr)::value;
        expand_rows<MR, Y>(first + m0, j, o0, smaller(columns, w - o0), factors.of(thread));
      });
    });
  }

  template <int MR, class Y>
  void expand_rows(int64_t t0, int64_t j, int64_t o0, int64_t columns, Acc* factor) const {
    const int64_t start = j * (width / k) + o0, ldu = k * r + h;
    Y* to[MR];
    const Y* from[MR];
    for (int m = 0; m < MR; m++) {
      to[m] = static_cast<Y*>(y.data) + row_offset(y, t0 + m) + start * y.column_stride;
      from[m] = base.data == nullptr
                    ? nullptr
                    : static_cast<const Y*>(base.data) + row_offset(base, t0 + m) + start * base.column_stride;
      if (mask.on) mask.factors(uint64_t((t0 + m) * width + start), columns, factor + m * columns);
    }
    const bool unit = y.column_stride == 1 && (base.data == nullptr || base.column_stride == 1);
    const Acc* ranks = u + t0 * ldu;
    for_column_tiles<Acc>(round_up(columns, kWidth<Acc>), [&](auto nv, int64_t c) {
      constexpr int NV = decltype(nv)::value;
      Vec<Acc> acc[MR][NV] = {};
      multiply<Acc, MR, NV>(r, ranks + j * r, ldu, 1, Q.at(j, 0, o0 + c), Q.ld(), acc);
      if (h > 0) multiply<Acc, MR, NV>(h, ranks + k * r, ldu, 1, G.at(j, 0, o0 + c), G.ld(), acc);
      if (unit && c + NV * kWidth<Acc> <= columns) {
        store_tile<MR, NV, Y>(acc, from, to, c, mask.on ? factor + c : nullptr, columns);
        return;
      }
      for (int m = 0; m < MR; m++)
        for (int v = 0; v < NV; v++) {
          const int64_t o = c + v * kWidth<Acc>;
          store_elements<Y>(acc[m][v], from[m], to[m], o, smaller(kWidth<Acc>, columns - o),
                            mask.on ? factor + m * columns + o : nullptr);
        }
    });
  }

  // All of base is loaded before y is stored: rows that lie 4096 bytes apart would make each load wait for a store.
  template <int MR, int NV, class Y>
  void store_tile(Vec<Acc> (&sum)[MR][NV], const Y* const (&from)[MR], Y* const (&to)[MR], int64_t c, const Acc* factor,
                  int64_t factor_stride) const {
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) {
        sum[m][v] *= scale;
        if (factor != nullptr)
          sum[m][v] = drop<Acc>(sum[m][v], load<Acc>(factor + m * factor_stride + v * kWidth<Acc>));
        if (base.data != nullptr) sum[m][v] += load<Acc>(from[m] + c + v * kWidth<Acc>);
      }
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) store<Acc>(to[m] + c + v * kWidth<Acc>, sum[m][v]);
  }

  template <class Y>
  void store_elements(Vec<Acc> sum, const Y* from, Y* to, int64_t o, int64_t count, const Acc* f) const {
    for (int64_t i = 0; i < count; i++) {
      Acc value = sum[i] * scale;
      if (f != nullptr) value = drop<Acc>(value, f[i]);
      if (from != nullptr) value += to_acc<Acc>(from[(o + i) * base.column_stride]);
      to[(o + i) * y.column_stride] = from_acc<Y>(value);
    }
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
