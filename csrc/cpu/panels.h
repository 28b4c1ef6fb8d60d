// SPDX-License-Identifier: Apache-2.0
// Blocks of a parameter as the right factor of the micro-kernel: read in place, or packed into a
// panel.
//
// A panel is a sequence of micro-panels, each of kNR columns and all rows of the block; the last
// one is padded with columns of zeros. A panel stays in L1 or L2 while the tokens of a segment are
// multiplied by it. A micro-panel is contiguous, because rows of a wide matrix are often a power
// of two apart and would share a few sets of L1.
#pragma once

#include "memory.h"
#include "rows.h"
#include "transpose.h"

namespace gralora::cpu::GRALORA_ISA {

// A block of a parameter as it is multiplied: a packed panel, or the parameter itself, whose
// columns kNR .. 2 kNR - 1 then are the second micro-panel, and so on.
template <class Acc>
struct Panel {
  const Acc* data = nullptr;
  int64_t micro_panel = 0;  // elements from one micro-panel to the next
  int64_t ld = 0;           // elements from one row to the next
  int64_t piece = 0;        // as in Source
  int pieces = 1;

  // The factor from `row` and `column` on; `column` is a multiple of the vector width.
  Source<Acc> from(int64_t row, int64_t column) const { return {at(row, column), ld, piece, pieces}; }
  const Acc* at(int64_t row, int64_t column) const {
    return data + column / kNR<Acc> * micro_panel + row * ld + column % kNR<Acc>;
  }
};

// The rows and columns of one block of a parameter that are read
struct BlockOf {
  const Param& param;
  int64_t block, row, rows, column, columns;
  int64_t offset() const { return block * param.block_stride + row * param.row_stride + column * param.column_stride; }
};

template <class Acc>
int64_t panel_size(int64_t rows, int64_t columns) {
  return rows * round_up(columns, kNR<Acc>);
}

template <class Acc, class P>
void pack_transposed(const P* from, int64_t column_stride, int64_t rows, int64_t columns, Acc* to) {
  constexpr int64_t W = kWidth<Acc>, ld = kNR<Acc>;
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t c0 = 0; c0 < ld; c0 += W) {
      const P* block = from + i + (c0 < columns ? c0 * column_stride : 0);
      Acc* transposed = to + i * ld + c0;
      if (i + W <= rows && c0 + W <= columns) {
        for (int64_t c = 0; c < W; c++) prefetch(address(block, 2 * W + c * column_stride));
        transpose_square<Acc>(block, column_stride, transposed, ld);
      } else {
        transpose_some<Acc>(block, column_stride, smaller(W, rows - i), columns - c0, transposed, ld);
      }
    }
}

template <class Acc, class P>
void pack_micro_panel(const P* from, const Param& param, int64_t rows, int64_t columns, Acc* to) {
  constexpr int64_t W = kWidth<Acc>, ld = kNR<Acc>;
  if (param.row_stride == 1 && param.column_stride != 1)
    return pack_transposed<Acc>(from, param.column_stride, rows, columns, to);
  const bool contiguous = param.column_stride == 1, whole = contiguous && columns == ld;
  for (int64_t i = 0; i < rows; i++, to += ld) {
    const P* row = from + i * param.row_stride;
    prefetch(address(row, 12 * param.row_stride));
    if (whole)
      for (int64_t c = 0; c < ld; c += W) store<Acc>(to + c, load<Acc>(row + c));
    else if (contiguous)
      for (int64_t c = 0; c < ld; c += W) store<Acc>(to + c, load_some<Acc>(row + smaller(c, columns), columns - c));
    else
      for (int64_t c = 0; c < ld; c++) to[c] = c < columns ? to_acc<Acc>(row[c * param.column_stride]) : Acc(0);
  }
}

// Packs a block into the panel_size() elements from `to` on.
template <class Acc>
Panel<Acc> pack_panel(const BlockOf& b, Acc* to) {
  for_dtype<Acc>(b.param.dtype, [&](auto* type) {
    using P = std::remove_pointer_t<decltype(type)>;
    const P* from = static_cast<const P*>(b.param.data) + b.offset();
    for (int64_t c = 0; c < b.columns; c += kNR<Acc>)
      pack_micro_panel<Acc>(from + c * b.param.column_stride, b.param, b.rows, smaller(kNR<Acc>, b.columns - c),
                            to + c * b.rows);
  });
  return {to, b.rows * kNR<Acc>, kNR<Acc>};
}

// The block as a panel: packed into `scratch`, or the parameter itself.
template <class Acc>
Panel<Acc> read_panel(Packing packing, const BlockOf& b, Acc* scratch) {
  if (packing == Packing::Packed) return pack_panel<Acc>(b, scratch);
  return {static_cast<const Acc*>(b.param.data) + b.offset(), kNR<Acc>, b.param.row_stride};
}

// Packs a block [ranks, columns] of a parameter, scaled, as the left factor, whose rows are the
// columns of the block. A group of MR of them is a left micro-panel, in the order that LeftPacked
// reads; it begins at `to` + its first column times the number of ranks. `panel` is scratch of
// panel_size().
template <class Acc>
void pack_left(Packing packing, const BlockOf& b, Acc scale, Acc* to, Acc* panel) {
  const Panel<Acc> from = read_panel<Acc>(packing, b, panel);
  for_row_groups(b.columns, [&](auto group, int64_t m0) {
    constexpr int MR = decltype(group)::value;
    for (int64_t m = 0, count; m < MR; m += count) {  // columns within one micro-panel of the block
      const int64_t column = (m0 + m) % kNR<Acc>;
      count = smaller(MR - m, kNR<Acc> - column);
      const Acc* rank = from.data + (m0 + m) / kNR<Acc> * from.micro_panel + column;
      Acc* packed = to + m0 * b.rows + m;
      for (int64_t q = 0; q < b.rows; q++, rank += from.ld, packed += MR)
        for (int64_t c = 0; c < count; c += kWidth<Acc>)
          store_some<Acc>(packed + c, scale * load_some<Acc>(rank + c, count - c), count - c);
    }
  });
}

}  // namespace gralora::cpu::GRALORA_ISA
