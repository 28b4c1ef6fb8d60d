// SPDX-License-Identifier: Apache-2.0
// Rows of an activation as a factor of the micro-kernel: as they lie, or copied as numbers of the
// accumulation type into a block that stays in L1.
#pragma once

#include <type_traits>

#include "../gralora.h"
#include "microkernel.h"
#include "philox.h"
#include "plan.h"

namespace gralora::cpu::GRALORA_ISA {

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

inline int64_t row_offset(const Activation& x, int64_t t) {
  int64_t offset = 0;
  for (int d = x.leading_dims - 1; d > 0; d--) {
    offset += t % x.sizes[d] * x.strides[d];
    t /= x.sizes[d];
  }
  return x.leading_dims > 0 ? offset + t * x.strides[0] : 0;
}

// Row t of x, whose rows are evenly spaced, from column i on
template <class T>
Source<T> in_place(const Activation& x, int64_t t, int64_t i) {
  const int64_t ld = x.leading_dims == 1 ? x.strides[0] : 0;
  return {static_cast<const T*>(x.data) + t * ld + i, ld};
}

// ---------------------------------------------------------------- software prefetch

// Rows that a pass reads after those that are multiplied, from row t and column i on. Where there
// are none (t < 0) it is kNothing again and again: an unmapped address would cost a page walk.
alignas(64) static const char kNothing[64] = {};

struct RowsAhead {
  uintptr_t at = address(kNothing);
  int64_t row = 0, size = 0;  // bytes to the next row, and of an element

  RowsAhead(const Activation& x, int64_t t, int64_t i) {
    if (t < 0 || x.data == nullptr || x.column_stride != 1 || x.leading_dims > 1) return;
    size = size_of(x.dtype), row = x.leading_dims == 1 ? x.strides[0] * size : 0;
    at = address(static_cast<const char*>(x.data), t * row + i * size);
  }
};

// `columns` of a group of rows, evenly over the steps of a product, each time in parts of the rows
template <class Group>
struct NextRows : RowsAhead {
  Group group;
  int64_t bytes;  // of each row, for kSteps steps

  NextRows(Group group, const Activation& x, int64_t t, int64_t i, int64_t columns, int64_t steps)
      : RowsAhead(x, t, i), group(group), bytes(columns * size / ceil_div(steps, kSteps)) {}
  inline __attribute__((always_inline)) void operator()(int part) {
    constexpr int kRows = (Group::value + kParts - 1) / kParts, kLast = (Group::value - 1) / kRows;
    if (part > kLast) return;
    for (int64_t byte = 0; byte < bytes; byte += 64)
#pragma GCC unroll 16
      for (int m = 0; m < kRows; m++)
        if (part * kRows + m < group.count()) prefetch<0, 2>(at + uintptr_t(m * row + byte));
    at += uintptr_t(part < kLast ? kRows * row : bytes - kLast * kRows * row);
    hide(at);
  }
};

// Beside a sum over tokens: `columns` of the next tokens, some tokens each time
template <int columns, int tokens_per_step>
struct NextTokens : RowsAhead {
  using RowsAhead::RowsAhead;
  inline __attribute__((always_inline)) void operator()(int) {
    constexpr int kTokens = kPartSteps * tokens_per_step;
    for (int m = 0; m < kTokens; m++)
      for (int64_t byte = 0; byte < columns * size; byte += 64) prefetch<0, 2>(at + uintptr_t(m * row + byte));
    at += uintptr_t(kTokens * row);
  }
};

// ---------------------------------------------------------------- copies

constexpr int64_t kMostColumns = 256;  // of a chunk (plan.cpp)
// From a row of a block to the next. Not a power of two: rows would share the same few sets of L1,
// as those of x often do.
template <class Acc>
constexpr int kBlockRow = int(kMostColumns) + kWidth<Acc>;
constexpr int64_t kMaskRow = Mask::size(kMostColumns);

// A block of an activation: `count` rows of kBlockRow at `rows`, and which elements of token m
// dropout keeps, as bits at mask + m*kMaskRow (a row can be a pair of tokens).
template <class Acc>
struct Block {
  Acc* rows;
  uint8_t* mask;

  static int64_t size(int64_t count) { return count * (kBlockRow<Acc> + 2 * kMaskRow / int64_t(sizeof(Acc))); }
  Block(Acc* scratch, int64_t count)
      : rows(scratch), mask(reinterpret_cast<uint8_t*>(scratch + count * kBlockRow<Acc>)) {}
};

// Elements of a row as numbers of the accumulation type; with dropout, those that the mask keeps,
// times `scale`, and zeros
template <class Acc, class T>
inline void convert_row(const T* from, int64_t stride, int64_t count, Acc* to, const uint8_t* mask = nullptr,
                        Acc scale = Acc(1)) {
  int64_t i = 0;
  for (; stride == 1 && i + kWidth<Acc> <= count; i += kWidth<Acc>) {
    const Vec<Acc> v = load<Acc>(from + i);
    store<Acc>(to + i, mask == nullptr ? v : Mask::drop<Acc>(v * scale, mask, i));
  }
  for (; i < count; i++) {
    const Acc element_i = to_acc<Acc>(element(from + i * stride));
    to[i] = mask == nullptr ? element_i : Mask::drop<Acc>(element_i * scale, mask, i);
  }
}

// A row of sums, rounded
template <class Acc>
inline void round_row(const Acc* from, int64_t count, bf16* to) {
  for (int64_t i = 0; i < count; i += kWidth<Acc>)
    store_some<Acc>(to + i, load_some<Acc>(from + i, count - i), count - i);
}

// Some columns of some tokens of x. `width` is that of a whole row, which numbers its elements for
// the mask.
struct Part {
  const Activation& x;
  const Mask& mask;
  int64_t width, t0, tokens, column, columns;
};

// use(m, mask) for tokens m = 0 .. of a part, each with its mask, which is also left for backward
template <class Acc, class Use>
void with_masks(const Part& p, const Block<Acc>& block, Use&& use) {
  p.mask.rows(p.t0, p.tokens, p.width, p.column, p.columns, block.mask, kMaskRow);
  for (int64_t m = 0; m < p.tokens; m++) use(m, block.mask + m * kMaskRow);
  p.mask.keep(p.t0, p.tokens, p.width, p.column, p.columns, block.mask, kMaskRow);
}

// A part as rows of a block, padded with zeros to a multiple of kNR columns
template <class Acc>
void copy_rows(const Part& p, const Block<Acc>& block) {
  for_dtype<Acc>(p.x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t stride = p.x.column_stride;
    const auto copy = [&](int64_t m, const uint8_t* mask) {
      const T* from = static_cast<const T*>(p.x.data) + row_offset(p.x, p.t0 + m) + p.column * stride;
      Acc* to = block.rows + m * kBlockRow<Acc>;
      convert_row<Acc>(from, stride, p.columns, to, mask, Acc(p.mask.keep_scale));
      for (int64_t i = p.columns; i % kNR<Acc> != 0; i++) to[i] = Acc(0);
    };
    if (p.mask.on) return with_masks(p, block, copy);
    for (int64_t m = 0; m < p.tokens; m++) copy(m, nullptr);
  });
}

// A part as a factor: where it lies, or copied
template <class Acc>
Source<Acc> read_rows(Reading reading, const Part& p, const Block<Acc>& block) {
  if (reading == Reading::InPlace) return in_place<Acc>(p.x, p.t0, p.column);
  copy_rows(p, block);
  return {block.rows, kBlockRow<Acc>};
}

}  // namespace gralora::cpu::GRALORA_ISA
