// SPDX-License-Identifier: Apache-2.0
// Kernels to which test_sass.py must object: without -Xptxas -warn-spills nothing else would.

// An array by an index that is not known has no registers: it lies in local memory.
extern "C" __global__ void local_memory(const int* x, int* result) {
  int values[64];
  for (int i = 0; i < 64; i++) values[i] = x[i];
  for (int i = 0; i < 64; i++) values[x[i] & 63] += i;
  result[threadIdx.x] = values[threadIdx.x & 63];
}

extern "C" __global__ void adds_in_any_order(const float* x, float* result) { atomicAdd(result, x[threadIdx.x]); }

extern "C" __global__ void single_floats(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }
