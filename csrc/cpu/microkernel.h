// SPDX-License-Identifier: Apache-2.0
// The micro-kernel that every pass uses, and how loops are cut for it.
//
//   sum[m][v] += sum_p a[m][p] * b[p*ldb + v*W .. + W)      p = 0 .. steps-1, in this order
//
// One element of the left factor `a` is broadcast and multiplied by NV vectors of a row of the
// right factor `b`. The micro-tile of MR x NV vectors of sums stays in registers. The sums of a
// row do not depend on MR, so results depend neither on how rows are grouped nor on the number of
// threads. What an element of a or b stands for is up to the product (product_fp32.h,
// product_pairs.h).
#pragma once

#include <type_traits>

#include "simd.h"

namespace gralora::cpu::GRALORA_ISA {

// MR x 2 sums, 2 vectors of b and one broadcast element of a must fit into the registers: 12*2 + 3
// of 32, or 6*2 + 3 of 16.
constexpr int kMR = kVectorRegisters == 32 ? 12 : 6;
static_assert(kMR * 2 + 3 <= kVectorRegisters);
template <class Acc>
constexpr int64_t kNR = 2 * kWidth<Acc>;  // NV = 2 vectors

constexpr int64_t kSteps = 16;  // as many floats of a row of a as a cache line holds
// The software prefetch beside kSteps steps is done in so many parts: many lines that are fetched
// at once would delay the loads of the product. With MR = 6 a part would be too short for a loop
// of its own.
constexpr int kParts = kVectorRegisters == 32 ? 4 : 1;
constexpr int kPartSteps = int(kSteps) / kParts;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// Hides from GCC how an address was computed. Otherwise it would hold one address for each row in
// registers, since all of them follow from the first one.
template <class T>
inline __attribute__((always_inline)) void hide(T& place) {
  asm("" : "+r"(place));
}

// Rows of a factor. `data` points to an element of the first row, and `ld` elements further is the
// next row. Where each number is a sum of pieces (split_bf16.h), `piece` leads from one piece to
// the next.
template <class T>
struct Source {
  const T* data;
  int64_t ld;
  int64_t piece = 0;
  int pieces = 1;

  Source from_row(int64_t row) const { return {data + row * ld, ld, piece, pieces}; }
};

// ---------------------------------------------------------------- the left factor

// Rows in place. The addresses of twelve rows would not fit into the registers, so only each third
// row has a pointer, and the two rows after it are reached from there.
template <class T, int MR>
struct LeftRows {
  static constexpr int kPointers = (MR + 2) / 3;
  T* third[kPointers];
  int64_t ld;

  inline __attribute__((always_inline)) LeftRows(T* data, int64_t ld) : ld(ld) {
#pragma GCC unroll 4
    for (int i = 0; i < kPointers; i++) {
      third[i] = data + i * 3 * ld;
      hide(third[i]);
    }
  }
  inline __attribute__((always_inline)) T* row(int m) const { return third[m / 3] + m % 3 * ld; }
  inline __attribute__((always_inline)) auto at(int m, int p) const { return element(row(m) + p); }
  template <int steps>
  inline __attribute__((always_inline)) void next() {
#pragma GCC unroll 4
    for (int i = 0; i < kPointers; i++) {
      third[i] += steps;
      if (steps > 1) hide(third[i]);
    }
  }
};

// A left micro-panel: a[m][p] = data[p*MR + m]
template <class Acc, int MR>
struct LeftPacked {
  const Acc* data;
  inline __attribute__((always_inline)) Acc at(int m, int p) const { return data[p * MR + m]; }
  template <int steps>
  inline __attribute__((always_inline)) void next() {
    data += steps * MR;
  }
};

// ---------------------------------------------------------------- the sums

// For `beside` of multiply(): nothing is done beside the arithmetic.
struct Nothing {
  void operator()(int) const {}
};

// A fixed number of steps, unrolled
template <class Product, int steps, class Acc, int MR, int NV, class Left>
inline __attribute__((always_inline)) void multiply_steps(Left& a, const Acc*& b, int64_t ldb,
                                                          Vec<Acc> (&sum)[MR][NV]) {
#pragma GCC unroll 4
  for (int p = 0; p < steps; p++) {
    Vec<Acc> b_row[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) b_row[v] = load<Acc>(b + p * ldb + v * kWidth<Acc>);
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
      const Acc scalar = a.at(m, p);
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) sum[m][v] = Product::add(sum[m][v], scalar, b_row[v]);
    }
  }
  a.template next<steps>();
  b += steps * ldb;
  hide(b);
}

