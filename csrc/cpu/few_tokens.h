// SPDX-License-Identifier: Apache-2.0
// What forward and backward of a few tokens share. Reading the parameters is then nearly all of
// the work. Where a sum goes along the rows of a parameter it is a dot product, since transposing
// the parameter would take longer than reading it.
#pragma once

#include "microkernel.h"
#include "plan.h"
#include "transpose.h"

namespace gralora::cpu::GRALORA_ISA {

// Calls f(Int<T>), where T is `tokens`, rounded up to a number that there is code for.
template <class F>
inline void for_few_tokens(int64_t tokens, F&& f) {
  if (tokens == 1) return f(Int<1>{});
  if (tokens == 2) return f(Int<2>{});
  f(Int<4>{});
}

// to[m] = the sum over the lanes of sum[m]
template <class Acc, int n>
inline __attribute__((always_inline)) void total_lanes(const Vec<Acc> (&sum)[n], Acc* to) {
  constexpr int W = kWidth<Acc>;
#pragma GCC unroll 16
  for (int m = 0; m < n; m += W) {
    Vec<Acc> rows[W] = {};
#pragma GCC unroll 16
    for (int i = 0; i < W; i++)
      if (m + i < n) rows[i] = sum[m + i];
    const Vec<Acc> sums = lane_sums<Acc>(rows);
    if (m + W <= n)
      store<Acc>(to + m, sums);
    else
      for (int i = 0; m + i < n; i++) to[m + i] = sums[i];
  }
}

// to[t*ldto + m] = sum_c h[t*ldh + c] a[m*stride + c]
//   t = 0 .. T-1, m = 0 .. R-1, c = 0 .. length-1
template <int R, int T, class Acc, class P>
inline void dot_rows(const P* a, int64_t stride, int64_t length, const Acc* h, int64_t ldh, Acc* to, int64_t ldto) {
  constexpr int64_t W = kWidth<Acc>;
  Vec<Acc> sum[R * T] = {};
  const auto add = [&](auto whole, int64_t c) __attribute__((always_inline)) {
    const auto some = [&](const auto* from) {
      return whole.value ? load<Acc>(from) : load_some<Acc>(from, length - c);
    };
    Vec<Acc> h_c[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; t++) h_c[t] = some(h + t * ldh + c);
#pragma GCC unroll 16
    for (int m = 0; m < R; m++) {
      const Vec<Acc> a_c = some(a + m * stride + c);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) sum[t * R + m] += h_c[t] * a_c;
    }
  };
  int64_t c = 0;
  for (; c + W <= length; c += W) add(Int<1>{}, c);
  if (c < length) add(Int<0>{}, c);
  Acc totals[R * T];
  total_lanes<Acc>(sum, totals);
  for (int t = 0; t < T; t++)
    for (int m = 0; m < R; m++) to[t * ldto + m] = totals[t * R + m];
}

// The same for any number of rows: R at a time, then the last ones one by one. The rows are short.
// After each R of them sums are added across lanes, which leaves the processor no room to load the
// next rows by itself, so these are prefetched.
template <int R, int T, class Acc, class P>
inline void dot_all_rows(const P* a, int64_t stride, int64_t rows, int64_t length, const Acc* h, int64_t ldh, Acc* to,
                         int64_t ldto) {
  int64_t m = 0;
  for (; m + R <= rows; m += R) {
    const uintptr_t ahead = address(a, (m + 4 * kWidth<Acc>)*stride);
    for (int64_t byte = 0; R * T == kWidth<Acc> && byte < R * stride * int64_t(sizeof(P)); byte += 64)
      prefetch(ahead + uintptr_t(byte));
    dot_rows<R, T>(a + m * stride, stride, length, h, ldh, to + m, ldto);
  }
  for (; m < rows; m++) dot_rows<1, T>(a + m * stride, stride, length, h, ldh, to + m, ldto);
}

// Pointers to T rows. Those beyond the last token point to the last token.
template <int T, class Acc>
inline void rows_of(const Acc* first, int64_t ld, int64_t tokens, const Acc* (&rows)[T]) {
  for (int64_t t = 0; t < T; t++) rows[t] = first + smaller(t, tokens - 1) * ld;
}

