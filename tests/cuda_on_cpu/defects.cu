// SPDX-License-Identifier: Apache-2.0
// Each block rotates its 64 elements: result[i] = x[(i + 1) % 64]. Once by rights, and once for each defect that the
// emulator must see.
#include <cstring>

#include "intrinsics.cuh"

namespace {

using gralora::cuda::load_global;
using gralora::cuda::store_global;

enum class Defect {
  None,
  MissingBarrier,
  DivergentBarrier,
  EarlyReturn,
  Deadlock,
  Uninitialised,
  OutOfBounds,
  SharedOutOfBounds,
  BlocksRace,
  DivergentWarp,
  MissingWarpBarrier,
  WeakWait,
  MissingWait,
  MisalignedCopy,
  CopyOutOfBounds,
  EarlyRefill,
  MisalignedMatrix,
  TooMuchShared,
};

constexpr int kThreads = 64;

// Through shared memory.
template <Defect defect>
__global__ void rotate(const float* x, float* result) {
  GRALORA_SHARED(float, tile, [kThreads]);
  const int i = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * kThreads;
  if (defect != Defect::Uninitialised || i != 5)
    tile[i] = load_global(x + first + i + (defect == Defect::OutOfBounds ? 1 : 0));
  if constexpr (defect == Defect::DivergentBarrier) {
    if (i < 32)
      gralora::cuda::sync_block();
    else
      gralora::cuda::sync_block();
  } else if constexpr (defect == Defect::EarlyReturn) {
    if (i == 63) return;
    gralora::cuda::sync_block();
  } else if constexpr (defect == Defect::Deadlock) {  // each half of a warp waits for the other one
    if (i % 32 < 16)
      gralora::cuda::sync_warp();
    else
      gralora::cuda::sync_block();
  } else if constexpr (defect != Defect::MissingBarrier) {
    gralora::cuda::sync_block();
  }
  store_global(result + first + i, tile[(i + 1) % kThreads + (defect == Defect::SharedOutOfBounds ? 1 : 0)]);
  if (defect == Defect::BlocksRace && i == 0) store_global(result, load_global(x + 1));
}

// By asynchronous copies in two groups.
template <Defect defect>
__global__ void rotate_copies(const float* x, float* result) {
  GRALORA_SHARED(float, tile, [kThreads + 4]);
  constexpr int kHalf = kThreads / 2;
  const int i = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * kThreads;
  for (int start = 0; start < kThreads; start += kHalf) {
    const int offset = start + i * 4;
    if (i < kHalf / 4)
      gralora::cuda::cp_async_16(tile + offset + (defect == Defect::MisalignedCopy ? 1 : 0),
                                 x + first + offset + (defect == Defect::CopyOutOfBounds ? 4 : 0));
    gralora::cuda::cp_async_commit();
  }
  if (defect != Defect::MissingWait) gralora::cuda::cp_async_wait<defect == Defect::WeakWait ? 1 : 0>();
  gralora::cuda::sync_block();
  store_global(result + first + i, tile[(i + 1) % kThreads]);
}

// The same elements twice, the second time copied to where the first were read.
template <Defect defect>
__global__ void rotate_refill(const float* x, float* result) {
  GRALORA_SHARED(float, tile, [kThreads]);
  const int i = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * kThreads;
  tile[i] = load_global(x + first + i);
  gralora::cuda::sync_block();
  const float before = tile[(i + 1) % kThreads];
  if (defect != Defect::EarlyRefill) gralora::cuda::sync_block();
  if (i < kThreads / 4) gralora::cuda::cp_async_16(tile + i * 4, x + first + i * 4);
  gralora::cuda::cp_async_commit();
  gralora::cuda::sync_block();
  gralora::cuda::cp_async_wait<0>();
  gralora::cuda::sync_block();
  store_global(result + first + i, (before + tile[(i + 1) % kThreads]) / 2);
}

// Within each warp; the last lane's element is another warp's, and comes from global memory.
template <Defect defect>
__global__ void rotate_warp(const float* x, float* result) {
  GRALORA_SHARED(float, tile, [kThreads]);
  const int i = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * kThreads;
  tile[i] = load_global(x + first + i);
  if (defect != Defect::MissingWarpBarrier) gralora::cuda::sync_warp();
  float next = tile[i / 32 * 32 + (i + 1) % 32];
  if (defect != Defect::DivergentWarp || i % 32 < 16)
    next = __shfl_xor_sync(0xffffffffu, __shfl_xor_sync(0xffffffffu, next, 1), 1);
  if (i % 32 == 31) next = load_global(x + first + (i + 1) % kThreads);
  store_global(result + first + i, next);
}

// Rows of 16 bytes, four bytes off, and more shared memory than there is.
template <Defect defect>
__global__ void rotate_other(const float* x, float* result) {
  const int i = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * kThreads;
  if constexpr (defect == Defect::TooMuchShared) {
    GRALORA_SHARED(float, tile, [1 << 20]);
    tile[i] = 0;
  } else {
    GRALORA_SHARED(float, tile, [kThreads * 4 + 4]);
    for (int column = 0; column < 4; column++) tile[i * 4 + column] = 0;
    gralora::cuda::sync_block();
    uint32_t r[4];
    gralora::cuda::ldmatrix_x4(r, tile + i * 4 + (defect == Defect::MisalignedMatrix ? 1 : 0));
  }
  store_global(result + first + i, load_global(x + first + (i + 1) % kThreads));
}

// Through dynamic shared memory, at its beginning and at its end.
__global__ void rotate_dynamic(const float* x, float* result, int floats) {
  float* const tile = gralora::cuda::dynamic_shared<float>();
  const int i = static_cast<int>(threadIdx.x), first = static_cast<int>(blockIdx.x) * kThreads;
  tile[i] = tile[floats - kThreads + i] = load_global(x + first + i);
  gralora::cuda::sync_block();
  const int next = (i + 1) % kThreads;
  store_global(result + first + i, (tile[next] + tile[floats - kThreads + next]) / 2);
}

struct Named {
  const char* name;
  void (*kernel)(const float*, float*);
};
const Named kKernels[] = {
    {"none", rotate<Defect::None>},
    {"none_copies", rotate_copies<Defect::None>},
    {"none_refill", rotate_refill<Defect::None>},
    {"none_warp", rotate_warp<Defect::None>},
    {"none_matrix", rotate_other<Defect::None>},
    {"missing_barrier", rotate<Defect::MissingBarrier>},
    {"divergent_barrier", rotate<Defect::DivergentBarrier>},
    {"early_return", rotate<Defect::EarlyReturn>},
    {"deadlock", rotate<Defect::Deadlock>},
    {"uninitialised", rotate<Defect::Uninitialised>},
    {"out_of_bounds", rotate<Defect::OutOfBounds>},
    {"shared_out_of_bounds", rotate<Defect::SharedOutOfBounds>},
    {"blocks_race", rotate<Defect::BlocksRace>},
    {"divergent_warp", rotate_warp<Defect::DivergentWarp>},
    {"missing_warp_barrier", rotate_warp<Defect::MissingWarpBarrier>},
    {"weak_wait", rotate_copies<Defect::WeakWait>},
    {"missing_wait", rotate_copies<Defect::MissingWait>},
    {"misaligned_copy", rotate_copies<Defect::MisalignedCopy>},
    {"copy_out_of_bounds", rotate_copies<Defect::CopyOutOfBounds>},
    {"early_refill", rotate_refill<Defect::EarlyRefill>},
    {"misaligned_matrix", rotate_other<Defect::MisalignedMatrix>},
    {"too_much_shared", rotate_other<Defect::TooMuchShared>},
};

}  // namespace

// x, result: [blocks, 64]. -1 where there is no kernel of this name.
extern "C" int launch_defect(const char* name, const float* x, float* result, int blocks) {
  for (const Named& named : kKernels)
    if (std::strcmp(named.name, name) == 0)
      return gralora::cuda::launch(name, named.kernel, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, nullptr,
                                   x, result);
  return -1;
}

// With so many bytes of dynamic shared memory
extern "C" int launch_dynamic(int bytes, const float* x, float* result, int blocks) {
  return gralora::cuda::launch("dynamic", rotate_dynamic, dim3(static_cast<unsigned>(blocks)), dim3(kThreads),
                               static_cast<size_t>(bytes), nullptr, x, result, bytes / static_cast<int>(sizeof(float)));
}
