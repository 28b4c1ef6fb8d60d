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

// to[m] = sum_c h[c] a[m*stride + c]      m = 0 .. R-1 (R at most a vector's width), c = 0 .. length-1
template <int R, class Acc, class P>
inline void dot_rows(const P* a, int64_t stride, int64_t length, const Acc* h, Acc* to) {
  constexpr int64_t W = kWidth<Acc>;
  static_assert(R <= W);
  Vec<Acc> sum[W] = {};
  int64_t c = 0;
  for (; c + W <= length; c += W) {
    const Vec<Acc> h_c = load<Acc>(h + c);
#pragma GCC unroll 16
    for (int64_t m = 0; m < R; m++) sum[m] += h_c * load<Acc>(a + m * stride + c);
  }
  if (c < length) {
    const Vec<Acc> h_c = load_some<Acc>(h + c, length - c);
#pragma GCC unroll 16
    for (int64_t m = 0; m < R; m++) sum[m] += h_c * load_some<Acc>(a + m * stride + c, length - c);
  }
  const Vec<Acc> sums = lane_sums<Acc>(sum);
  if constexpr (R == W)
    store<Acc>(to, sums);
  else
    for (int m = 0; m < R; m++) to[m] = sums[m];
}

// The same for any number of rows: R at a time, the last ones one by one. Short rows, of which a vector's width is taken, are fetched
// ahead: sums of lanes leave no room for the loads of what comes next.
template <int R, class Acc, class P>
inline void dot_all_rows(const P* a, int64_t stride, int64_t rows, int64_t length, const Acc* h, Acc* to) {
  int64_t m = 0;
  for (; m + R <= rows; m += R) {
    const char* ahead = reinterpret_cast<const char*>(a + (m + 4 * R) * stride);
    for (int64_t byte = 0; R == kWidth<Acc> && byte < R * stride * int64_t(sizeof(P)); byte += 64)
      __builtin_prefetch(ahead + byte);
    dot_rows<R>(a + m * stride, stride, length, h, to + m);
  }
  for (; m < rows; m++) dot_rows<1>(a + m * stride, stride, length, h, to + m);
}

}  // namespace gralora::cpu::GRALORA_ISA
