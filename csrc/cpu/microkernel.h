// The one register-blocked multiplication that every pass uses, and how loops are cut for it.
//
//   acc[m][v] += sum_p a[m*row + p*step] * b[p*ldb + v*W .. + W)      p = 0 .. K-1, in this order
//
// One scalar of `a` is broadcast against NV vectors of a row of `b`; MR x NV accumulators stay in registers. The strides of
// `a` are compile-time constants: twelve rows at a run-time stride would need more address registers than there are. The
// order of the sum does not depend on MR, so a row's result does not depend on how rows are grouped or on the number of
// threads. `each(p)` is called every kSteps steps, for what can go on beside the arithmetic.
#pragma once

#include "simd.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Acc>
constexpr int64_t kTile = 2 * kWidth<Acc>;  // columns of a full register tile (NV = 2)

// MR x 2 accumulators, 2 vectors of b and one broadcast must fit in the registers: 12*2 + 3 of 32, or 6*2 + 3 of 16.
constexpr int kMaxRows = kVectorRegisters == 32 ? 12 : 6;
static_assert(kMaxRows * 2 + 3 <= kVectorRegisters);

constexpr int64_t kSteps = 16;  // one cache line of floats of each row of `a`

template <class Acc, int row, int step, int MR, int NV, class Each>
inline __attribute__((always_inline)) void multiply(int64_t K, const Acc* a, const Acc* b, int64_t ldb,
                                                    Vec<Acc> (&acc)[MR][NV], Each&& each) {
  for (int64_t p0 = 0; p0 < K; p0 += kSteps) {
    each(p0);
    const int64_t end = p0 + kSteps < K ? p0 + kSteps : K;
#pragma GCC unroll 1
    for (int64_t p = p0; p < end; p++) {
      Vec<Acc> b_row[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) b_row[v] = load<Acc>(b + p * ldb + v * kWidth<Acc>);
#pragma GCC unroll 16
      for (int m = 0; m < MR; m++) {
        const Acc scalar = a[m * row + p * step];
#pragma GCC unroll 8
        for (int v = 0; v < NV; v++) acc[m][v] += scalar * b_row[v];
      }
    }
  }
}

template <class Acc, int row, int step, int MR, int NV>
inline __attribute__((always_inline)) void multiply(int64_t K, const Acc* a, const Acc* b, int64_t ldb,
                                                    Vec<Acc> (&acc)[MR][NV]) {
  multiply<Acc, row, step>(K, a, b, ldb, acc, [](int64_t) {});
}

// Loops over the accumulators must be unrolled, or the compiler keeps them in memory.
template <int MR, int NV, class F>
inline __attribute__((always_inline)) void for_accumulators(F&& f) {
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 2
    for (int v = 0; v < NV; v++) f(m, v);
}

template <int n>
struct Int {
  static constexpr int value = n;
};

// Calls f(Int<MR>, first_row) so that [0, rows) is covered by groups of at most kMaxRows.
template <class F>
inline __attribute__((always_inline)) void for_row_groups(int64_t rows, F&& f) {
  int64_t m = 0;
  for (; m + kMaxRows <= rows; m += kMaxRows) f(Int<kMaxRows>{}, m);
  if constexpr (kMaxRows > 8) {
    if (m + 8 <= rows) f(Int<8>{}, m), m += 8;
  }
  if (m + 4 <= rows) f(Int<4>{}, m), m += 4;
  if (m + 2 <= rows) f(Int<2>{}, m), m += 2;
  if (m < rows) f(Int<1>{}, m);
}

// Calls f(Int<NV>, first_column) over `columns`, which is padded to a multiple of the vector width.
template <class Acc, class F>
inline __attribute__((always_inline)) void for_column_tiles(int64_t columns, F&& f) {
  int64_t c = 0;
  for (; c + kTile<Acc> <= columns; c += kTile<Acc>) f(Int<2>{}, c);
  if (c < columns) f(Int<1>{}, c);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace gralora::cpu::GRALORA_ISA
