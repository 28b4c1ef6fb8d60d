// What kernels.cu exports: the kernels' launchers by number of dtype, 0 float32, 1 bfloat16, 2 float16. Tensors are contiguous,
// those of the general part are not looked at where h = 0. All return 0 or an error.
#pragma once

#include <cstdint>

struct Call {
  int64_t T, N, M, k, r, h;
  int64_t x_dtype, adapter_dtype, column_splits, token_splits, seed;
  double scaling, dropout;
};

extern "C" {

int test_forward(const Call* c, const void* x, const void* base, void* y, const void* A, const void* B,
                 const void* A_general, const void* B_general, float* u, float* partial);
int test_backward(const Call* c, const void* x, const void* grad_y, const float* u, const void* A, const void* B,
                  const void* A_general, const void* B_general, void* dx, void* dA, void* dB, void* dA_general,
                  void* dB_general, float* partial, float* dH, float* sums);
int test_merge(const Call* c, void* weight, const void* A, const void* B, const void* A_general, const void* B_general);
// kept[i]: the bits of Mask::kept(t, column + 8 i)
int test_mask(const int64_t* seed, int64_t threshold, int64_t width, int64_t t, int64_t column, uint8_t* kept,
              int count);

}  // extern "C"
