// SPDX-License-Identifier: Apache-2.0
// Blocks of a parameter as the microkernel's `b`: [rows, columns] in the accumulation type, in
// tiles of kTile columns.
//
// A block that already lies like that, or that few tokens read, is used in place. Otherwise it is
// packed, tile by tile and padded with zeros, into scratch that stays in L1 or L2 while all tokens
// of a segment pass by: a packed tile is one run of memory, where rows of a wide matrix, a power of
// two apart, would fall into the same few sets of L1.
#pragma once

#include "memory.h"
#include "rows.h"
#include "transpose.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Acc>
struct Panel {
  const Acc* data = nullptr;
  int64_t tile = 0, ld = 0;
  int64_t piece = 0;  // as in Source
  int pieces = 1;

  Source<Acc> from(int64_t row, int64_t column) const { return {at(row, column), ld, piece, pieces}; }

  // Row `row`, from `column`, a multiple of the vector width; ld to the next row.
  const Acc* at(int64_t row, int64_t column) const {
    return data + column / kTile<Acc> * tile + row * ld + column % kTile<Acc>;
  }
};

// A part of a parameter that will be packed next, fetched into L2 a few lines at a time while
// arithmetic goes on.
struct Ahead {
  uintptr_t data = address(kNothing);
  int64_t runs = 0, bytes = 0, stride = 0;  // what is left: runs of `bytes`, from each to the next
  int64_t at = 0, lines = 0;                // in the first of them; those of a fetch()

  // Rows [row0, row0 + rows) and columns [column0, column0 + columns) of a block, in `calls` calls
  static Ahead of(const Param& param, int64_t block, int64_t row0, int64_t rows, int64_t column0, int64_t columns,
                  int64_t calls) {
    const int64_t size = size_of(param.dtype);
    const int64_t offset = block * param.block_stride + row0 * param.row_stride + column0 * param.column_stride;
    const bool in_rows = param.column_stride == 1;
    if (!in_rows && param.row_stride != 1) return {};
    const int64_t stride = (in_rows ? param.row_stride : param.column_stride) * size;
    return of_runs(address(static_cast<const char*>(param.data), offset * size), in_rows ? rows : columns,
                   (in_rows ? columns : rows) * size, stride, calls);
  }
  // `columns` of `rows` rows
  static Ahead of_rows(const Prefetch& from, int64_t rows, int64_t columns, int64_t calls) {
    return from.row == 0 ? Ahead{} : of_runs(from.data, rows, columns * from.size, from.row, calls);
  }
  static Ahead of_runs(uintptr_t data, int64_t runs, int64_t bytes, int64_t stride, int64_t calls) {
    if (stride == bytes) bytes *= runs, runs = 1;
    return {data, runs, bytes, stride, 0, ceil_div(runs * ceil_div(bytes, 64), larger(calls, 1))};
  }

  void fetch() {
    for (int64_t left = lines; left > 0 && runs > 0;) {
      const int64_t count = smaller(left, ceil_div(bytes - at, 64));
      uintptr_t line = data + uintptr_t(at);
#pragma GCC unroll 4
      for (int64_t i = 0; i < count; i++, line += 64) prefetch<0, 2>(line);
      left -= count, at += count * 64;
      if (at >= bytes) at = 0, data += uintptr_t(stride), runs--;
    }
  }
};

// Beside products: a part at each call
struct Fetching {
  Ahead& ahead;
  void operator()(int64_t) const { ahead.fetch(); }
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
      const P* block = from + i + (c0 < columns ? c0 * column_stride : 0);
      Acc* transposed = to + i * ld + c0;
      if (i + W <= rows && c0 + W <= columns) {
        for (int64_t c = 0; c < W; c++) prefetch(address(block, 2 * W + c * column_stride));
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
  for (int64_t i = 0; i < rows; i++, to += ld) {
    const P* row = from + i * param.row_stride;
    prefetch(address(row, 12 * param.row_stride));
    if (whole)
      for (int64_t c = 0; c < ld; c += W) store<Acc>(to + c, load<Acc>(row + c));
    else if (in_run)
      for (int64_t c = 0; c < ld; c += W) store<Acc>(to + c, load_some<Acc>(row + smaller(c, columns), columns - c));
    else
      for (int64_t c = 0; c < ld; c++) to[c] = c < columns ? to_acc<Acc>(row[c * param.column_stride]) : Acc(0);
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

// Rows [row0, row0 + rows) and columns [column0, column0 + columns) of block `block`; `uses`: how
// many tokens will read it. `scratch` holds panel_size elements.
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
