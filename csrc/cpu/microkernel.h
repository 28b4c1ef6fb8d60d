// SPDX-License-Identifier: Apache-2.0
// The one register-blocked multiplication that every pass uses, and how loops are cut for it.
//
//   acc[m][v] += sum_p a[m][p] * b[p*ldb + v*W .. + W)      p = 0 .. K-1, in this order
//
// One scalar of `a` is broadcast against NV vectors of a row of `b`; MR x NV accumulators stay in
// registers. The order of the sum does not depend on MR, so a row's result does not depend on how
// rows are grouped or on the number of threads. `each(p)` is called every kSteps steps, for what
// can go on beside the arithmetic, or each(p, part) before each of their kParts parts, with a state
// of its own for each product: many lines fetched at once would hold up the product's loads.
// `Product` says what an element of a and b stands for: a number here, two of them in pairs.h.
#pragma once

#include <type_traits>

#include "simd.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Acc>
constexpr int64_t kTile = 2 * kWidth<Acc>;  // columns of a full register tile (NV = 2)

// MR x 2 accumulators, 2 vectors of b and one broadcast must fit in the registers: 12*2 + 3 of 32,
// or 6*2 + 3 of 16.
constexpr int kMaxRows = kVectorRegisters == 32 ? 12 : 6;
static_assert(kMaxRows * 2 + 3 <= kVectorRegisters);

constexpr int64_t kSteps = 16;                          // one cache line of floats of each row of `a`
constexpr int kParts = kVectorRegisters == 32 ? 4 : 1;  // with 6 rows a part is too short for a loop of its own
constexpr int kPartSteps = int(kSteps) / kParts;

// Hides the origin of a pointer or an address from GCC, which would keep one for every row that
// follows from it.
template <class T>
inline __attribute__((always_inline)) void hide(T& place) {
  asm("" : "+r"(place));
}

// How a scalar of `a` meets a vector of `b`: kTerms terms of a sum at a time. Groups have at most
// kRows rows of `a`; packed rows of `b` are a multiple of kDepth, with zeros at the end. A Scope is
// held while products are made.
template <class Acc>
struct Singles {
  static constexpr int kTerms = 1, kRows = kMaxRows, kDepth = 1;
  struct Scope {};
  static inline __attribute__((always_inline)) Vec<Acc> add(Vec<Acc> sum, Acc a, Vec<Acc> b) { return sum + a * b; }
};

struct Nothing {
  void operator()(int64_t) const {}
};
constexpr Nothing nothing;  // for `each`

// Whether `each` is called before each part of kSteps steps
template <class Each>
constexpr bool in_parts = std::is_invocable_v<std::decay_t<Each>&, int64_t, int>;

// Whether `a` leaves rows of b somewhere, by keep(p, row)
template <class A>
constexpr bool keeps_rows = false;

template <class Product, int steps, class Acc, int MR, int NV, class A>
inline __attribute__((always_inline)) void multiply_block(A& a, const Acc*& b, int64_t ldb, Vec<Acc> (&acc)[MR][NV]) {
#pragma GCC unroll 4
  for (int p = 0; p < steps; p++) {
    Vec<Acc> b_row[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) b_row[v] = load<Acc>(b + p * ldb + v * kWidth<Acc>);
    if constexpr (keeps_rows<A>) a.keep(p, b_row);
#pragma GCC unroll 16
    for (int m = 0; m < MR; m++) {
      const Acc scalar = a.at(m, p);
#pragma GCC unroll 8
      for (int v = 0; v < NV; v++) acc[m][v] = Product::add(acc[m][v], scalar, b_row[v]);
    }
  }
  a.template next<steps>();
  b += steps * ldb;
  hide(b);
}

// Several steps at a time where there is one vector of b: the loop's own instructions would take
// longer than its products.
template <class Product, class Acc, int MR, int NV, class A>
inline __attribute__((always_inline)) void multiply_run(int64_t steps, A& a, const Acc*& b, int64_t ldb,
                                                        Vec<Acc> (&acc)[MR][NV]) {
  if constexpr (NV == 1 && kParts > 1) {
#pragma GCC unroll 1
    for (; steps >= kPartSteps; steps -= kPartSteps) multiply_block<Product, kPartSteps>(a, b, ldb, acc);
  }
#pragma GCC unroll 1
  for (; steps > 0; steps--) multiply_block<Product, 1>(a, b, ldb, acc);
}

