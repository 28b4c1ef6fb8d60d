// SPDX-License-Identifier: Apache-2.0
// Fragments of mma.m16n8k16 from shared memory, as bfloat16 pieces. Of lane l, with g = l/4 and
// q = l%4:
//   a word 0: row g, columns 2q and 2q+1      word 1: row g+8
//     words 2 and 3: the same rows, columns 8 further
#pragma once

#include "geometry.cuh"

namespace gralora::cuda {

// A 16 x 16 tile of rows in bfloat16
__device__ __forceinline__ void load_rows(uint32_t (&a)[1][4], const bf16* tile, int pitch, int lane) {
  ldmatrix_x4(a[0], tile + lane % 16 * pitch + lane / 16 * 8);
}

// The same from any type, split in registers
template <class X, int pieces>
__device__ __forceinline__ void load_rows(uint32_t (&a)[pieces][4], const X* tile, int pitch, int lane) {
#pragma unroll
  for (int v = 0; v < 4; v++) {
    const X* at = tile + (lane / 4 + v % 2 * 8) * pitch + lane % 4 * 2 + v / 2 * 8;
    uint32_t word[pieces];
    split_pair(to_float(at[0]), to_float(at[1]), word);
#pragma unroll
    for (int p = 0; p < pieces; p++) a[p][v] = word[p];
  }
}

// The same tile where it lies transposed in bfloat16: `tile` holds its columns as rows
__device__ __forceinline__ void load_rows_transposed(uint32_t (&a)[4], const bf16* tile, int pitch, int lane) {
  ldmatrix_x4_trans(a, tile + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 8);
}

// Two neighbouring 16 x 8 tiles of the second operand. Of lane l: word 0 has rows 2q and 2q+1 of
// column g, word 1 those 8 further.
__device__ __forceinline__ void load_columns(uint32_t (&left)[1][2], uint32_t (&right)[1][2], const bf16* tile,
                                             int pitch, int lane) {
  uint32_t word[4];
  ldmatrix_x4_trans(word, tile + lane % 16 * pitch + lane / 16 * 8);
  left[0][0] = word[0], left[0][1] = word[1], right[0][0] = word[2], right[0][1] = word[3];
}

// The same of a factor whose pieces lie `piece` elements apart
template <int pieces>
__device__ __forceinline__ void load_pieces(uint32_t (&left)[pieces][2], uint32_t (&right)[pieces][2], const bf16* tile,
                                            int piece, int pitch, int lane) {
#pragma unroll
  for (int p = 0; p < pieces; p++) {
    uint32_t one[1][2], other[1][2];
    load_columns(one, other, tile + p * piece, pitch, lane);
    left[p][0] = one[0][0], left[p][1] = one[0][1], right[p][0] = other[0][0], right[p][1] = other[0][1];
  }
}

template <class X, int pieces>
__device__ __forceinline__ void load_columns(uint32_t (&left)[pieces][2], uint32_t (&right)[pieces][2], const X* tile,
                                             int pitch, int lane) {
#pragma unroll
  for (int v = 0; v < 4; v++) {
    const X* at = tile + (lane % 4 * 2 + v % 2 * 8) * pitch + lane / 4 + v / 2 * 8;
    uint32_t word[pieces];
    split_pair(to_float(at[0]), to_float(at[pitch]), word);
#pragma unroll
    for (int p = 0; p < pieces; p++) (v < 2 ? left : right)[p][v % 2] = word[p];
  }
}

}  // namespace gralora::cuda
