// SPDX-License-Identifier: Apache-2.0
// csrc/cuda/runtime.h on a stand-in for CUDA's runtime, which keeps the last error as CUDA's documentation has it: set by each
// call that fails, told by cudaPeekAtLastError, told and forgotten by cudaGetLastError.
// Argument: a claim (below). Exits with 0 where it holds, 1 where it does not, 2 where there is no such claim.
#include "runtime.h"

#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

cudaError_t last = cudaSuccess;
std::map<std::string, cudaError_t> failing;  // calls that fail, and with what
std::vector<std::string> calls;              // those of launches

cudaError_t called(const char* name) {
  const auto found = failing.find(name);
  if (found == failing.end()) return cudaSuccess;
  return last = found->second;
}

struct Launched {
  const void* symbol;
  dim3 grid, block;
  double number;
  int64_t integer;
  size_t dynamic_bytes;
  cudaStream_t stream;
} launched;

}  // namespace

extern "C" {

cudaError_t cudaPeekAtLastError() { return last; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t) { return ""; }
cudaError_t cudaGetDevice(int* device) {
  *device = 3;
  return called("cudaGetDevice");
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  *value = device != 3 ? -1 : attribute == cudaDevAttrMultiProcessorCount ? 144 : attribute % 10;
  return attribute == cudaDevAttrMultiProcessorCount ? called("cudaDeviceGetAttribute") : cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  calls.push_back("cudaFuncSetAttribute " + std::to_string(attribute) + " " + std::to_string(value));
  return called("cudaFuncSetAttribute");
}
cudaError_t cudaLaunchKernel(const void* symbol, dim3 grid, dim3 block, void** arguments, size_t dynamic_bytes,
                             cudaStream_t stream) {
  calls.push_back("cudaLaunchKernel");
  launched = {symbol,        grid,  block, *static_cast<double*>(arguments[0]), *static_cast<int64_t*>(arguments[1]),
              dynamic_bytes, stream};
  return called("cudaLaunchKernel");
}

}  // extern "C"

namespace {

using namespace gralora::cuda;

void kernel(double, int64_t) {}

constexpr cudaError_t kStale = cudaErrorInvalidConfiguration, kOurs = cudaErrorNoKernelImageForDevice;
constexpr size_t kMuch = 48 * 1024 + 16;  // the least beyond what a launch gets without asking
int64_t of_stream;

cudaError_t launch_it(size_t dynamic_bytes = 0) {
  return launch("kernel", kernel, dim3(2, 3, 4), dim3(5, 6, 7), dynamic_bytes,
                reinterpret_cast<cudaStream_t>(&of_stream), 1.5f, 7);
}

bool no_device() {
  const Device device = current_device();
  return device.capability == 0 && device.multiprocessors == 1;
}

struct Claim {
  const char* name;
  bool (*holds)();
};
const Claim kClaims[] = {
    {"a launch is passed on, with arguments of the kernel's types",
     [] {
       return launch_it(48) == cudaSuccess && launched.symbol == reinterpret_cast<const void*>(kernel) &&
              launched.grid.x == 2 && launched.grid.y == 3 && launched.grid.z == 4 && launched.block.x == 5 &&
              launched.block.y == 6 && launched.block.z == 7 && launched.number == 1.5 && launched.integer == 7 &&
              launched.dynamic_bytes == 48 && launched.stream == reinterpret_cast<cudaStream_t>(&of_stream) &&
              calls == std::vector<std::string>{"cudaLaunchKernel"};
     }},
    {"much shared memory is asked for before the launch",
     [] {
       const std::string asked = "cudaFuncSetAttribute " + std::to_string(cudaFuncAttributeMaxDynamicSharedMemorySize) +
                                 " " + std::to_string(kMuch);
       return launch_it(kMuch) == cudaSuccess && calls == std::vector<std::string>{asked, "cudaLaunchKernel"};
     }},
    {"an earlier error is not the launch's",
     [] {
       last = kStale;
       return launch_it(kMuch) == cudaSuccess;
     }},
    {"an earlier error is left for whoever it belongs to",
     [] {
       last = kStale;
       launch_it(kMuch), current_device();
       return last == kStale;
     }},
    {"an error of the launch is its own",
     [] {
       failing["cudaLaunchKernel"] = kOurs;
       return launch_it() == kOurs;
     }},
    {"an error of the launch is not left for others",
     [] {
       failing["cudaLaunchKernel"] = kOurs;
       launch_it();
       return last == cudaSuccess;
     }},
    {"an error of the launch is its own beside an earlier one",
     [] {
       last = kStale, failing["cudaLaunchKernel"] = kOurs;
       return launch_it() == kOurs && last != cudaSuccess;
     }},
    {"without its shared memory a kernel is not launched",
     [] {
       failing["cudaFuncSetAttribute"] = cudaErrorInvalidValue;
       return launch_it(kMuch) == cudaErrorInvalidValue && last == cudaSuccess && calls.size() == 1;
     }},
    {"the device is told",
     [] {
       const Device device = current_device();
       return device.capability ==
                  10 * (cudaDevAttrComputeCapabilityMajor % 10) + cudaDevAttrComputeCapabilityMinor % 10 &&
              device.multiprocessors == 144;
     }},
    {"without a device there is none, and no error is left",
     [] {
       failing["cudaGetDevice"] = cudaErrorNoDevice;
       return no_device() && last == cudaSuccess;
     }},
    {"a device that is not told wholly is none, and no error is left",
     [] {
       failing["cudaDeviceGetAttribute"] = cudaErrorInvalidDevice;
       return no_device() && last == cudaSuccess;
     }},
    {"an earlier error stays where a device is not told",
     [] {
       last = kStale, failing["cudaGetDevice"] = cudaErrorNoDevice;
       return no_device() && last != cudaSuccess;
     }},
};

}  // namespace

int main(int argc, char** argv) {
  for (const Claim& claim : kClaims)
    if (argc == 2 && strcmp(argv[1], claim.name) == 0) return claim.holds() ? 0 : 1;
  return 2;
}
