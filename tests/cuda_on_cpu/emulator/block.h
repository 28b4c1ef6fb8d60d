// SPDX-License-Identifier: Apache-2.0
// A block's barrier and its shared memory.
#pragma once

#include "machine.h"

namespace gralora::emulator {

// Stricter than CUDA: all threads of the block must come, and to the same line.
inline void sync_block(Location at) {
  Fiber* me = current();
  char* sync;
  {
    OwnAccesses own;
    Block& block = *machine()->block;
    Barrier& barrier = block.barrier;
    if (block.live != machine()->threads) fail("barrier at " + at.text() + " after threads of the block have returned");
    if (barrier.arrived > 0 && !(barrier.at == at))
      fail("divergent barrier: at " + at.text() + " while others wait at " + barrier.at.text());
    barrier.at = at;
    sync = &barrier.sync[barrier.phase];
  }
  release(sync);
  bool last;
  {
    OwnAccesses own;
    Barrier& barrier = machine()->block->barrier;
    last = ++barrier.arrived == machine()->threads;
    if (last) {
      barrier.arrived = 0;
      barrier.phase ^= 1;
      for (Fiber& fiber : machine()->fibers)
        if (fiber.in == &barrier) fiber.in = nullptr, wake(fiber);
    } else {
      me->in = &barrier;
    }
  }
  if (!last) wait_in("barrier", at);
  acquire(sync);
#if GRALORA_TSAN
  // A copy in flight may land after the barrier as well as before it.
  std::vector<PendingCopy> pending;
  {
    OwnAccesses own;
    pending = me->open_copies;
    for (const auto& group : me->copy_groups) pending.insert(pending.end(), group.begin(), group.end());
  }
  for (const PendingCopy& copy : pending) mark_written(copy.to, size_t(copy.bytes));
#endif
}

// The block's array of this key, made by the first thread that comes. Each is a heap block of its own, whose ends ASan
// sees, and starts as 0xff: NaN in fp32, bf16 and fp16.
inline char* shared_array(const void* key, size_t bytes) {
  SharedArray* array = nullptr;
  bool fresh = false;
  {
    OwnAccesses own;
    auto& arrays = machine()->block->shared;
    for (SharedArray& other : arrays)
      if (other.key == key) array = &other;
    if (array == nullptr) {
      fresh = true;
      size_t total = bytes;
      for (const SharedArray& other : arrays) total += other.bytes;
      const size_t limit = shared_limit(config().capability);
      if (total > limit)
        fail("the block takes " + std::to_string(total) + " bytes of shared memory, more than " +
             std::to_string(limit));
      if (int64_t(total) > statistics().shared_bytes) statistics().shared_bytes = int64_t(total);
      constexpr size_t kAlignment = 1024;
      void* data = nullptr;
      if (posix_memalign(&data, kAlignment, bytes > 0 ? bytes : 1) != 0) fail("no memory for a shared array");
      memset(data, 0xff, bytes);
      arrays.push_back({key, static_cast<char*>(data), bytes});
      array = &arrays.back();
    }
  }
  fresh ? release(&array->sync) : acquire(&array->sync);
  OwnAccesses own;
  return array->data;
}
inline char* dynamic_shared() {
  static char key;
  size_t bytes;
  {
    OwnAccesses own;
    bytes = machine()->dynamic_bytes;
  }
  return shared_array(&key, bytes);
}

// Whether these bytes lie in one shared array of the block.
inline bool is_shared(const void* first, size_t bytes) {
  OwnAccesses own;
  const auto address = reinterpret_cast<uintptr_t>(first);
  for (const SharedArray& array : machine()->block->shared) {
    const auto start = reinterpret_cast<uintptr_t>(array.data);
    if (address >= start && address + bytes <= start + array.bytes) return true;
  }
  return false;
}

}  // namespace gralora::emulator
