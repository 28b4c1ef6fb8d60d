// SPDX-License-Identifier: Apache-2.0
// What becomes of the sums of weight gradients: segments of tokens are added in their order, then
// the gradients are written.
#pragma once

#include "panels.h"

namespace gralora::cpu::GRALORA_ISA {

// The sums of a weight gradient and its general part, chunk by chunk: a total, and a slot for each
// further segment of a wave. Where there is one segment only, a chunk's sums are written out at
// once and need no place here.
template <class Acc>
struct Totals {
  const Chunks& chunks;
  int64_t r, h;
  Param block, general;  // the gradients [k, r, w] and [k, h, w]; data == nullptr: not wanted
  Acc scale;
  Acc* sums = nullptr;

  bool wanted() const { return block.data != nullptr || general.data != nullptr; }
  int64_t size() const { return (r + h) * kMostColumns; }  // of a chunk's sums
  void reserve(Scratch& scratch, int64_t slots) {
    if (wanted()) sums = scratch.take<Acc>((slots + 1) * chunks.count * size());
  }
  Acc* total(int64_t chunk) const { return sums + chunk * size(); }
  // Where a segment's sums go: the first one of all straight to the total
  Acc* slot(bool first, int64_t segment, int64_t chunk) const {
    return first && segment == 0 ? total(chunk) : sums + ((segment + 1) * chunks.count + chunk) * size();
  }
  // Adds a wave's segments to the total in their order; after the last wave writes the gradients.
  void finish(bool first, bool last, int64_t segments, int64_t chunk) const {
    Acc* to = total(chunk);
    for (int64_t s = first ? 1 : 0; s < segments; s++) {
      const Acc* from = slot(first, s, chunk);
      for (int64_t c = 0; c < r + h; c++)
        for (int64_t o = 0; o < chunks.length(chunk); o++) to[c * kMostColumns + o] += from[c * kMostColumns + o];
    }
    if (first && segments == 0)  // no tokens
      for (int64_t o = 0; o < size(); o++) to[o] = Acc(0);
    if (last) write(chunk, to);
  }
  void write(int64_t chunk, const Acc* from) const {
    const int64_t b = chunks.block(chunk), i = chunks.first(chunk), columns = chunks.length(chunk);
    if (block.data != nullptr) write_block(block, b, i, r, columns, from);
    if (general.data != nullptr) write_block(general, b, i, h, columns, from + r * kMostColumns);
  }

 private:
  // One chunk's sums, scaled, as columns [first, first + columns) of block b of the gradient
  // [k, ranks, w]
  void write_block(const Param& to, int64_t b, int64_t first, int64_t ranks, int64_t columns, const Acc* sums) const {
    for_dtype<Acc>(to.dtype, [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      P* out = static_cast<P*>(to.data) + b * to.block_stride + first * to.column_stride;
      if (to.row_stride == 1 && to.column_stride != 1) return write_transposed(out, to, ranks, columns, sums);
      for (int64_t c = 0; c < ranks; c++) {
        int64_t i = 0;
        if (to.column_stride == 1) {
          const auto scaled = [&](int64_t at) { return scale * load<Acc>(sums + c * kMostColumns + at); };
          P* row = out + c * to.row_stride;
          for (; i + kNR<Acc> <= columns; i += kNR<Acc>) {
            const Vec<Acc> both[2] = {scaled(i), scaled(i + kWidth<Acc>)};
            store_row<Acc, P, 2>(row + i, both);
          }
          for (; i < columns; i += kWidth<Acc>) store_some<Acc>(row + i, scaled(i), columns - i);
          continue;
        }
        for (; i < columns; i++)
          out[c * to.row_stride + i * to.column_stride] = from_acc<P>(scale * sums[c * kMostColumns + i]);
      }
    });
  }

  // A cache line of a row at a time, where there are as many ranks
  template <class P>
  void write_transposed(P* out, const Param& to, int64_t ranks, int64_t columns, const Acc* sums) const {
    constexpr int64_t W = kWidth<Acc>;
    for (int64_t i = 0; i < columns; i += W) {
      int64_t c = 0;
      if (i + W <= columns) {
        if constexpr (sizeof(P) < sizeof(Acc))
          for (; c + 2 * W <= ranks; c += 2 * W)
            write_blocks<2>(out + i * to.column_stride + c, to, sums + c * kMostColumns + i);
        for (; c + W <= ranks; c += W) write_blocks<1>(out + i * to.column_stride + c, to, sums + c * kMostColumns + i);
      }
      for (; c < ranks; c += W)
        write_edge(out + i * to.column_stride + c, to, smaller(W, columns - i), ranks - c, sums + c * kMostColumns + i);
    }
  }

  // A vector of columns by NV vectors of ranks
  template <int NV, class P>
  void write_blocks(P* out, const Param& to, const Acc* sums) const {
    constexpr int64_t W = kWidth<Acc>;
    Acc blocks[NV][W * W];
    for (int v = 0; v < NV; v++) transpose_block<Acc>(sums + v * W * kMostColumns, kMostColumns, blocks[v], W);
    for (int64_t m = 0; m < W; m++) {
      Vec<Acc> row[NV];
      for (int v = 0; v < NV; v++) row[v] = scale * load<Acc>(blocks[v] + m * W);
      P* at = out + m * to.column_stride;
      store_row<Acc, P, NV>(at, row);
      if (NV == 2)
        prefetch<1>(address(at, 2 * W));  // the line of the ranks that follow: each row is far from the last one
    }
  }

  // At most a vector of columns by at most a vector of ranks
  template <class P>
  void write_edge(P* out, const Param& to, int64_t columns, int64_t ranks, const Acc* sums) const {
    constexpr int64_t W = kWidth<Acc>;
    Acc block[W * W];
    transpose_some<Acc>(sums, kMostColumns, columns, ranks, block, W);
    for (int64_t m = 0; m < columns; m++)
      store_some<Acc>(out + m * to.column_stride, scale * load<Acc>(block + m * W), ranks);
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
