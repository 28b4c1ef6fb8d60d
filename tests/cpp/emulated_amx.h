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
inline float term(float pair, bool second) {
  const uint32_t bits = bit_cast<uint32_t>(pair);
  const float value = bit_cast<float>(second ? bits & 0xffff0000u : bits << 16);
  return value > -0x1p-126f && value < 0x1p-126f ? 0.0f : value;
}
template <int c, int a, int b>
void multiply() {
  for (int m = 0; m < state.shape.rows[c]; m++)
    for (int n = 0; n < 16; n++) {
      float sums[2] = {};
      for (int p = 0; p < 16; p++)
        for (int i = 0; i < 2; i++) sums[i] += term(state.row[a][m][p], i) * term(state.row[b][p][n], i);
      state.row[c][m][n] += sums[0] + sums[1];
    }
}
}  // namespace tile

}  // namespace gralora::cpu::GRALORA_ISA
