// Parameters as panels: blocks of [rows, columns] in the accumulation type, whose columns are read in tiles of kTile.
//
// A parameter that already has unit column stride is used where it lies, as long as few tokens read it. Otherwise it is
// packed once per call, tile by tile: [block][tile][row][kTile], padded with zeros. A packed tile is one run of memory,
// where rows of a wide matrix, a power of two apart, would fall into the same few sets of the L1 cache.
#pragma once

#include "memory.h"
#include "rows.h"
#include "transpose.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Acc>
class Panels {
 public:
  Panels() = default;

  // `param` gives [blocks, rows, columns]; `uses`: how many tokens (or rows of a weight) will read each row.
  void prepare(const Param& param, int64_t blocks, int64_t rows, int64_t columns, int64_t uses, int threads) {
    const bool usable = param.dtype == DTypeOf<Acc>::value && param.column_stride == 1 && columns % kWidth<Acc> == 0;
    if (usable && (uses < kUsesWorthPacking || (columns <= kTile<Acc> && param.row_stride == columns))) {
      data_ = static_cast<const Acc*>(param.data);
      block_stride_ = param.block_stride, tile_stride_ = kTile<Acc>, ld_ = param.row_stride;
      return;
    }
    const int64_t tiles = ceil_div(columns, kTile<Acc>), strips = ceil_div(rows, kStrip);
    ld_ = kTile<Acc>, tile_stride_ = rows * ld_, block_stride_ = tiles * tile_stride_;
    packed_.reserve(blocks * block_stride_);
    data_ = packed_.get();
    for_dtype<Acc>(param.dtype, [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      parallel_items(blocks * tiles * strips, threads, [&](int64_t item, int) {
        const int64_t block = item / (tiles * strips), tile = item / strips % tiles, row0 = item % strips * kStrip;
        const int64_t column0 = tile * kTile<Acc>;
        pack<P>(static_cast<const P*>(param.data) + block * param.block_stride + row0 * param.row_stride +
                    column0 * param.column_stride,
                param, smaller(kStrip, rows - row0), smaller(kTile<Acc>, columns - column0),
                packed_.get() + block * block_stride_ + tile * tile_stride_ + row0 * ld_);
      });
    });
  }

  // Row `row`, from `column`, a multiple of the vector width; ld() to the next row.
  const Acc* at(int64_t block, int64_t row, int64_t column) const {
    return data_ + block * block_stride_ + column / kTile<Acc> * tile_stride_ + row * ld_ + column % kTile<Acc>;
  }
  int64_t ld() const { return ld_; }

 private:
  static constexpr int64_t kStrip = 256;
  static constexpr int64_t kUsesWorthPacking = 64;

  template <class P>
  static void pack(const P* from, const Param& param, int64_t rows, int64_t columns, Acc* to) {
    constexpr int64_t W = kWidth<Acc>;
    int64_t i0 = 0;
    if (param.row_stride == 1 && param.column_stride != 1 && columns == kTile<Acc>) {
      for (; i0 + W <= rows; i0 += W)
        for (int64_t c0 = 0; c0 < columns; c0 += W)
          transpose_block<Acc>(from + i0 + c0 * param.column_stride, param.column_stride, to + i0 * kTile<Acc> + c0,
                               kTile<Acc>);
    }
    for (int64_t i = i0; i < rows; i++) {
      convert_row<Acc>(from + i * param.row_stride, param.column_stride, columns, to + i * kTile<Acc>);
      for (int64_t c = columns; c < kTile<Acc>; c++) to[i * kTile<Acc> + c] = Acc(0);
    }
  }

  const Acc* data_ = nullptr;
  int64_t block_stride_ = 0, tile_stride_ = 0, ld_ = 0;
  Buffer<Acc> packed_;
};

// The general part's parameter seen as k blocks along its wide dimension, and any parameter transposed.
inline Param blocks_of_rows(Param p, int64_t rows_per_block) {
  p.block_stride = rows_per_block * p.row_stride;
  return p;
}
inline Param blocks_of_columns(Param p, int64_t columns_per_block) {
  p.block_stride = columns_per_block * p.column_stride;
  return p;
}
inline Param transposed(Param p) {
  const int64_t row_stride = p.row_stride;
  p.row_stride = p.column_stride, p.column_stride = row_stride;
  return p;
}

}  // namespace gralora::cpu::GRALORA_ISA