// Each element of sum_rows() has so many sums, to which rows are added in turn: with a single one,
// each addition would wait for the one before.
constexpr int kSumsOfRows = kVectorRegisters == 32 ? 4 : 2;
constexpr int64_t kAhead = 32;  // rows that are prefetched ahead, where rows are short

// to[t*ld + c] = sum_i rows[t][i] b[i*stride + c] for t < tokens, i < length, and NV vectors of
// columns c, or the first `columns` columns of one vector. What is `ahead` elements further is
// prefetched. Rows i are added to kSums sums in turn, which are added at the end.
template <int NV, int kSums, int T, class Acc, class P>
__attribute__((noinline)) void sum_rows(const Acc* const (&rows)[T], int64_t tokens, int64_t length, const P* b,
                                        int64_t stride, int64_t ahead, Acc* to, int64_t ld,
                                        int64_t columns = NV * kWidth<Acc>) {
  Vec<Acc> sum[kSums][T][NV] = {};
  const auto add = [&](auto whole, int phase, int64_t i) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) {
      const P* at = b + i * stride + v * kWidth<Acc>;
      prefetch(address(at, ahead));
      const Vec<Acc> value = whole.value ? load<Acc>(at) : load_some<Acc>(at, columns);
#pragma GCC unroll 4
      for (int t = 0; t < T; t++) sum[phase][t][v] += rows[t][i] * value;
    }
  };
  const auto add_all = [&](auto whole) __attribute__((always_inline)) {
    int64_t i = 0;
    for (; i + kSums <= length; i += kSums)
#pragma GCC unroll 4
      for (int phase = 0; phase < kSums; phase++) add(whole, phase, i + phase);
#pragma GCC unroll 4
    for (int phase = 0; phase + 1 < kSums; phase++)
      if (i + phase < length) add(whole, phase, i + phase);
  };
  if (columns >= NV * kWidth<Acc>)
    add_all(Int<1>{});
  else
    add_all(Int<0>{});
  for_sums<T, NV>([&](int t, int v) {
    Vec<Acc> total = sum[0][t][v];
#pragma GCC unroll 4
    for (int phase = 1; phase < kSums; phase++) total += sum[phase][t][v];
    if (t >= tokens) return;
    store<Acc>(to + t * ld + v * kWidth<Acc>, total);
  });
}

// to[m*stride + c] = sum_t left[t*ldl + m] right[t*ldr + c]
//   m < rows, c < columns: NV vectors, or less than one
template <int T, int NV, class Acc, class P>
inline void outer_rows(const Acc* left, int64_t ldl, int64_t rows, const Acc* right, int64_t ldr, int64_t columns,
                       P* to, int64_t stride) {
  constexpr int64_t W = kWidth<Acc>;
  Vec<Acc> factor[T][NV];
  for_sums<T, NV>([&](int t, int v) { factor[t][v] = load_some<Acc>(right + t * ldr + v * W, columns - v * W); });
  for (int64_t m = 0; m < rows; m++, to += stride) {
    Vec<Acc> sum[NV] = {};
    for_sums<T, NV>([&](int t, int v) { sum[v] += left[t * ldl + m] * factor[t][v]; });
    if constexpr (NV == 1) {
      store_some<Acc>(to, sum[0], columns);
    } else {
#pragma GCC unroll 4
      for (int v = 0; v < NV; v += 2) {
        const Vec<Acc> both[2] = {sum[v], sum[v + 1]};
        store_row<Acc, P, 2>(to + v * W, both);
      }
    }
  }
}

// The same for any number of columns
template <int T, class Acc, class P>
inline void outer_all_rows(const Acc* left, int64_t ldl, int64_t rows, const Acc* right, int64_t ldr, int64_t columns,
                           P* to, int64_t stride) {
  // Vectors of a row of `to`
  constexpr int kHalf = kVectorRegisters / 2 / T, kWide = kHalf < 8 ? kHalf : 8;
  constexpr int64_t wide = kWide * kWidth<Acc>;
  int64_t c = 0;
  for (; c + wide <= columns; c += wide) outer_rows<T, kWide>(left, ldl, rows, right + c, ldr, wide, to + c, stride);
  for (; c < columns; c += kWidth<Acc>) outer_rows<T, 1>(left, ldl, rows, right + c, ldr, columns - c, to + c, stride);
}

}  // namespace gralora::cpu::GRALORA_ISA
