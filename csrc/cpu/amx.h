// SPDX-License-Identifier: Apache-2.0
// The micro-kernel on AMX. A tile is a register of 16 rows of 64 bytes. One instruction multiplies
// a tile of 16 rows of pairs of bf16 (product_pairs.h) by a tile of 16 columns of them.
//
//   c[m][n] += sum_p a[m][p] . b[p][n]     p = 0 .. steps-1, each a pair; sums in float
//
// A tile of `a` holds 16 pairs from each of 16 rows, loaded in place. A tile of `b` holds 16 of
// its rows, which are padded with zeros to a multiple of 16. A micro-tile of up to 32 x 32 sums
// fills four tiles. An instruction adds 16 pairs of products to each sum, for each row by itself,
// so that the result of a row does not depend on how rows are grouped.
//
// A factor that is not bf16 is a sum of pieces that are (split_bf16.h). Of the products of piece i
// of one factor by piece j of the other, those with i + j >= n are left out, where n is the larger
// number of pieces: they are smaller than the last piece that counts.
//
// A thread configures the shape of its tiles before it multiplies, and releases them after
// (AmxScope), since other libraries configure their own.
#pragma once

#include "machine.h"
#include "microkernel.h"

namespace gralora::cpu::GRALORA_ISA {

#if defined(__AVX512F__) && defined(GRALORA_HAVE_AMX)

constexpr int kMostPieces = 3;

// Tiles 0 .. 3 hold the sums, 4 and 5 hold rows of a, 6 and 7 hold rows of b.
struct alignas(64) TileShape {
  uint8_t palette = 1, start_row = 0, unused[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16];
  explicit TileShape(int64_t count) {
    const uint8_t first = uint8_t(smaller(count, 16)), second = count > 16 ? uint8_t(count - 16) : 16;
    const uint8_t all[16] = {first, first, second, second, first, second, 16, 16};
    memcpy(rows, all, sizeof all);
  }
};

#ifdef GRALORA_EMULATE_AMX
}  // namespace gralora::cpu::GRALORA_ISA
#include "emulated_amx.h"
namespace gralora::cpu::GRALORA_ISA {
#else
// The instructions are written as assembly, so that the kernels need not be compiled for a fourth
// instruction set. ld counts floats.
namespace tile {
inline void configure(const TileShape& shape) { asm volatile("ldtilecfg %0" ::"m"(shape)); }
inline void release() { asm volatile("tilerelease"); }
template <int t>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(t));
}
template <int t>
inline void load(const float* from, int64_t ld) {
  asm volatile("tileloadd (%0,%1,4), %%tmm%c2" ::"r"(from), "r"(ld), "i"(t) : "memory");
}
template <int t>
inline void store(float* to, int64_t ld) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,4)" ::"r"(to), "r"(ld), "i"(t) : "memory");
}
template <int c, int a, int b>
inline void multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
}  // namespace tile
#endif

class AmxScope {
 public:
  AmxScope() { tile::configure(TileShape(32)); }
  ~AmxScope() { tile::release(); }
  AmxScope(const AmxScope&) = delete;
  AmxScope& operator=(const AmxScope&) = delete;
};

// The micro-tile of up to 32 rows by NV vectors of columns
template <int NV>
class AmxSums {
 public:
  explicit AmxSums(AtMost<32> group) : rows_(group.count()), more_rows_(rows_ > 16) {
    if (rows_ % 16 != 0) tile::configure(TileShape(rows_));
    tile::zero<0>();
    if (kMoreColumns) tile::zero<1>();
    if (more_rows_) tile::zero<2>();
    if (more_rows_ && kMoreColumns) tile::zero<3>();
  }
  ~AmxSums() {
    if (rows_ % 16 != 0) tile::configure(TileShape(32));
  }
  AmxSums(const AmxSums&) = delete;
  AmxSums& operator=(const AmxSums&) = delete;

