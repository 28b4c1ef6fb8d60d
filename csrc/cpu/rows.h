// SPDX-License-Identifier: Apache-2.0
// Reading activations into the accumulation type, in blocks that stay in L1 or L2.
#pragma once

#include <type_traits>

#include "../gralora.h"
#include "microkernel.h"
#include "philox.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Acc>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::f64;
};
template <>
struct DTypeOf<bf16> {
  static constexpr DType value = DType::bf16;
};

// Calls f with a null pointer of the element type. Where a tensor is float64, sums are too: never
// float64 beside float.
template <class Acc, class F>
inline void for_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(static_cast<float*>(nullptr));
    case DType::bf16: return f(static_cast<bf16*>(nullptr));
    case DType::f16: return f(static_cast<f16*>(nullptr));
    case DType::f64:
      if constexpr (sizeof(Acc) == sizeof(double)) return f(static_cast<double*>(nullptr));
  }
}

inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : dtype == DType::f64 ? 8 : 2; }

inline int64_t row_offset(const Rows& rows, int64_t t) {
  int64_t offset = 0;
  for (int d = rows.leading_dims - 1; d > 0; d--) {
    offset += t % rows.sizes[d] * rows.strides[d];
    t /= rows.sizes[d];
  }
  return rows.leading_dims > 0 ? offset + t * rows.strides[0] : 0;
}

// Rows whose elements lie side by side, and that are all as far from each other
inline bool evenly_spaced(const Rows& x) { return x.column_stride == 1 && x.leading_dims <= 1; }

template <class Acc, class T>
inline void convert_row(const T* from, int64_t stride, int64_t count, Acc* to) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + kWidth<Acc> <= count; i += kWidth<Acc>) store<Acc>(to + i, load<Acc>(from + i));
  for (; i < count; i++) to[i] = to_acc<Acc>(element(from + i * stride));
}

// The same with dropout: times `scale` where `kept` has a bit, else zeros
template <class Acc, class T>
inline void convert_kept(const T* from, int64_t stride, int64_t count, const uint8_t* kept, Acc scale, Acc* to) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + kWidth<Acc> <= count; i += kWidth<Acc>)
      store<Acc>(to + i, Mask::drop<Acc>(load<Acc>(from + i) * scale, kept, i));
  for (; i < count; i++) to[i] = Mask::drop<Acc>(to_acc<Acc>(from[i * stride]) * scale, kept, i);
}

// A run of sums, rounded
template <class Acc>
inline void round_run(const Acc* from, int64_t count, bf16* to) {
  for (int64_t i = 0; i < count; i += kWidth<Acc>)
    store_some<Acc>(to + i, load_some<Acc>(from + i, count - i), count - i);
}

// The elements that a pass will read next, fetched a line at a time while arithmetic goes on. Where
// there are none it fetches kNothing: an unmapped address would cost a page walk.
alignas(64) static const char kNothing[64] = {};

struct Prefetch {
  uintptr_t data = address(kNothing);
  int64_t row = 0, size = 0;  // bytes to the next row, bytes of an element

  // x from row t and column i on; t < 0: nothing
  static Prefetch of(const Rows& x, int64_t t, int64_t i) {
    if (t < 0 || x.data == nullptr || !evenly_spaced(x)) return {};
    const int64_t size = size_of(x.dtype);
    const int64_t row = x.leading_dims == 1 ? x.strides[0] * size : 0;
    return {address(static_cast<const char*>(x.data), t * row + i * size), row, size};
  }

  // `columns` from `column` on, of `rows` rows from `first` on
  template <int rows, int columns>
  void rows_of(int64_t first, int64_t column) const {
    const uintptr_t at = data + uintptr_t(first * row + column * size);
    for (int m = 0; m < rows; m++)
      for (int64_t byte = 0; byte < columns * size; byte += 64) prefetch<0, 2>(at + uintptr_t(m * row + byte));
  }
};

// The rows of a group from a column on, fetched a line (kSteps columns) after another, each in
// parts of the rows; by tiles at once
template <class Group>
struct RowsAhead {
  static constexpr int kRows = Group::value, kSome = (kRows + kParts - 1) / kParts, kLastPart = (kRows - 1) / kSome;
  uintptr_t at;
  int64_t row, columns;  // bytes to the next row and to the next columns

  RowsAhead(Group, const Prefetch& from, int64_t column)
      : at(from.data + uintptr_t(column * from.size)), row(from.row), columns(kSteps * from.size) {}
  inline __attribute__((always_inline)) void fetch(int part) {
    if (part > kLastPart) return;
#pragma GCC unroll 16
    for (int m = 0; m < kSome; m++) prefetch<0, 2>(at + uintptr_t(m * row));
    at += uintptr_t(part < kLastPart ? kSome * row : columns - kLastPart * kSome * row);
    hide(at);
  }
  inline __attribute__((always_inline)) void fetch_line() {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; part++) fetch(part);
  }
};
template <int n, bool all>
struct RowsAhead<UpTo<n, all>> {
  uintptr_t at;
  int64_t row, columns;
  int count;
  RowsAhead(UpTo<n, all> group, const Prefetch& from, int64_t column)
      : at(from.data + uintptr_t(column * from.size)),
        row(from.row),
        columns(kSteps * from.size),
        count(group.count()) {}
  void fetch(int part) {
    if (part > 0) return;
    for (int m = 0; m < count; m++) prefetch<0, 2>(at + uintptr_t(m * row));
    at += uintptr_t(columns);
  }
};

constexpr int64_t kChunk = 256;  // columns of an activation that are worked on together, at most
// From a row of a block to the next. Not a power of two: rows would share the same few sets of L1,
// as those of x often do.
template <class Acc>
constexpr int kRow = int(kChunk) + kWidth<Acc>;

