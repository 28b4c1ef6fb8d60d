// SPDX-License-Identifier: Apache-2.0
// What becomes of the sums of weight gradients: the sums of all segments are added in the order of
// the segments, and then the gradients are written.
#pragma once

#include "panels.h"

namespace gralora::cpu::GRALORA_ISA {

// The sums of a weight gradient and of its general part, chunk by chunk. Each chunk has a total,
// and a slot for each segment of a wave. Where there is only one segment, the sums of a chunk are
// written to the gradient at once, and need no place here.
template <class Acc>
struct Totals {
  const Chunks& chunks;
  int64_t r, h;
  Param block, general;  // the gradients [k, r, w] and [k, h, w]; data == nullptr: not wanted
  Acc scale;
  Acc* sums = nullptr;

  bool wanted() const { return block.data != nullptr || general.data != nullptr; }
  int64_t size() const { return (r + h) * kMostColumns; }  // elements of the sums of a chunk
  void reserve(Scratch& scratch, int64_t slots) {
    if (wanted()) sums = scratch.take<Acc>((slots + 1) * chunks.count * size());
  }
  Acc* total(int64_t chunk) const { return sums + chunk * size(); }
  // Where the sums of a segment go. Those of the very first segment go straight to the total.
  Acc* slot(bool first, int64_t segment, int64_t chunk) const {
    return first && segment == 0 ? total(chunk) : sums + ((segment + 1) * chunks.count + chunk) * size();
  }
  // Adds the segments of a wave to the total in their order. After the last wave it writes the
  // gradients.
  void finish(bool first, bool last, int64_t segments, int64_t chunk) const {
    Acc* to = total(chunk);
    for (int64_t s = first ? 1 : 0; s < segments; s++) {
      const Acc* from = slot(first, s, chunk);
      for (int64_t c = 0; c < r + h; c++)
        for (int64_t o = 0; o < chunks.length(chunk); o++) to[c * kMostColumns + o] += from[c * kMostColumns + o];
    }
    if (first && segments == 0)  // there are no tokens
      for (int64_t o = 0; o < size(); o++) to[o] = Acc(0);
    if (last) write(chunk, to);
  }
  void write(int64_t chunk, const Acc* from) const {
    const int64_t b = chunks.block(chunk), i = chunks.first(chunk), columns = chunks.length(chunk);
    if (block.data != nullptr) write_block(block, b, i, r, columns, from);
    if (general.data != nullptr) write_block(general, b, i, h, columns, from + r * kMostColumns);
  }

 private:
  // Writes the sums of a chunk, scaled, as columns [first, first + columns) of block b of the
  // gradient [k, ranks, w].
  void write_block(const Param& to, int64_t b, int64_t first, int64_t ranks, int64_t columns, const Acc* sums) const {
    for_dtype<Acc>(to.dtype, [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      P* out = static_cast<P*>(to.data) + b * to.block_stride + first * to.column_stride;
      if (to.row_stride == 1 && to.column_stride != 1) return write_transposed(out, to, ranks, columns, sums);
      for (int64_t c = 0; c < ranks; c++) {
        const Acc* row = sums + c * kMostColumns;
        P* at = out + c * to.row_stride;
        if (to.column_stride == 1)
          for (int64_t i = 0; i < columns; i += kWidth<Acc>)
            store_some<Acc>(at + i, scale * load<Acc>(row + i), columns - i);
        else
          for (int64_t i = 0; i < columns; i++) at[i * to.column_stride] = from_acc<P>(scale * row[i]);
      }
    });
  }

  // The same where the elements of a column of the gradient are contiguous: squares of sums are
  // transposed first.
  template <class P>
  void write_transposed(P* out, const Param& to, int64_t ranks, int64_t columns, const Acc* sums) const {
    constexpr int64_t W = kWidth<Acc>;
    for (int64_t i = 0; i < columns; i += W)
      for (int64_t c = 0; c < ranks; c += W) {
        const Acc* from = sums + c * kMostColumns + i;
        const int64_t rows = smaller(W, columns - i);
        Acc square[W * W];
        if (rows == W && c + W <= ranks)
          transpose_square<Acc>(from, kMostColumns, square, W);
        else
          transpose_some<Acc>(from, kMostColumns, rows, ranks - c, square, W);
        for (int64_t m = 0; m < rows; m++)
          store_some<Acc>(out + (i + m) * to.column_stride + c, scale * load<Acc>(square + m * W), ranks - c);
      }
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
