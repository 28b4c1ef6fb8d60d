// What forward and backward of a few tokens share. There, reading the parameters is nearly all of the work: where sums go along
// a parameter's rows they are dot products, since to transpose it would take longer than to read it.
#pragma once

#include "microkernel.h"
#include "transpose.h"

namespace gralora::cpu::GRALORA_ISA {

constexpr int64_t kFewTokens = 4;

// Calls f(Int<T>) with the number of tokens that registers are kept for
template <class F>
inline void for_few_tokens(int64_t tokens, F&& f) {
  if (tokens == 1) return f(Int<1>{});
  if (tokens == 2) return f(Int<2>{});
  f(Int<4>{});
}

// to[m] is the sum over the lanes of sum[m].
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

// to[t*ldto + m] = sum_c h[t*ldh + c] a[m*stride + c]      t = 0 .. T-1, m = 0 .. R-1, c = 0 .. length-1
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

// The same for any number of rows: R at a time, the last ones one by one. Short rows, of which as many are taken as there are lanes
// for their sums, are fetched ahead: sums of lanes leave no room for the loads of what comes next.
template <int R, int T, class Acc, class P>
inline void dot_all_rows(const P* a, int64_t stride, int64_t rows, int64_t length, const Acc* h, int64_t ldh, Acc* to,
                         int64_t ldto) {
  int64_t m = 0;
  for (; m + R <= rows; m += R) {
    const char* ahead = reinterpret_cast<const char*>(a + (m + 4 * kWidth<Acc>)*stride);
    for (int64_t byte = 0; R * T == kWidth<Acc> && byte < R * stride * int64_t(sizeof(P)); byte += 64)
      __builtin_prefetch(ahead + byte);
    dot_rows<R, T>(a + m * stride, stride, length, h, ldh, to + m, ldto);
  }
  for (; m < rows; m++) dot_rows<1, T>(a + m * stride, stride, length, h, ldh, to + m, ldto);
}

}  // namespace gralora::cpu::GRALORA_ISA
