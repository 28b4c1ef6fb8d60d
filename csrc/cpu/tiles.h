// Tiles of AMX: 16 rows of pairs of bf16 (pairs.h) meet 16 columns of them in one instruction.
//
//   c[m][n] (+)= sum_p a[m][p] . b[p][n]     p = 0 .. steps-1, each a pair; sums in float
//
// `a` is a row's pairs as they lie, 16 of them (64 bytes) a tile; `b` is as for vectors, 16 of its rows a tile, so its rows are
// padded with zeros to a multiple of kSteps. Up to 32 rows by 32 columns share four tiles of sums. A tile's 16 terms are added to
// its sums together, for each row by itself: a row's result does not depend on how rows are grouped.
//
// The registers' shape is configured by the thread that multiplies (Scope), and belongs to nobody in between: other libraries
// configure their own.
#pragma once

#include "capability.h"
#include "microkernel.h"

namespace gralora::cpu::GRALORA_ISA {

#if defined(__AVX512F__) && defined(GRALORA_HAVE_TILES)

// Registers 0 .. 3 hold sums, 4 and 5 rows of a, 6 and 7 rows of b.
struct alignas(64) TileShape {
  uint8_t palette = 1, start_row = 0, unused[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16];
  constexpr explicit TileShape(uint8_t m) : rows{m, m, m, m, m, m, 16, 16} {}
};
template <int rows>
constexpr TileShape kTileShape = TileShape(rows);

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

// MR rows by NV * 16 columns of sums in registers. MR: 32, 16 or fewer; other shapes than 16 rows are configured while it lives.
template <int MR, int NV>
class TileSums {
 public:
  TileSums() {
    if (MR < 16) tile::configure(kTileShape<MR>);
    tile::zero<0>();
    if (NV == 2) tile::zero<1>();
    if (MR == 32) tile::zero<2>();
    if (MR == 32 && NV == 2) tile::zero<3>();
  }
  ~TileSums() {
    if (MR < 16) tile::configure(kTileShape<16>);
  }
  TileSums(const TileSums&) = delete;
  TileSums& operator=(const TileSums&) = delete;

  // each(p) is called for every kSteps steps. b has zeros beyond its last row.
  template <class Each>
  inline __attribute__((always_inline)) void add(int64_t steps, const float* a, int64_t lda, const float* b,
                                                 int64_t ldb, Each&& each) {
    int64_t p = 0;
    for (; p + kSteps <= steps; p += kSteps) {
      each(p);
      add_step(a + p, lda, b + p * ldb, ldb);
    }
    if (p == steps) return;
    each(p);
    alignas(64) float last[MR][kSteps];
    const __mmask16 some = __mmask16((1 << (steps - p)) - 1);
    for (int m = 0; m < MR; m++) _mm512_store_ps(last[m], _mm512_maskz_loadu_ps(some, a + m * lda + p));
    add_step(last[0], kSteps, b + p * ldb, ldb);
  }

  inline __attribute__((always_inline)) void load(const float* from, int64_t ld) {
    tile::load<0>(from, ld);
    if (NV == 2) tile::load<1>(from + 16, ld);
    if (MR == 32) tile::load<2>(from + 16 * ld, ld);
    if (MR == 32 && NV == 2) tile::load<3>(from + 16 * ld + 16, ld);
  }
  inline __attribute__((always_inline)) void store(float* to, int64_t ld) const {
    tile::store<0>(to, ld);
    if (NV == 2) tile::store<1>(to + 16, ld);
    if (MR == 32) tile::store<2>(to + 16 * ld, ld);
    if (MR == 32 && NV == 2) tile::store<3>(to + 16 * ld + 16, ld);
  }

 private:
  static inline __attribute__((always_inline)) void add_step(const float* a, int64_t lda, const float* b, int64_t ldb) {
    tile::load<6>(b, ldb);
    tile::load<4>(a, lda);
    tile::multiply<0, 4, 6>();
    if (NV == 2) tile::load<7>(b + 16, ldb);
    if (NV == 2) tile::multiply<1, 4, 7>();
    if (MR == 32) tile::load<5>(a + 16 * lda, lda);
    if (MR == 32) tile::multiply<2, 5, 6>();
    if (MR == 32 && NV == 2) tile::multiply<3, 5, 7>();
  }
};

struct Tiles {
  static constexpr int kTerms = 2, kRows = 32, kDepth = int(kSteps);
  using Rank = bf16;
  static bool available() { return has_tiles(); }

  class Scope {
   public:
    Scope() { tile::configure(kTileShape<16>); }
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
template <int MR, int NV>
class TileSums;
#endif

template <class Product>
constexpr bool kByTiles = false;
template <>
constexpr bool kByTiles<Tiles> = true;

}  // namespace gralora::cpu::GRALORA_ISA
