// SPDX-License-Identifier: Apache-2.0
// Transposes a square of W x W elements in registers, in log2(W) rounds. A round exchanges the
// off-diagonal halves of pairs of rows.
#pragma once

#include "simd.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Acc>
struct LaneMaskOf;
template <>
struct LaneMaskOf<float> {
  typedef typename VectorOf<uint32_t, kWidth<float>>::type type;
};
template <>
struct LaneMaskOf<double> {
  typedef typename VectorOf<uint64_t, kWidth<double>>::type type;
};

// The lanes of a pair of rows that a round with this step combines into the two new rows
template <class Acc>
inline void pair_lanes(int step, typename LaneMaskOf<Acc>::type& upper, typename LaneMaskOf<Acc>::type& lower) {
  constexpr int W = kWidth<Acc>;
  for (int lane = 0; lane < W; lane++) {
    upper[lane] = lane & step ? W + lane - step : lane;
    lower[lane] = lane & step ? W + lane : lane + step;
  }
}

template <class Acc>
inline __attribute__((always_inline)) void transpose(Vec<Acc> (&row)[kWidth<Acc>]) {
  constexpr int W = kWidth<Acc>;
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
    typename LaneMaskOf<Acc>::type upper{}, lower{};
    pair_lanes<Acc>(step, upper, lower);
#pragma GCC unroll 16
    for (int c = 0; c < W; c++) {
      if (c & step) continue;
      const Vec<Acc> a = row[c], b = row[c + step];
      row[c] = __builtin_shuffle(a, b, upper), row[c + step] = __builtin_shuffle(a, b, lower);
    }
  }
}

// to[i*to_stride + c] = from[c*from_stride + i] for i, c = 0 .. W-1
template <class Acc, class T>
inline void transpose_square(const T* from, int64_t from_stride, Acc* to, int64_t to_stride) {
  constexpr int W = kWidth<Acc>;
  Vec<Acc> row[W];
#pragma GCC unroll 16
  for (int c = 0; c < W; c++) row[c] = load<Acc>(from + c * from_stride);
  transpose<Acc>(row);
#pragma GCC unroll 16
  for (int i = 0; i < W; i++) store<Acc>(to + i * to_stride, row[i]);
}

// The same at the edge of a matrix: for i = 0 .. rows-1, with zeros from c = columns on.
template <class Acc, class T>
__attribute__((noinline)) void transpose_some(const T* from, int64_t from_stride, int64_t rows, int64_t columns,
                                              Acc* to, int64_t to_stride) {
  constexpr int W = kWidth<Acc>;
  Vec<Acc> row[W];
#pragma GCC unroll 16
  for (int c = 0; c < W; c++) row[c] = c < columns ? load_some<Acc>(from + c * from_stride, rows) : Vec<Acc>{};
  transpose<Acc>(row);
#pragma GCC unroll 16
  for (int i = 0; i < W; i++)
    if (i < rows) store<Acc>(to + i * to_stride, row[i]);
}

// Lane m of the result is the sum over the lanes of row[m]. The rounds are those of transpose(),
// but each adds the two new rows, so that half of the rows are left after it.
template <class Acc>
inline Vec<Acc> lane_sums(Vec<Acc> (&row)[kWidth<Acc>]) {
  constexpr int W = kWidth<Acc>;
#pragma GCC unroll 4
  for (int step = 1; step < W; step *= 2) {
    typename LaneMaskOf<Acc>::type upper{}, lower{};
    pair_lanes<Acc>(step, upper, lower);
#pragma GCC unroll 16
    for (int c = 0; c < W; c += 2 * step) {
      const Vec<Acc> a = row[c], b = row[c + step];
      row[c] = __builtin_shuffle(a, b, upper) + __builtin_shuffle(a, b, lower);
    }
  }
  return row[0];
}

}  // namespace gralora::cpu::GRALORA_ISA
