// Blocks of a parameter as the microkernel's `b`: [rows, columns] in the accumulation type, in tiles of kTile columns.
//
// A block that already lies like that, or that few tokens read, is used in place. Otherwise it is packed, tile by tile and
// padded with zeros, into scratch that stays in L1 or L2 while all tokens of a segment pass by: a packed tile is one run of
// memory, where rows of a wide matrix, a power of two apart, would fall into the same few sets of L1.
#pragma once

#include "memory.h"
#include "rows.h"
#include "transpose.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Acc>
struct Panel {
  const Acc* data = nullptr;
  int64_t tile = 0, ld = 0;

  // Row `row`, from `column`, a multiple of the vector width; ld to the next row.
  const Acc* at(int64_t row, int64_t column) const {
    return data + column / kTile<Acc> * tile + row * ld + column % kTile<Acc>;
  }
};

constexpr int64_t kPanelElements = 1 << 17;  // that L2 holds beside activations: half a MiB in float

template <class Acc>
int64_t panel_size(int64_t rows, int64_t columns) {
  return rows * round_up(columns, kTile<Acc>);
}

template <class Acc, class P>
void pack_transposed(const P* from, int64_t column_stride, int64_t rows, int64_t columns, Acc* to) {
  constexpr int64_t W = kWidth<Acc>, ld = kTile<Acc>;
  for (int64_t i = 0; i < rows; i += W)
    for (int64_t c0 = 0; c0 < ld; c0 += W) {
      const P* block = from + i + c0 * column_stride;
      Acc* transposed = to + i * ld + c0;
      if (i + W <= rows && c0 + W <= columns) {
        for (int64_t c = 0; c < W; c++) __builtin_prefetch(block + 2 * W + c * column_stride);
        transpose_block<Acc>(block, column_stride, transposed, ld);
      } else {
        transpose_some<Acc>(block, column_stride, smaller(W, rows - i), columns - c0, transposed, ld);
      }
    }
}

template <class Acc, class P>
void pack_tile(const P* from, const Param& param, int64_t rows, int64_t columns, Acc* to) {
  constexpr int64_t W = kWidth<Acc>, ld = kTile<Acc>;
  if (param.row_stride == 1 && param.column_stride != 1)
    return pack_transposed<Acc>(from, param.column_stride, rows, columns, to);
  const bool in_run = param.column_stride == 1, whole = in_run && columns == ld;
  for (int64_t i = 0; i < rows; i++, from += param.row_stride, to += ld) {
    __builtin_prefetch(from + 12 * param.row_stride);
    if (whole)
      for (int64_t c = 0; c < ld; c += W) store<Acc>(to + c, load<Acc>(from + c));
    else if (in_run)
      for (int64_t c = 0; c < ld; c += W) store<Acc>(to + c, load_some<Acc>(from + c, columns - c));
    else
      for (int64_t c = 0; c < ld; c++) to[c] = c < columns ? to_acc<Acc>(from[c * param.column_stride]) : Acc(0);
  }
}

// The rows and columns from `offset` on, in tiles one after the other: panel_size elements
template <class Acc>
Panel<Acc> pack_panel(const Param& param, int64_t offset, int64_t rows, int64_t columns, Acc* to) {
  for_dtype<Acc>(param.dtype, [&](auto* type) {
    using P = std::remove_pointer_t<decltype(type)>;
    const P* from = static_cast<const P*>(param.data) + offset;
    for (int64_t c = 0; c < columns; c += kTile<Acc>)
      pack_tile<Acc>(from + c * param.column_stride, param, rows, smaller(kTile<Acc>, columns - c), to + c * rows);
  });
  return {to, rows * kTile<Acc>, kTile<Acc>};
}

// Rows [row0, row0 + rows) and columns [column0, column0 + columns) of block `block`; `uses`: how many tokens will read it.
// `scratch` holds panel_size elements.
template <class Acc>
Panel<Acc> read_panel(const Param& param, int64_t block, int64_t row0, int64_t rows, int64_t column0, int64_t columns,
                      int64_t uses, Acc* scratch) {
  constexpr int64_t kUsesWorthPacking = 3 * kMaxRows;
  const int64_t offset = block * param.block_stride + row0 * param.row_stride + column0 * param.column_stride;
  const bool usable = param.dtype == DTypeOf<Acc>::value && param.column_stride == 1 && columns % kWidth<Acc> == 0;
  if (usable && (uses < kUsesWorthPacking || (columns <= kTile<Acc> && param.row_stride == columns)))
    return {static_cast<const Acc*>(param.data) + offset, kTile<Acc>, param.row_stride};
  return pack_panel<Acc>(param, offset, rows, columns, scratch);
}

}  // namespace gralora::cpu::GRALORA_ISA
