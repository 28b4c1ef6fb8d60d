// SPDX-License-Identifier: Apache-2.0
// What was launched, to the byte: so that the same launch can be run elsewhere.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <string>
#include <type_traits>
#include <vector>

namespace gralora::emulator {

struct Launched {
  std::string name, symbol;
  dim3 grid, block;
  size_t dynamic_bytes;
  std::vector<std::string> arguments;  // the bytes of each
};

// The mangled name of a kernel, which is nvcc's too; empty where it is not exported.
inline std::string symbol_of(const void* kernel) {
  Dl_info info;
  const bool found = dladdr(kernel, &info) != 0 && info.dli_saddr == kernel && info.dli_sname != nullptr;
  return found ? info.dli_sname : "";
}

template <class T>
std::string bytes_of(const T& argument) {
  static_assert(std::is_trivially_copyable_v<T>, "an argument of a kernel is passed as its bytes");
  return std::string(reinterpret_cast<const char*>(&argument), sizeof argument);
}

}  // namespace gralora::emulator
