// SPDX-License-Identifier: Apache-2.0
// One kernel per intrinsic that the passes use, each on one warp: operands in, results out.
// Hardware and emulator must agree on them. On a GPU they are the first to run
// (`gralora-ext info --selftest`).
#include <cstring>
#include <utility>

#include "intrinsics.cuh"
#include "launch.h"

namespace {

using gralora::cuda::load_global;
using gralora::cuda::store_global;

// x: [32, 8], rows: [32], result: [32, 4]. Lane t names row rows[t].
template <class Load>
__device__ void load_matrices(const uint16_t* x, const int* rows, uint32_t* result, Load ldmatrix) {
  GRALORA_SHARED(uint16_t, tile, [32][8]);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i < 8; i++) tile[lane][i] = load_global(x + lane * 8 + i);
  gralora::cuda::sync_warp();
  uint32_t r[4];
  ldmatrix(r, tile[load_global(rows + lane)]);
  for (int i = 0; i < 4; i++) store_global(result + lane * 4 + i, r[i]);
}

}  // namespace

// Names without mangling, by which they are found in PTX.
extern "C" {

// a: [32, 4], b: [32, 2], d: [32, 4], a lane's registers in a row.
__global__ void mma_bf16(const uint32_t* a, const uint32_t* b, float* d) {
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t a_registers[4], b_registers[2];
  float d_registers[4];
  for (int i = 0; i < 4; i++) a_registers[i] = load_global(a + lane * 4 + i);
  for (int i = 0; i < 2; i++) b_registers[i] = load_global(b + lane * 2 + i);
  for (int i = 0; i < 4; i++) d_registers[i] = load_global(d + lane * 4 + i);
  gralora::cuda::mma_m16n8k16(d_registers, a_registers, b_registers);
  for (int i = 0; i < 4; i++) store_global(d + lane * 4 + i, d_registers[i]);
}

__global__ void ldmatrix(const uint16_t* x, const int* rows, uint32_t* result) {
  load_matrices(x, rows, result, [](auto& r, const void* row) { gralora::cuda::ldmatrix_x4(r, row); });
}
__global__ void ldmatrix_trans(const uint16_t* x, const int* rows, uint32_t* result) {
  load_matrices(x, rows, result, [](auto& r, const void* row) { gralora::cuda::ldmatrix_x4_trans(r, row); });
}

// x: [32] of 16 bytes, valid: [32], result: [32] of 16 bytes, read by another lane than the one
// that copied.
__global__ void cp_async(const uint4* x, const int* valid, uint4* result) {
  GRALORA_SHARED(uint4, tile, [32]);
  const int lane = static_cast<int>(threadIdx.x);
  gralora::cuda::cp_async_16(&tile[lane], x + lane, load_global(valid + lane));
  gralora::cuda::cp_async_commit();
  gralora::cuda::cp_async_wait<0>();
  gralora::cuda::sync_block();
  store_global(result + lane, tile[31 - lane]);
}

// Accesses of 2, 4, 8 and 16 bytes, those of 16 by way of dynamic shared memory; each lane takes
// its neighbour's element. All arrays: [32].
__global__ void accesses(const uint16_t* x2, const float* x4, const float2* x8, const float4* x16, uint16_t* result2,
                         float* result4, float2* result8, float4* result16) {
  const int lane = static_cast<int>(threadIdx.x);
  float4* tile = gralora::cuda::dynamic_shared<float4>();
  tile[lane] = load_global(x16 + lane);
  gralora::cuda::sync_block();
  store_global(result16 + lane, tile[lane ^ 1]);
  store_global(result2 + lane, load_global(x2 + (lane ^ 1)));
  store_global(result4 + lane, load_global(x4 + (lane ^ 1)));
  store_global(result8 + lane, load_global(x8 + (lane ^ 1)));
}

}  // extern "C"

namespace {

template <class... P, class... A>
int on_one_warp(const char* name, void (*kernel)(P...), A... arguments) {
  constexpr size_t kDynamicBytes = 32 * 16;
  return gralora::cuda::launch(name, kernel, dim3(1), dim3(32), kDynamicBytes, nullptr, arguments...);
}

}  // namespace

extern "C" {

int launch_mma_bf16(const uint32_t* a, const uint32_t* b, float* d) {
  return on_one_warp("mma_bf16", mma_bf16, a, b, d);
}
int launch_ldmatrix(const uint16_t* x, const int* rows, uint32_t* result) {
  return on_one_warp("ldmatrix", ldmatrix, x, rows, result);
}
int launch_ldmatrix_trans(const uint16_t* x, const int* rows, uint32_t* result) {
  return on_one_warp("ldmatrix_trans", ldmatrix_trans, x, rows, result);
}
int launch_cp_async(const uint4* x, const int* valid, uint4* result) {
  return on_one_warp("cp_async", cp_async, x, valid, result);
}
int launch_accesses(const uint16_t* x2, const float* x4, const float2* x8, const float4* x16, uint16_t* result2,
                    float* result4, float2* result8, float4* result16) {
  return on_one_warp("accesses", accesses, x2, x4, x8, x16, result2, result4, result8, result16);
}

}  // extern "C"

namespace gralora::cuda {
namespace {

template <class... P, size_t... i>
int call(int (*launcher)(P...), void* const* arrays, std::index_sequence<i...>) {
  return launcher(static_cast<P>(arrays[i])...);
}

template <class... P>
int call(int (*launcher)(P...), void* const* arrays) {
  return call(launcher, arrays, std::index_sequence_for<P...>{});
}

}  // namespace

int run_instruction(const char* name, void* const* arrays) {
#define GRALORA_RUN(instruction) \
  if (strcmp(name, #instruction) == 0) return call(launch_##instruction, arrays);
  GRALORA_RUN(mma_bf16)
  GRALORA_RUN(ldmatrix)
  GRALORA_RUN(ldmatrix_trans)
  GRALORA_RUN(cp_async)
  GRALORA_RUN(accesses)
#undef GRALORA_RUN
  return cudaErrorInvalidValue;
}

}  // namespace gralora::cuda
