// SPDX-License-Identifier: Apache-2.0
// The memory of the emulated devices. The host can touch it only while an Access lives, as copies
// and launches hold one: code that follows a pointer of the device on the host ends with a
// segmentation fault.
#pragma once

#include <c10/core/Allocator.h>

#include <vector>

namespace gralora::device {

constexpr c10::DeviceIndex kDevices = 2;

struct Block {
  char* data;
  size_t bytes;  // those that were asked for
  c10::DeviceIndex device;
};

// Opens the memory to this thread, and keeps other threads from launching and copying.
void open_memory();
void close_memory();

class Access {
 public:
  Access() { open_memory(); }
  ~Access() { close_memory(); }
  Access(const Access&) = delete;
  Access& operator=(const Access&) = delete;
};

// Blocks at multiples of 512 bytes on the current device, filled with NaN of all dtypes.
c10::Allocator* allocator();

std::vector<Block> blocks_on(c10::DeviceIndex device);

}  // namespace gralora::device
