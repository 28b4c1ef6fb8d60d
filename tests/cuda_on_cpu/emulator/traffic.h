// SPDX-License-Identifier: Apache-2.0
// Which global buffer was read and written how often, and what was launched.
//
// A test names the buffers that a launch may touch; from then on an access outside of them is an error. Without names
// nothing is counted and nothing checked.
#pragma once

#include <algorithm>

#include "block.h"
#include "launches.h"

namespace gralora::emulator {

struct Buffer {
  std::string name;
  uintptr_t first;
  size_t bytes;
  int64_t read = 0, written = 0;  // bytes
};

struct Traffic {
  std::vector<Buffer> buffers;  // by address, disjoint
  std::vector<Launched> launches;

  void add(const std::string& name, const void* data, size_t bytes) {
    const Buffer buffer{name, reinterpret_cast<uintptr_t>(data), bytes};
    if (named(name) != nullptr) throw Error("buffer \"" + name + "\" is registered already");
    const auto next = after(buffer.first);
    const auto overlap = [&](const Buffer& a, const Buffer& b) {
      if (a.first + a.bytes > b.first && b.bytes > 0)
        throw Error("buffer \"" + name + "\" overlaps \"" + (a.name == name ? b.name : a.name) + "\"");
    };
    if (next != buffers.end()) overlap(buffer, *next);
    if (next != buffers.begin()) overlap(*std::prev(next), buffer);
    buffers.insert(next, buffer);
  }
  const Buffer* named(const std::string& name) const {
    for (const Buffer& buffer : buffers)
      if (buffer.name == name) return &buffer;
    return nullptr;
  }
  // The buffer in which all of these bytes lie, or nullptr.
  Buffer* holding(uintptr_t first, size_t bytes) {
    const auto next = after(first);
    if (next == buffers.begin()) return nullptr;
    Buffer& buffer = *std::prev(next);
    return first + bytes <= buffer.first + buffer.bytes ? &buffer : nullptr;
  }

 private:
  std::vector<Buffer>::iterator after(uintptr_t address) {
    return std::upper_bound(buffers.begin(), buffers.end(), address,
                            [](uintptr_t a, const Buffer& buffer) { return a < buffer.first; });
  }
};
inline Traffic& traffic() {
  static Traffic instance;
  return instance;
}

enum Access { kRead = 1, kWrite = 2 };

// Called before each access of a kernel to global memory.
inline void count_global(const char* operation, const void* data, size_t bytes, int access, Location at) {
  OwnAccesses own;
  if (bytes == 0 || traffic().buffers.empty()) return;
  const auto address = reinterpret_cast<uintptr_t>(data);
  Buffer* buffer = traffic().holding(address, bytes);
  if (buffer == nullptr) {
    std::string nearest;
    size_t least = SIZE_MAX;
    for (const Buffer& other : traffic().buffers) {
      const size_t end = other.first + other.bytes;
      const size_t distance = address < other.first ? other.first - address : address + bytes - end;
      if (distance >= least) continue;
      least = distance;
      nearest = address < other.first ? std::to_string(distance) + " bytes before \"" + other.name + "\""
                                      : std::to_string(distance) + " bytes beyond the end of \"" + other.name + "\"";
    }
    fail(std::string(operation) + " at " + at.text() + ": " + std::to_string(bytes) +
         " bytes outside of all registered buffers, " + nearest);
  }
  if (access & kRead) buffer->read += int64_t(bytes);
  if (access & kWrite) buffer->written += int64_t(bytes);
}

inline void check_aligned(const char* operation, const void* data, size_t alignment, Location at) {
  if (reinterpret_cast<uintptr_t>(data) % alignment != 0)
    fail(std::string(operation) + " at " + at.text() + ": address not aligned to " + std::to_string(alignment) +
         " bytes");
}

}  // namespace gralora::emulator
