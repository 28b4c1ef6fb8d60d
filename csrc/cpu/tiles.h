// SPDX-License-Identifier: Apache-2.0
// Tiles of AMX: 16 rows of pairs of bf16 (pairs.h) meet 16 columns of them in one instruction.
//
//   c[m][n] (+)= sum_p a[m][p] . b[p][n]     p = 0 .. steps-1, each a pair; sums in float
//
// `a` is a row's pairs as they lie, 16 of them (64 bytes) a tile; `b` is as for vectors, 16 of its
// rows a tile, so its rows are padded with zeros to a multiple of kSteps. Up to 32 rows by 32
// columns share four tiles of sums. A tile's 16 terms are added to its sums together, for each row
// by itself: a row's result does not depend on how rows are grouped.
//
// A factor that is not bf16 is a sum of pieces that are (pieces.h). Products of pieces i and j are
// left out where i + j reaches the pieces of the factor that has more: they are below the last
// piece.
//
// The registers' shape is configured by the thread that multiplies (Scope), and belongs to nobody
// in between: other libraries configure their own.
#pragma once

#include "capability.h"
#include "microkernel.h"
#include "rows.h"

namespace gralora::cpu::GRALORA_ISA {

#if defined(__AVX512F__) && defined(GRALORA_HAVE_TILES)

// Registers 0 .. 3 hold sums, 4 and 5 rows of a, 6 and 7 rows of b.
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

#ifdef GRALORA_EMULATE_TILES
}  // namespace gralora::cpu::GRALORA_ISA
#include "emulated_tiles.h"
namespace gralora::cpu::GRALORA_ISA {
#else
// As assembly, so that the kernels need no fourth instruction set for their sake. ld counts floats.
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

// The sums of up to 32 rows and up to 32 columns
class TileSums {
 public:
  TileSums(int64_t rows, int64_t columns) : rows_(rows), more_rows_(rows > 16), more_columns_(columns > 16) {
    if (rows % 16 != 0) tile::configure(TileShape(rows));
    tile::zero<0>();
    if (more_columns_) tile::zero<1>();
    if (more_rows_) tile::zero<2>();
    if (more_rows_ && more_columns_) tile::zero<3>();
  }
  ~TileSums() {
    if (rows_ % 16 != 0) tile::configure(TileShape(32));
  }
  TileSums(const TileSums&) = delete;
  TileSums& operator=(const TileSums&) = delete;

  // each(p) is called for every kSteps steps. b has zeros beyond its last row.
  template <class Each>
  inline __attribute__((always_inline)) void add(int64_t steps, const Source<float>& a, const Source<float>& b,
                                                 Each&& each) {
    auto own = each;  // with a state of its own, as in multiply_steps
    int64_t p = 0;
    for (; p + kSteps <= steps; p += kSteps) {
      call(own, p);
      add_step(a.data + p, a.ld, a.piece, a.pieces, b, p);
    }
    if (p == steps) return;
    call(own, p);
    alignas(64) float last[kMostPieces][32][kSteps];
    const __mmask16 some = __mmask16((1 << (steps - p)) - 1);
    for (int i = 0; i < a.pieces; i++)
      for (int64_t m = 0; m < rows_; m++)
        _mm512_store_ps(last[i][m], _mm512_maskz_loadu_ps(some, a.data + i * a.piece + m * a.ld + p));
    add_step(last[0][0], kSteps, 32 * kSteps, a.pieces, b, p);
  }

  inline __attribute__((always_inline)) void load(const float* from, int64_t ld) {
    tile::load<0>(from, ld);
    if (more_columns_) tile::load<1>(from + 16, ld);
    if (more_rows_) tile::load<2>(from + 16 * ld, ld);
    if (more_rows_ && more_columns_) tile::load<3>(from + 16 * ld + 16, ld);
  }
  inline __attribute__((always_inline)) void store(float* to, int64_t ld) const {
    tile::store<0>(to, ld);
    if (more_columns_) tile::store<1>(to + 16, ld);
    if (more_rows_) tile::store<2>(to + 16 * ld, ld);
    if (more_rows_ && more_columns_) tile::store<3>(to + 16 * ld + 16, ld);
  }

 private:
  template <class Each>
  static inline __attribute__((always_inline)) void call(Each& each, int64_t p) {
    if constexpr (in_parts<Each>) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; part++) each(p, part);
    } else {
      each(p);
    }
  }
  inline __attribute__((always_inline)) void add_step(const float* a, int64_t lda, int64_t piece, int pieces,
                                                      const Source<float>& b, int64_t p) const {
    const int most = pieces > b.pieces ? pieces : b.pieces;
    for (int i = 0; i < pieces; i++, a += piece) {
      const float* row = b.data + p * b.ld;
      for (int j = 0; j < b.pieces && i + j < most; j++, row += b.piece) {
        tile::load<6>(row, b.ld);
        if (j == 0) tile::load<4>(a, lda);
        tile::multiply<0, 4, 6>();
        if (more_columns_) tile::load<7>(row + 16, b.ld);
        if (more_columns_) tile::multiply<1, 4, 7>();
        if (more_rows_ && j == 0) tile::load<5>(a + 16 * lda, lda);
        if (more_rows_) tile::multiply<2, 5, 6>();
        if (more_rows_ && more_columns_) tile::multiply<3, 5, 7>();
      }
    }
  }

  const int64_t rows_;
  const bool more_rows_, more_columns_;
};

struct Tiles {
  static constexpr int kTerms = 2, kRows = 32, kDepth = int(kSteps);
  using Sums = TileSums;
  static bool available() { return has_tiles(); }

  class Scope {
   public:
    Scope() { tile::configure(TileShape(32)); }
    ~Scope() { tile::release(); }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
  };
};

template <class Acc>
constexpr bool kMultipliesTiles = sizeof(Acc) == sizeof(float);
#else
template <class Acc>
constexpr bool kMultipliesTiles = false;
struct Tiles;
#endif

template <class Product>
constexpr bool kByTiles = false;
template <>
constexpr bool kByTiles<Tiles> = true;

}  // namespace gralora::cpu::GRALORA_ISA
