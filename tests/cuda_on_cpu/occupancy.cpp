// SPDX-License-Identifier: Apache-2.0
// How many blocks of a kernel a multiprocessor holds, by the header that CUDA has for it.
#include <cuda_occupancy.h>

// shared: of a multiprocessor, and the most that a block may take. Returns 0 for an error.
extern "C" int blocks_of_a_multiprocessor(int capability, int shared, int shared_of_block, int threads, int registers,
                                          int static_bytes, int dynamic_bytes) {
  cudaOccDeviceProp device{};
  device.computeMajor = capability / 10, device.computeMinor = capability % 10;
  device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = 2048, device.warpSize = 32;
  device.regsPerBlock = device.regsPerMultiprocessor = 64 * 1024, device.numSms = 1;
  device.sharedMemPerBlock = 48 * 1024, device.sharedMemPerMultiprocessor = size_t(shared);
  device.sharedMemPerBlockOptin = size_t(shared_of_block), device.reservedSharedMemPerBlock = 1024;
  cudaOccFuncAttributes kernel{};
  kernel.maxThreadsPerBlock = threads, kernel.numRegs = registers, kernel.sharedSizeBytes = size_t(static_bytes);
  kernel.partitionedGCConfig = PARTITIONED_GC_OFF, kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  kernel.maxDynamicSharedSizeBytes = size_t(dynamic_bytes), kernel.numBlockBarriers = 1;
  cudaOccDeviceState state;
  cudaOccResult result{};
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, size_t(dynamic_bytes)) !=
      CUDA_OCC_SUCCESS)
    return 0;
  return result.activeBlocksPerMultiprocessor;
}