// A block of an activation: `count` rows of kRow at `rows`, and which elements of token m dropout
// keeps, as bits at kept + m*kKept (a row can be a pair of tokens).
constexpr int64_t kKept = Mask::size(kChunk);
template <class Acc>
struct Block {
  Acc* rows;
  uint8_t* kept;

  static int64_t size(int64_t count) { return count * (kRow<Acc> + 2 * kKept / int64_t(sizeof(Acc))); }
  Block(Acc* scratch, int64_t count) : rows(scratch), kept(reinterpret_cast<uint8_t*>(scratch + count * kRow<Acc>)) {}
};

// The columns [i, i + kSteps) of some rows of `from`, as far as there are columns, into rows of a
// block, padded with zeros
template <class Acc, class T>
inline __attribute__((always_inline)) void copy_columns(const T* from, int64_t ld, int64_t rows, int64_t i,
                                                        int64_t columns, Acc* to) {
  if (i + kSteps <= columns) {
    for (int64_t m = 0; m < rows; m++)
#pragma GCC unroll 8
      for (int64_t v = 0; v < kSteps; v += kWidth<Acc>)
        store<Acc>(to + m * kRow<Acc> + i + v, load<Acc>(from + m * ld + i + v));
  } else if (i < columns) {
    for (int64_t m = 0; m < rows; m++)
      for (int64_t o = i; o < i + kSteps; o++)
        to[m * kRow<Acc> + o] = o < columns ? to_acc<Acc>(element(from + m * ld + o)) : Acc(0);
  }
}

// Rows of a factor: `data` is an element of the first row, `ld` leads to the next row; where a
// number is a sum of several (pieces.h), `piece` leads to the next of them.
constexpr int kMostPieces = 3;
template <class T>
struct Source {
  const T* data;
  int64_t ld;
  int64_t piece = 0;
  int pieces = 1;
};

// What copy_columns does, a share of the rows for each of kParts parts; there are at most `most`
template <int most, class Acc, class T>
inline __attribute__((always_inline)) void copy_part(const Source<T>& from, int64_t rows, int part, int64_t i,
                                                     int64_t columns, Acc* to) {
  constexpr int some = (most + kParts - 1) / kParts;
  const int64_t first = part * some;
  if (first < rows)
    copy_columns(from.data + first * from.ld, from.ld, smaller(some, rows - first), i, columns, to + first * kRow<Acc>);
}

// Whether a column of rows that are so many bytes apart falls into one set of L1
inline bool in_one_set(int64_t bytes) { return bytes % 4096 == 0; }

// Whether x's rows can be multiplied as they lie
template <class Acc>
bool usable_in_place(const Rows& x, const Mask& mask) {
  return !mask.on && x.dtype == DTypeOf<Acc>::value && evenly_spaced(x);
}

// Row t of x, whose rows are evenly spaced, from column i on
template <class T>
Source<T> in_place(const Rows& x, int64_t t, int64_t i) {
  const int64_t ld = x.leading_dims == 1 ? x.strides[0] : 0;
  return {static_cast<const T*>(x.data) + t * ld + i, ld};
}

// use(m, kept) for rows m = 0 .. count-1 of a block with their masks
template <class Acc, class Use>
void with_masks(const Mask& mask, int64_t t0, int64_t count, int64_t i0, int64_t width, int64_t logical_width,
                const Block<Acc>& block, Use&& use) {
  mask.rows(t0, count, logical_width, i0, width, block.kept, kKept);
  for (int64_t m = 0; m < count; m++) use(m, block.kept + m * kKept);
  mask.keep(t0, count, logical_width, i0, width, block.kept, kKept);
}

// x[t0 .. t0+count, i0 .. i0+width), with dropout, into `block`, padded with zeros to a multiple of
// kTile columns. `logical_width` is the width of a whole row of x, which numbers its elements for
// the mask.
template <class Acc>
void read_block(const Rows& x, int64_t t0, int64_t count, int64_t i0, int64_t width, int64_t logical_width,
                const Mask& mask, const Block<Acc>& block) {
  for_dtype<Acc>(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto row = [&](int64_t m) {
      return static_cast<const T*>(x.data) + row_offset(x, t0 + m) + i0 * x.column_stride;
    };
    const auto pad = [&](Acc* to) {
      for (int64_t i = width; i % kTile<Acc> != 0; i++) to[i] = Acc(0);
    };
    if (mask.on) {
      with_masks(mask, t0, count, i0, width, logical_width, block, [&](int64_t m, const uint8_t* kept) {
        convert_kept<Acc>(row(m), x.column_stride, width, kept, Acc(mask.keep_scale), block.rows + m * kRow<Acc>);
        pad(block.rows + m * kRow<Acc>);
      });
    } else {
      for (int64_t m = 0; m < count; m++) {
        convert_row<Acc>(row(m), x.column_stride, width, block.rows + m * kRow<Acc>);
        pad(block.rows + m * kRow<Acc>);
      }
    }
  });
}

// The same, without a copy where x's rows can be multiplied as they lie
template <class Acc>
Source<Acc> rows_to_multiply(const Rows& x, int64_t t0, int64_t count, int64_t i0, int64_t width, int64_t logical_width,
                             const Mask& mask, const Block<Acc>& block) {
  if (usable_in_place<Acc>(x, mask)) return in_place<Acc>(x, t0, i0);
  read_block<Acc>(x, t0, count, i0, width, logical_width, mask, block);
  return {block.rows, kRow<Acc>};
}

}  // namespace gralora::cpu::GRALORA_ISA
