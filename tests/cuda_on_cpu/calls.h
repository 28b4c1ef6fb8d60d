// SPDX-License-Identifier: Apache-2.0
// What kernels.cu exports: the passes, of activations whose columns lie side by side. What is of the general part is not looked
// at where h = 0. All but test_workspace, test_plan and test_place_of_latents return 0 or an error.
#pragma once

#include <cstdint>

// Numbers of dtypes: 0 float32, 1 bfloat16, 2 float16, 3 float64
struct Call {
  int64_t T, N, M, k, r, h;
  int64_t x_dtype, base_dtype, adapter_dtype;
  int64_t x_row, dx_row, base_row, y_row, grad_row;  // from a row to the next
  int64_t weight_row, weight_column;                 // strides of W
  int64_t needs;                                     // a bit each: dx, dA, dB, dA_general, dB_general
  int64_t keep_u;                                    // forward writes u and backward reads it
  int64_t add_to_dx;                                 // backward adds to dx
  int64_t overwrite;                                 // merge does not read W
  // Parts of columns and of tokens, on tensor cores; 0: through launch.h, which chooses them
  int64_t column_splits, token_splits;
  int64_t seed;
  double scaling, dropout;
  // Of A, B, A_general and B_general, and of their gradients: from a block, a row and a column to the next; zeros: as
  // PEFT stores them
  int64_t strides[4][3], gradient_strides[4][3];
};

extern "C" {

int64_t test_workspace(const Call* c, int backward);
// Into how many parts launch.h cuts columns and tokens (backward alone) on the current device
void test_plan(const Call* c, int backward, int64_t splits[2]);
int test_forward(const Call* c, const void* x, const void* base, void* y, const void* A, const void* B,
                 const void* A_general, const void* B_general, void* u, void* workspace);
int test_backward(const Call* c, const void* x, const void* grad_y, const void* u, const void* A, const void* B,
                  const void* A_general, const void* B_general, void* dx, void* dA, void* dB, void* dA_general,
                  void* dB_general, void* workspace);
int test_merge(const Call* c, void* weight, const void* A, const void* B, const void* A_general, const void* B_general);
// kept[i]: the bits of Mask::kept(t, column + 16 i)
int test_mask(const int64_t* seed, int64_t threshold, int64_t width, int64_t t, int64_t column, uint16_t* kept,
              int count);
// How many floats before them the latents of a block begin, before the exchange (split >= 0) or as they are kept
int64_t test_place_of_latents(const Call* c, int64_t split, int64_t t, int64_t block);

}  // extern "C"
