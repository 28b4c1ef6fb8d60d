// SPDX-License-Identifier: Apache-2.0
// ldmatrix and mma: which lane holds which element, as the PTX ISA's figures have it.
//
// An mma's sums are formed in double and rounded once, which is more exact than hardware; or, where Config::truncates is
// set, as hardware does (tensor_core.h).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

// An operand's format: bytes of an element, and the least exponent of its normal numbers.
struct Format {
  int bytes, least_exponent;
};

inline float sum_of(const double* a, const double* b, int K, float c, Format format) {
  if (config().truncates)
    return multiply_add(a, b, K, c, format.bytes, format.least_exponent, tensor_core(config().capability));
  double sum = c;
  for (int k = 0; k < K; k++) sum += a[k] * b[k];  // the products are exact
  return static_cast<float>(sum);
}

// D[16][8] = C + A[16][K] B[8][K]^T; read_A(lane, registers, A) and read_B put a lane's elements in their places.
template <int K, class ReadA, class ReadB>
void multiply(const char* operation, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location at,
              Format format, ReadA read_A, ReadB read_B) {
  MmaIn in;
  MmaOut out{};
  memcpy(in.a, a, sizeof a);
  memcpy(in.b, b, sizeof b);
  memcpy(in.c, d, sizeof d);
  collective(operation, kFullWarp, in, out, false, at, [&](const MmaIn* const* ins, MmaOut* const* outs) {
    double A[16][K], B[8][K];
    for (int lane = 0; lane < 32; lane++) {
      read_A(lane, ins[lane]->a, A);
      read_B(lane, ins[lane]->b, B);
    }
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        outs[lane]->d[i] = sum_of(A[row], B[column], K, ins[lane]->c[i], format);
      }
    statistics().mma++;
  });
  memcpy(d, out.d, sizeof d);
}

inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
// Element `i` of packed 16-bit elements.
template <class T>
double element(const uint32_t* registers, int i) {
  const auto bits = static_cast<uint16_t>(registers[i / 2] >> i % 2 * 16);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return float_of_bits(uint32_t(bits) << 16);
  } else {
    __half_raw raw;
    raw.x = bits;
    return __half2float(__half(raw));
  }
}

template <class T>
void multiply_16(const char* operation, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location at) {
  multiply<16>(
      operation, d, a, b, at, std::is_same_v<T, __nv_bfloat16> ? Format{2, -126} : Format{2, -14},
      [](int lane, const uint32_t* r, double (&A)[16][16]) {
        for (int i = 0; i < 8; i++) A[lane / 4 + i / 2 % 2 * 8][lane % 4 * 2 + i % 2 + i / 4 * 8] = element<T>(r, i);
      },
      [](int lane, const uint32_t* r, double (&B)[8][16]) {
        for (int i = 0; i < 4; i++) B[lane / 4][lane % 4 * 2 + i % 2 + i / 2 * 8] = element<T>(r, i);
      });
}

inline void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Location at) {
  constexpr uint32_t kKept = ~uint32_t(0x1fff);
  multiply<8>(
      "mma.tf32", d, a, b, at, Format{4, -126},
      [](int lane, const uint32_t* r, double (&A)[16][8]) {
        for (int i = 0; i < 4; i++) A[lane / 4 + i % 2 * 8][lane % 4 + i / 2 * 4] = float_of_bits(r[i] & kKept);
      },
      [](int lane, const uint32_t* r, double (&B)[8][8]) {
        for (int i = 0; i < 2; i++) B[lane / 4][lane % 4 + i * 4] = float_of_bits(r[i] & kKept);
      });
}

}  // namespace gralora::emulator
