// SPDX-License-Identifier: Apache-2.0
// ldmatrix and mma: which lane holds which element, as the PTX ISA's figures have it.
//
// An mma's sums are formed in double and rounded once, which is more exact than hardware; or, where Config::truncates is
// set, as hardware does (tensor_core.h).
#pragma once

#include "block.h"
#include "tensor_core.h"
#include "traffic.h"
#include "warp.h"

namespace gralora::emulator {

// Lanes 8 i to 8 i + 7 name the rows of matrix i. Lane t gets of each matrix elements 2 (t % 4) and + 1 of row t / 4;
// transposed those of column t / 4. The lower index is in the low half.
inline void load_matrices(uint32_t (&r)[4], const void* row, bool transposed, Location at) {
  const char* operation = transposed ? "ldmatrix.trans" : "ldmatrix";
  struct In {
    uint16_t element[8];
    uintptr_t address;
  } in;
  struct Out {
    uint32_t r[4];
  } out{};
  check_aligned(operation, row, 16, at);
  if (!is_shared(row, 16)) fail(std::string(operation) + " at " + at.text() + ": row outside of the shared arrays");
  memcpy(in.element, row, 16);  // by the lane that names it: what the sanitizers see
  in.address = reinterpret_cast<uintptr_t>(row);
  collective(operation, kFullWarp, in, out, false, at, [&](const In* const* ins, Out* const* outs) {
    for (int i = 0; i < 4; i++) {
      const In* const* rows = ins + 8 * i;
      // 32 banks of 4 bytes hold 8 rows of 16: one wavefront if no two rows fall in the same eighth.
      int uses[8] = {}, most = 0;
      for (int j = 0; j < 8; j++) most = std::max(most, ++uses[rows[j]->address / 16 % 8]);
      statistics().wavefronts += most;
      statistics().least_wavefronts++;
      for (int t = 0; t < 32; t++) {
        const int along = 2 * (t % 4), across = t / 4;
        const uint32_t low = transposed ? rows[along]->element[across] : rows[across]->element[along];
        const uint32_t high = transposed ? rows[along + 1]->element[across] : rows[across]->element[along + 1];
        outs[t]->r[i] = low | high << 16;
      }
    }
    statistics().ldmatrix++;
  });
  memcpy(r, out.r, sizeof r);
}

struct MmaIn {
  uint32_t a[4], b[2];
  float c[4];
};
struct MmaOut {
  float d[4];
};

constexpr int kDepth = 16;

inline float sum_of(const double* a, const double* b, float c) {
  if (config().truncates) return multiply_add(a, b, kDepth, c, tensor_core(config().capability));
  double sum = c;
  for (int k = 0; k < kDepth; k++) sum += a[k] * b[k];  // the products are exact
  return static_cast<float>(sum);
}

// Element `i` of packed bf16.
inline float element(const uint32_t* registers, int i) {
  const uint32_t bits = registers[i / 2] >> i % 2 * 16 << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// D[16][8] = C + A[16][16] B[8][16]^T
inline void multiply_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location at) {
  MmaIn in;
  MmaOut out{};
  memcpy(in.a, a, sizeof a);
  memcpy(in.b, b, sizeof b);
  memcpy(in.c, d, sizeof d);
  collective("mma.bf16", kFullWarp, in, out, false, at, [&](const MmaIn* const* ins, MmaOut* const* outs) {
    double A[16][kDepth], B[8][kDepth];
    for (int lane = 0; lane < 32; lane++) {
      const int along = lane % 4 * 2, across = lane / 4;
      for (int i = 0; i < 8; i++) A[across + i / 2 % 2 * 8][along + i % 2 + i / 4 * 8] = element(ins[lane]->a, i);
      for (int i = 0; i < 4; i++) B[across][along + i % 2 + i / 2 * 8] = element(ins[lane]->b, i);
    }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        outs[lane]->d[i] = sum_of(A[row], B[column], ins[lane]->c[i]);
      }
    statistics().mma++;
  });
  memcpy(d, out.d, sizeof d);
}

}  // namespace gralora::emulator
