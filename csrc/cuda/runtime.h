// SPDX-License-Identifier: Apache-2.0
// What is asked of CUDA's runtime: the current device, and launches. Host code.
//
// The runtime returns an error to the call that failed, and also keeps it until somebody asks for
// the last error, as torch does after each launch of its own. So an error that is found there may
// be anybody's: a launch of ours is judged by what it returns alone. What our own calls leave
// there is taken away again, and what others left is not.
#pragma once

#include <cuda_runtime.h>

#include "device.h"

namespace gralora::cuda {

// What `call` returns. Where an error was there before, one stays.
template <class Call>
cudaError_t own_error(Call&& call) {
  const cudaError_t before = cudaPeekAtLastError();
  const cudaError_t error = call();
  if (error != cudaSuccess && before == cudaSuccess) cudaGetLastError();  // which forgets it
  return error;
}

inline const char* error_text(cudaError_t error) { return cudaGetErrorString(error); }

// Where the runtime does not tell, no device: the launch that follows then tells why.
inline Device current_device() {
  int device = 0, major = 0, minor = 0, multiprocessors = 0;
  const auto attribute = [&](int* value, cudaDeviceAttr which) { return cudaDeviceGetAttribute(value, which, device); };
  const cudaError_t error = own_error([&] {
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = attribute(&major, cudaDevAttrComputeCapabilityMajor);
    if (error == cudaSuccess) error = attribute(&minor, cudaDevAttrComputeCapabilityMinor);
    if (error == cudaSuccess) error = attribute(&multiprocessors, cudaDevAttrMultiProcessorCount);
    return error;
  });
  return error == cudaSuccess ? Device{10 * major + minor, multiprocessors} : Device{0, 1};
}

// The kernel takes copies of `arguments`, which have its own types here.
template <class... P>
cudaError_t launch_with(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_bytes, cudaStream_t stream,
                        P... arguments) {
  constexpr size_t kWithoutAsking = 48 * 1024;
  const void* const symbol = reinterpret_cast<const void*>(kernel);
  void* pointers[] = {static_cast<void*>(&arguments)...};
  return own_error([&] {
    cudaError_t error = cudaSuccess;
    if (dynamic_bytes > kWithoutAsking)
      error = cudaFuncSetAttribute(symbol, cudaFuncAttributeMaxDynamicSharedMemorySize, int(dynamic_bytes));
    return error == cudaSuccess ? cudaLaunchKernel(symbol, grid, block, pointers, dynamic_bytes, stream) : error;
  });
}

template <class... P, class... A>
cudaError_t launch(const char* /*name*/, void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_bytes,
                   cudaStream_t stream, A... arguments) {
  return launch_with<P...>(kernel, grid, block, dynamic_bytes, stream, static_cast<P>(arguments)...);
}

}  // namespace gralora::cuda
