// SPDX-License-Identifier: Apache-2.0
// All that a kernel may use beyond plain CUDA C++, with two bodies: inline PTX under nvcc, and
// emulation under a host compiler, which finds emulation.h by -I. Kernels hold no asm, no
// __shared__, no <<<>>>: then one source serves both.
//
//   GRALORA_SHARED(T, name, dims);           a shared array, aligned to 128 bytes, such as
//                                            (float, tile, [32][33])
//   dynamic_shared<T>()                      the launch's dynamic shared memory, aligned to 1024
//                                            bytes
//   load_global(p), store_global(p, v)       one access of 2, 4, 8 or 16 bytes; all global traffic
//                                            goes through these two and cp_async_16, and so can be
//                                            counted
//   sync_block(), sync_warp()
//   current_device(), error_text(error)
//   launch(name, kernel, grid, block, dynamic shared bytes, stream, arguments...)
//                                            returns the launch's cudaError_t
//
// From compute capability 8.0 on; below it they are not declared:
//   cp_async_16(to, from, valid)             16 bytes, global to shared; zeros after `valid` bytes
//   cp_async_commit(), cp_async_wait<N>()    all but the thread's N newest groups have landed, for
//                                            this thread alone
//   ldmatrix_x4(r, row), ldmatrix_x4_trans   lane 8 i + j names row j of the i-th 8 x 8 matrix of
//                                            16-bit elements
//   mma_m16n8k16(d, a, b)                    d += a b, of bfloat16 in float32
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "device.h"

namespace gralora::cuda {

// What one load or store instruction can move.
template <class T>
constexpr bool kOneAccess = std::is_trivially_copyable_v<T> && alignof(T) == sizeof(T) &&
                            (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);

}  // namespace gralora::cuda

#ifdef __CUDACC__
#include "intrinsics_device.cuh"
#else
#include "emulation.h"
#endif