template <class Product, class Acc, int MR, int NV, class A, class Each>
inline __attribute__((always_inline)) void multiply_steps(int64_t K, A a, const Acc* b, int64_t ldb,
                                                          Vec<Acc> (&acc)[MR][NV], Each&& each) {
  int64_t p = 0;
  if constexpr (in_parts<Each>) {
    auto own = each;
    if constexpr (NV == 1 && kParts > 1) {  // whole lines without a branch
      for (; p + kSteps <= K; p += kSteps) {
#pragma GCC unroll 4
        for (int part = 0; part < kParts; part++) {
          own(p, part);
          multiply_run<Product>(kPartSteps, a, b, ldb, acc);
        }
      }
    }
    for (; p < K; p += kSteps) {
#pragma GCC unroll 1
      for (int part = 0; part < kParts; part++) {
        own(p, part);
        const int64_t left = K - p - part * kPartSteps;
        multiply_run<Product>(left < kPartSteps ? left : kPartSteps, a, b, ldb, acc);
      }
    }
  } else if constexpr (std::is_same_v<std::decay_t<Each>, Nothing>) {
    multiply_run<Product>(K, a, b, ldb, acc);
  } else {
    for (; p < K; p += kSteps) {
      each(p);
      multiply_run<Product>(p + kSteps < K ? kSteps : K - p, a, b, ldb, acc);
    }
  }
}

// Rows of a tensor as it lies. Twelve addresses would not fit into the registers: each third row
// has a pointer of its own.
template <class T, int MR>
struct TensorRows {
  static constexpr int kPointers = (MR + 2) / 3;
  T* third[kPointers];
  int64_t ld;

  inline __attribute__((always_inline)) TensorRows(T* data, int64_t ld) : ld(ld) {
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

// Packed, step after step: a[m][p] = data[p*MR + m]
template <class Acc, int MR>
struct PackedRows {
  const Acc* data;
  inline __attribute__((always_inline)) Acc at(int m, int p) const { return data[p * MR + m]; }
  template <int steps>
  inline __attribute__((always_inline)) void next() {
    data += steps * MR;
  }
};

template <class Product, class Acc, int MR, int NV, class Each>
inline __attribute__((always_inline)) void multiply_rows(int64_t K, const Acc* a, int64_t lda, const Acc* b,
                                                         int64_t ldb, Vec<Acc> (&acc)[MR][NV], Each&& each) {
  multiply_steps<Product>(K, TensorRows<const Acc, MR>(a, lda), b, ldb, acc, each);
}

template <class Product, class Acc, int MR, int NV, class Each>
inline __attribute__((always_inline)) void multiply_packed(int64_t K, const Acc* a, const Acc* b, int64_t ldb,
                                                           Vec<Acc> (&acc)[MR][NV], Each&& each) {
  multiply_steps<Product>(K, PackedRows<Acc, MR>{a}, b, ldb, acc, each);
}

// Loops over the accumulators must be unrolled, or the compiler keeps them in memory.
template <int MR, int NV, class F>
inline __attribute__((always_inline)) void for_accumulators(F&& f) {
#pragma GCC unroll 16
  for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
    for (int v = 0; v < NV; v++) f(m, v);
}

template <int n>
struct Int {
  static constexpr int value = n;
  static constexpr int count() { return n; }
};
// Some rows, at most n, or all n of them
template <int n, bool all>
struct UpTo {
  static constexpr int value = n;
  int rows;
  constexpr int count() const { return all ? n : rows; }
};

// Calls f(Int<MR>, first_row) so that [0, rows) is covered by groups of at most kMaxRows; 16 rows
// as 8 and 8 where 12 are, since four rows have too few accumulators to hide the latency of their
// sums.
template <class F>
inline __attribute__((always_inline)) void for_row_groups(int64_t rows, F&& f) {
  int64_t m = 0;
  for (; m + kMaxRows <= rows && !(kMaxRows == 12 && rows - m == 16); m += kMaxRows) f(Int<kMaxRows>{}, m);
  if constexpr (kMaxRows > 8) {
    for (; m + 8 <= rows; m += 8) f(Int<8>{}, m);
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
