// SPDX-License-Identifier: Apache-2.0
// Rows of an activation as a factor of the micro-kernel: read in place, or copied into a buffer
// that stays in L1, converted to the accumulation type.
#pragma once

#include <type_traits>

#include "../gralora.h"
#include "microkernel.h"
#include "philox.h"
#include "plan.h"

namespace gralora::cpu::GRALORA_ISA {

// Calls f with a null pointer to the element type of dtype. Float64 is left out where sums are
// float: where any tensor is float64, sums are too.
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

// Elements from the start of x to row t
inline int64_t row_offset(const Activation& x, int64_t t) {
  int64_t offset = 0;
  for (int d = x.leading_dims - 1; d > 0; d--) {
    offset += t % x.sizes[d] * x.strides[d];
    t /= x.sizes[d];
  }
  return x.leading_dims > 0 ? offset + t * x.strides[0] : 0;
}

// Row t of x from column i on; the rows of x are evenly spaced.
template <class T>
Source<T> in_place(const Activation& x, int64_t t, int64_t i) {
  const int64_t ld = x.leading_dims == 1 ? x.strides[0] : 0;
  return {static_cast<const T*>(x.data) + t * ld + i, ld};
}

// ---------------------------------------------------------------- software prefetch

// The address of row t and column i of x, to be prefetched while earlier rows are multiplied.
// Where there is no such row (t < 0) it is that of kNothing for every row: an address that is not
// mapped would cost a walk through the page tables.
alignas(64) static const char kNothing[64] = {};

struct RowsAhead {
  uintptr_t at = address(kNothing);
  int64_t row = 0, size = 0;  // bytes from a row to the next, and bytes of an element

  RowsAhead(const Activation& x, int64_t t, int64_t i) {
    if (t < 0 || x.data == nullptr || x.column_stride != 1 || x.leading_dims > 1) return;
    size = size_of(x.dtype), row = x.leading_dims == 1 ? x.strides[0] * size : 0;
    at = address(static_cast<const char*>(x.data), t * row + i * size);
  }
};

// For `beside` of multiply(): prefetches `columns` columns of the rows of the next group, spread
// evenly over the steps of the product. Each part of kSteps steps takes some of the rows.
template <class Group>
struct NextRows : RowsAhead {
  Group group;
  int64_t bytes;  // of each row, during kSteps steps

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

// For `beside` of a sum over tokens: prefetches `columns` columns of the tokens that the next sum
// reads, a few tokens each time.
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

// Elements from a row of a buffer to the next. It is not a power of two: the rows would then share
// a few sets of L1, as rows of x often do.
template <class Acc>
constexpr int kBufferRow = int(kMostColumns) + kWidth<Acc>;
constexpr int64_t kMaskRow = Mask::size(kMostColumns);

// A buffer for `count` rows of a chunk of an activation, kBufferRow apart. Beside them it has, for
// each token m, the bits that tell which elements dropout keeps, at mask + m*kMaskRow. There is
// space for two tokens a row, since a row can hold a pair of tokens.
template <class Acc>
struct RowBuffer {
  Acc* rows;
  uint8_t* mask;

  static int64_t size(int64_t count) { return count * (kBufferRow<Acc> + 2 * kMaskRow / int64_t(sizeof(Acc))); }
  RowBuffer(Acc* scratch, int64_t count)
      : rows(scratch), mask(reinterpret_cast<uint8_t*>(scratch + count * kBufferRow<Acc>)) {}
};

// Converts a row to the accumulation type. With dropout, elements that the mask keeps are
// multiplied by `scale`, and the others become zeros.
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

// Rounds a row of sums to bfloat16.
template <class Acc>
inline void round_row(const Acc* from, int64_t count, bf16* to) {
  for (int64_t i = 0; i < count; i += kWidth<Acc>)
    store_some<Acc>(to + i, load_some<Acc>(from + i, count - i), count - i);
}

// Some columns of some tokens of x. `width` is that of a whole row: the mask numbers the elements
// of x by it.
struct Part {
  const Activation& x;
  const Mask& mask;
  int64_t width, t0, tokens, column, columns;
};

// Calls use(m, mask) for each token m of a part, with the token's mask. The masks are then saved
// for backward.
template <class Acc, class Use>
void with_masks(const Part& p, const RowBuffer<Acc>& buffer, Use&& use) {
  p.mask.rows(p.t0, p.tokens, p.width, p.column, p.columns, buffer.mask, kMaskRow);
  for (int64_t m = 0; m < p.tokens; m++) use(m, buffer.mask + m * kMaskRow);
  p.mask.save(p.t0, p.tokens, p.width, p.column, p.columns, buffer.mask, kMaskRow);
}

// Copies a part into the rows of a buffer, padded with zeros to a multiple of kNR columns.
template <class Acc>
void copy_rows(const Part& p, const RowBuffer<Acc>& buffer) {
  for_dtype<Acc>(p.x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const int64_t stride = p.x.column_stride;
    const auto copy = [&](int64_t m, const uint8_t* mask) {
      const T* from = static_cast<const T*>(p.x.data) + row_offset(p.x, p.t0 + m) + p.column * stride;
      Acc* to = buffer.rows + m * kBufferRow<Acc>;
      convert_row<Acc>(from, stride, p.columns, to, mask, Acc(p.mask.keep_scale));
      for (int64_t i = p.columns; i % kNR<Acc> != 0; i++) to[i] = Acc(0);
    };
    if (p.mask.on) return with_masks(p, buffer, copy);
    for (int64_t m = 0; m < p.tokens; m++) copy(m, nullptr);
  });
}

// A part as a factor of the micro-kernel, read in place or from the buffer.
template <class Acc>
Source<Acc> read_rows(Reading reading, const Part& p, const RowBuffer<Acc>& buffer) {
  if (reading == Reading::InPlace) return in_place<Acc>(p.x, p.t0, p.column);
  copy_rows(p, buffer);
  return {buffer.rows, kBufferRow<Acc>};
}

}  // namespace gralora::cpu::GRALORA_ISA
