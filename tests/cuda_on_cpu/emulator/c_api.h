// SPDX-License-Identifier: Apache-2.0
// What a test calls in a library of emulated kernels, by ctypes. Each library has an emulator of its own.
// Functions that can fail return 0 or 1; gralora_emulator_error() then tells why, and why a launch failed.
#pragma once

#include "machine.h"
#include "tensor_core.h"
#include "traffic.h"

// Inline, as each source of a library holds them, and yet exported.
#define GRALORA_EXPORTED inline __attribute__((used, visibility("default")))

namespace gralora::emulator {

template <class F>
int reporting(F&& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    error_message() = error.what();
    return 1;
  }
}

}  // namespace gralora::emulator

extern "C" {

// order: 0 first in first out, 1 last in first out, 2 random. copies: 0 lazy, 1 eager, 2 random.
GRALORA_EXPORTED int gralora_emulator_configure(int order, uint64_t seed, int copies) {
  using namespace gralora::emulator;
  return reporting([&] {
    if (order < 0 || order > 2) throw Error("order must be 0, 1 or 2, not " + std::to_string(order));
    if (copies < 0 || copies > 2) throw Error("copies must be 0, 1 or 2, not " + std::to_string(copies));
    config().order = Order(order);
    config().seed = seed;
    config().copies = Copies(copies);
  });
}

// The device that launchers find, with its limit of shared memory; 80 (for 8.0) and 108 multiprocessors at first.
GRALORA_EXPORTED int gralora_emulator_device(int capability, int multiprocessors) {
  using namespace gralora::emulator;
  return reporting([&] {
    if (multiprocessors < 1) throw Error("multiprocessors must be at least 1, not " + std::to_string(multiprocessors));
    if (shared_limit(capability) == 0)
      throw Error("no device of capability " + std::to_string(capability) + " is known");
    config().capability = capability;
    config().multiprocessors = multiprocessors;
  });
}

// Whether mma adds as the tensor cores of the device's capability do, or in double; double at first.
GRALORA_EXPORTED void gralora_emulator_truncate(int truncates) { gralora::emulator::config().truncates = truncates; }

// d[i] = c[i] + sum_k a[i][k] b[i][k] as those tensor cores add it: without a kernel, for a test of the arithmetic.
GRALORA_EXPORTED void gralora_emulator_multiply_add(const double* a, const double* b, const float* c, float* d,
                                                    int64_t count, int K) {
  using namespace gralora::emulator;
  for (int64_t i = 0; i < count; i++)
    d[i] = multiply_add(a + i * K, b + i * K, K, c[i], tensor_core(config().capability));
}

// Functions to call before and after each launch, with the kernel's name and the stream. The first one may register
// buffers, and returns nullptr, or why the launch fails.
GRALORA_EXPORTED void gralora_emulator_observe(const char* (*before)(const char*, void*), void (*after)()) {
  gralora::emulator::config().before = before;
  gralora::emulator::config().after = after;
}

// From the first buffer on, kernels may touch global memory in registered buffers alone.
GRALORA_EXPORTED int gralora_emulator_register(const char* name, const void* data, int64_t bytes) {
  using namespace gralora::emulator;
  return reporting([&] {
    if (bytes < 0) throw Error("buffer \"" + std::string(name) + "\" has " + std::to_string(bytes) + " bytes");
    traffic().add(name, data, size_t(bytes));
  });
}

// Forgets buffers, launches, statistics and the last error; the configuration stays.
GRALORA_EXPORTED void gralora_emulator_clear() {
  using namespace gralora::emulator;
  traffic() = {};
  statistics() = {};
  error_message().clear();
}

// The bytes of a buffer that kernels have read and written, each access counted.
GRALORA_EXPORTED int gralora_emulator_traffic(const char* name, int64_t read_written[2]) {
  using namespace gralora::emulator;
  return reporting([&] {
    const Buffer* buffer = traffic().named(name);
    if (buffer == nullptr) throw Error("no buffer \"" + std::string(name) + "\" is registered");
    read_written[0] = buffer->read;
    read_written[1] = buffer->written;
  });
}

GRALORA_EXPORTED int64_t gralora_emulator_launches() { return int64_t(gralora::emulator::traffic().launches.size()); }
// nullptr where there were not as many.
GRALORA_EXPORTED const char* gralora_emulator_launch_name(int64_t launch) {
  const auto& launches = gralora::emulator::traffic().launches;
  return launch >= 0 && size_t(launch) < launches.size() ? launches[size_t(launch)].name.c_str() : nullptr;
}
// Of a launch that there was: the kernel's mangled name, or "".
GRALORA_EXPORTED const char* gralora_emulator_launch_symbol(int64_t launch) {
  return gralora::emulator::traffic().launches[size_t(launch)].symbol.c_str();
}
// Of a launch that there was: grid, block, dynamic shared bytes, and how many arguments the kernel took.
GRALORA_EXPORTED void gralora_emulator_launch_shape(int64_t launch, int64_t shape[8]) {
  const auto& what = gralora::emulator::traffic().launches[size_t(launch)];
  shape[0] = what.grid.x, shape[1] = what.grid.y, shape[2] = what.grid.z;
  shape[3] = what.block.x, shape[4] = what.block.y, shape[5] = what.block.z;
  shape[6] = int64_t(what.dynamic_bytes), shape[7] = int64_t(what.arguments.size());
}
// The bytes of one of them; returns how many.
GRALORA_EXPORTED int64_t gralora_emulator_launch_argument(int64_t launch, int64_t argument, const char** bytes) {
  const auto& of = gralora::emulator::traffic().launches[size_t(launch)].arguments[size_t(argument)];
  *bytes = of.data();
  return int64_t(of.size());
}

// ldmatrix's wavefronts, the least that they could be (more are bank conflicts), mma instructions, and the bytes of
// shared memory that the largest block took.
GRALORA_EXPORTED void gralora_emulator_statistics(int64_t counts[4]) {
  const auto& statistics = gralora::emulator::statistics();
  counts[0] = statistics.wavefronts;
  counts[1] = statistics.least_wavefronts;
  counts[2] = statistics.mma;
  counts[3] = statistics.shared_bytes;
}

GRALORA_EXPORTED const char* gralora_emulator_error() { return gralora::emulator::error_message().c_str(); }

}  // extern "C"