// Any number of steps. With one vector of b, the instructions of the loop itself would take longer
// than the products, so there it is unrolled.
template <class Product, class Acc, int MR, int NV, class Left>
inline __attribute__((always_inline)) void multiply_loop(int64_t steps, Left& a, const Acc*& b, int64_t ldb,
                                                         Vec<Acc> (&sum)[MR][NV]) {
  if constexpr (NV == 1 && kVectorRegisters == 32) {
#pragma GCC unroll 1
    for (; steps >= 4; steps -= 4) multiply_steps<Product, 4>(a, b, ldb, sum);
  }
#pragma GCC unroll 1
  for (; steps > 0; steps--) multiply_steps<Product, 1>(a, b, ldb, sum);
}

// The micro-kernel. It calls beside(part) before each part of kSteps steps, for software prefetch
// beside the arithmetic. It takes `beside` by value, since the state of it changes with each call.
template <class Product, class Acc, int MR, int NV, class Left, class Beside>
inline __attribute__((always_inline)) void multiply(int64_t steps, Left a, const Acc* b, int64_t ldb,
                                                    Vec<Acc> (&sum)[MR][NV], Beside beside) {
  if constexpr (std::is_same_v<Beside, Nothing>) {
    multiply_loop<Product>(steps, a, b, ldb, sum);
  } else {
    for (int64_t left = steps; left > 0;) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; part++, left -= kPartSteps) {
        beside(part);
        multiply_loop<Product>(smaller(left, kPartSteps), a, b, ldb, sum);
      }
    }
  }
}

// Calls f for each vector of the micro-tile, unrolled: otherwise GCC would hold the sums in
// memory.
template <int MR, int NV, class F>
inline __attribute__((always_inline)) void for_sums(F&& f) {
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) f(m, v);
}

// ---------------------------------------------------------------- how loops are cut

// A number of rows that is known to the compiler, and one that is not, but is at most n
template <int n>
struct Int {
  static constexpr int value = n;
  static constexpr int count() { return n; }
};
template <int n>
struct AtMost {
  static constexpr int value = n;
  int rows;
  int count() const { return rows; }
};

// Calls f(Int<MR>, first row) so that [0, rows) is covered by groups of at most kMR rows. Sixteen
// rows become two groups of eight, not twelve and four: the sums of four rows are too few to hide
// the latency of an addition.
template <class F>
inline __attribute__((always_inline)) void for_row_groups(int64_t rows, F&& f) {
  int64_t m = 0;
  for (; m + kMR <= rows && !(kMR == 12 && rows - m == 16); m += kMR) f(Int<kMR>{}, m);
  if constexpr (kMR > 8) {
    for (; m + 8 <= rows; m += 8) f(Int<8>{}, m);
  }
  if (m + 4 <= rows) f(Int<4>{}, m), m += 4;
  if (m + 2 <= rows) f(Int<2>{}, m), m += 2;
  if (m < rows) f(Int<1>{}, m);
}

// Calls f(Int<NV>, first column) so that `columns`, rounded up to whole vectors, are covered.
template <class Acc, class F>
inline __attribute__((always_inline)) void for_column_groups(int64_t columns, F&& f) {
  int64_t c = 0;
  for (; c + kWidth<Acc> < columns; c += kNR<Acc>) f(Int<2>{}, c);
  if (c < columns) f(Int<1>{}, c);
}

}  // namespace gralora::cpu::GRALORA_ISA
