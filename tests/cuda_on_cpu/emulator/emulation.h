// SPDX-License-Identifier: Apache-2.0
// The CUDA spellings of a kernel's source for a host compiler, and the emulated bodies of intrinsics.cuh.
#pragma once

#ifdef __CUDACC__
#error "emulation.h is for host compilers; nvcc takes intrinsics_device.cuh"
#endif

#include "async_copy.h"
#include "c_api.h"
#include "launch.h"
#include "matrix.h"

#undef __shared__
#define __shared__ static_assert(false, "a shared array is declared with GRALORA_SHARED");
#undef __forceinline__
#define __forceinline__ inline __attribute__((always_inline))
#undef __launch_bounds__
#define __launch_bounds__(...)
#define threadIdx (::gralora::emulator::thread_index())
#define blockIdx (::gralora::emulator::block_index())
#define blockDim (::gralora::emulator::block_size())
#define gridDim (::gralora::emulator::grid_size())

// The address of a kernel's own static names its array.
#define GRALORA_SHARED(T, name, dims) \
  using name##_type = T dims;         \
  static char name##_key;             \
  name##_type& name =                 \
      *reinterpret_cast<name##_type*>(::gralora::emulator::shared_array(&name##_key, sizeof(name##_type)))

inline void __syncthreads(gralora::emulator::Location at = gralora::emulator::Location::here()) {
  gralora::emulator::sync_block(at);
}
inline void __syncwarp(uint32_t mask = gralora::emulator::kFullWarp,
                       gralora::emulator::Location at = gralora::emulator::Location::here()) {
  gralora::emulator::sync_warp(mask, at);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes,
                  gralora::emulator::Location at = gralora::emulator::Location::here()) {
  return gralora::emulator::shuffle("shfl.xor", mask, value, gralora::emulator::current()->lane ^ lanes, at);
}
template <class T>
T atomicAdd(T* p, T value, gralora::emulator::Location at = gralora::emulator::Location::here()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8);
  using namespace gralora::emulator;
  check_aligned("atomicAdd", p, sizeof(T), at);
  if (!is_shared(p, sizeof(T))) count_global("atomicAdd", p, sizeof(T), kRead | kWrite, at);
  if constexpr (std::is_integral_v<T>) {
    return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
  } else {
    T before, after;
    __atomic_load(p, &before, __ATOMIC_RELAXED);
    do after = before + value;
    while (!__atomic_compare_exchange(p, &before, &after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return before;
  }
}

namespace gralora::cuda {

using emulator::Location;

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulator::dynamic_shared());
}

template <class T>
T load_global(const T* p, Location at = Location::here()) {
  static_assert(kOneAccess<T>, "2, 4, 8 or 16 bytes, aligned to their size");
  emulator::check_aligned("load_global", p, sizeof(T), at);
  emulator::count_global("load_global", p, sizeof(T), emulator::kRead, at);
  return *p;
}
template <class T>
void store_global(T* p, T value, Location at = Location::here()) {
  static_assert(kOneAccess<T>, "2, 4, 8 or 16 bytes, aligned to their size");
  emulator::check_aligned("store_global", p, sizeof(T), at);
  emulator::count_global("store_global", p, sizeof(T), emulator::kWrite, at);
  *p = value;
}

inline void sync_block(Location at = Location::here()) { emulator::sync_block(at); }
inline void sync_warp(Location at = Location::here()) { emulator::sync_warp(emulator::kFullWarp, at); }

inline void cp_async_16(void* to, const void* from, int valid = 16, Location at = Location::here()) {
  emulator::need_ampere("cp.async", at);
  emulator::copy_async(to, from, 16, valid, at);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int N>
void cp_async_wait() {
  static_assert(N >= 0);
  emulator::wait_copies(N);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, Location at = Location::here()) {
  emulator::need_ampere("ldmatrix", at);
  emulator::load_matrices(r, row, false, at);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Location at = Location::here()) {
  emulator::need_ampere("ldmatrix.trans", at);
  emulator::load_matrices(r, row, true, at);
}

inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         Location at = Location::here()) {
  emulator::need_ampere("mma.bf16", at);
  emulator::multiply_bf16(d, a, b, at);
}

inline const char* error_text(cudaError_t) { return emulator::error_message().c_str(); }
inline Device current_device() { return {emulator::config().capability, emulator::config().multiprocessors}; }

template <class... P, class... A>
cudaError_t launch(const char* name, void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_bytes,
                   cudaStream_t stream, A... arguments) {
  const emulator::Launched what{name,          emulator::symbol_of(reinterpret_cast<const void*>(kernel)),
                                grid,          block,
                                dynamic_bytes, {emulator::bytes_of<P>(arguments)...}};
  return emulator::launch(what, stream, [&] { kernel(static_cast<P>(arguments)...); });
}

}  // namespace gralora::cuda