  // All parts of beside() are called before every 16 steps. Where `steps` is not a multiple of 16,
  // the last pairs of a are copied with zeros after them; b has rows of zeros there.
  template <class Beside>
  void add(int64_t steps, const Source<float>& a, const Source<float>& b, Beside beside) {
    int64_t p = 0;
    for (; p + kSteps <= steps; p += kSteps) {
      call(beside);
      add_step({a.data + p, a.ld, a.piece, a.pieces}, b, p);
    }
    if (p == steps) return;
    call(beside);
    alignas(64) float last[kMostPieces][32][kSteps];
    const __mmask16 some = __mmask16((1 << (steps - p)) - 1);
    for (int i = 0; i < a.pieces; i++)
      for (int64_t m = 0; m < rows_; m++)
        _mm512_store_ps(last[i][m], _mm512_maskz_loadu_ps(some, a.data + i * a.piece + m * a.ld + p));
    add_step({last[0][0], kSteps, 32 * kSteps, a.pieces}, b, p);
  }

  void store_to(float* to, int64_t ld, bool accumulate) const {
    if (!accumulate) return store(to, ld);
    alignas(64) float sum[32][32];
    store(sum[0], 32);
    for (int64_t m = 0; m < rows_; m++)
      for (int64_t c = 0; c < NV * 16; c += 16)
        GRALORA_ISA::store<float>(to + m * ld + c, load<float>(to + m * ld + c) + load<float>(sum[m] + c));
  }

  // Calls f(vectors, first row) for groups of rows of the micro-tile that fit into vector
  // registers.
  template <class F>
  void for_rows(F&& f) const {
    alignas(64) float sum[32][32];
    store(sum[0], 32);
    const auto call = [&](auto group, int m) {
      constexpr int MR = decltype(group)::value;
      Vec<float> vectors[MR][NV];
      for_sums<MR, NV>([&](int row, int v) { vectors[row][v] = load<float>(sum[m + row] + v * 16); });
      f(vectors, m);
    };
    int m = 0;
    for (; m + 8 <= rows_; m += 8) call(Int<8>{}, m);
    for (; m < rows_; m++) call(Int<1>{}, m);
  }

 private:
  static constexpr bool kMoreColumns = NV > 1;

  template <class Beside>
  static void call(Beside& beside) {
    for (int part = 0; part < kParts; part++) beside(part);
  }

  void store(float* to, int64_t ld) const {
    tile::store<0>(to, ld);
    if (kMoreColumns) tile::store<1>(to + 16, ld);
    if (more_rows_) tile::store<2>(to + 16 * ld, ld);
    if (more_rows_ && kMoreColumns) tile::store<3>(to + 16 * ld + 16, ld);
  }

  // Adds the products with rows p .. p+15 of b.
  inline __attribute__((always_inline)) void add_step(const Source<float>& a, const Source<float>& b, int64_t p) const {
    const int most = a.pieces > b.pieces ? a.pieces : b.pieces;
    for (int i = 0; i < a.pieces; i++) {
      const float* left = a.data + i * a.piece;
      const float* right = b.data + p * b.ld;
      for (int j = 0; j < b.pieces && i + j < most; j++, right += b.piece) {
        tile::load<6>(right, b.ld);
        if (j == 0) tile::load<4>(left, a.ld);
        tile::multiply<0, 4, 6>();
        if (kMoreColumns) tile::load<7>(right + 16, b.ld);
        if (kMoreColumns) tile::multiply<1, 4, 7>();
        if (more_rows_ && j == 0) tile::load<5>(left + 16 * a.ld, a.ld);
        if (more_rows_) tile::multiply<2, 5, 6>();
        if (more_rows_ && kMoreColumns) tile::multiply<3, 5, 7>();
      }
    }
  }

  const int64_t rows_;
  const bool more_rows_;
};

#endif

}  // namespace gralora::cpu::GRALORA_ISA
