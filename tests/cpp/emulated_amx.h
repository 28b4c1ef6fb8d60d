// SPDX-License-Identifier: Apache-2.0
// AMX's instructions in C++, for tests on processors that lack them: what csrc/cpu/amx.h has as assembly. TileShape is of that file,
// which includes this one.
#pragma once

namespace gralora::cpu::GRALORA_ISA {

namespace tile {
struct State {
  TileShape shape{0};
  float row[8][16][16];
};
inline thread_local State state;
inline void configure(const TileShape& shape) { state.shape = shape, memset(state.row, 0, sizeof state.row); }
inline void release() { state.shape = TileShape(0); }
template <int t>
void zero() {
  memset(state.row[t], 0, sizeof state.row[t]);
}
template <int t>
void load(const float* from, int64_t ld) {
  zero<t>();
  for (int m = 0; m < state.shape.rows[t]; m++) memcpy(state.row[t][m], from + m * ld, 64);
}
template <int t>
void store(float* to, int64_t ld) {
  for (int m = 0; m < state.shape.rows[t]; m++) memcpy(to + m * ld, state.row[t][m], 64);
}
// Sums over the first and over the second of all pairs. Nearly all of the tests' time is spent here, in arrays of fixed
// size: it is optimized, and the sanitizers do not look, in builds without the one and with the other.
template <int c, int a, int b>
__attribute__((optimize("O3"), no_sanitize("address", "undefined"))) void multiply() {
  State& all = state;
  float part[2][2][16][16];  // of the pairs of a and b
  for (int of = 0; of < 2; of++)
    for (int i = 0; i < 2; i++)
      for (int m = 0; m < 16; m++)
        for (int p = 0; p < 16; p++) {
          uint32_t bits;
          memcpy(&bits, &all.row[of == 0 ? a : b][m][p], sizeof bits);
          bits = i == 0 ? bits << 16 : bits & 0xffff0000u;
          if ((bits & 0x7f800000u) == 0) bits = 0;  // subnormal
          memcpy(&part[of][i][m][p], &bits, sizeof bits);
        }
  for (int m = 0; m < all.shape.rows[c]; m++) {
    float sums[2][16] = {};
    for (int i = 0; i < 2; i++)
      for (int p = 0; p < 16; p++)
        for (int n = 0; n < 16; n++) sums[i][n] += part[0][i][m][p] * part[1][i][p][n];
    for (int n = 0; n < 16; n++) all.row[c][m][n] += sums[0][n] + sums[1][n];
  }
}
}  // namespace tile

}  // namespace gralora::cpu::GRALORA_ISA
