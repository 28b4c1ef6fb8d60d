// SPDX-License-Identifier: Apache-2.0
// Scratch memory and the parallel loop of the kernels.
#pragma once

#include <omp.h>

#include <cstdlib>
#include <new>

#include "microkernel.h"

namespace gralora::cpu::GRALORA_ISA {

// The scratch memory of one call: not initialised, aligned to cache lines. It is taken before a
// parallel region begins and before anything is written, since a failure may be thrown only there.
// When a call ends, the calling thread caches as much memory as it needed (up to kMostCached
// bytes) for its next call: fresh memory would cost a page fault per 4 KiB, often more than the
// arithmetic. The cached memory has one user at a time. A Scratch that is made while it is in use
// takes fresh memory.
class Scratch {
 public:
  Scratch() : has_cached_(!cached().in_use) { cached().in_use = true; }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    while (extra_ != nullptr) {
      Extra* next = extra_->next;
      free(extra_);
      extra_ = next;
    }
    if (!has_cached_) return;
    if (used_ > cached().bytes && used_ <= kMostCached) cached().renew(used_);
    cached().in_use = false;
  }

  template <class T>
  T* take(int64_t count) {
    const int64_t bytes = round_up(larger(count, 1) * int64_t(sizeof(T)), 64);
    used_ += bytes;
    if (has_cached_ && used_ <= cached().bytes) return reinterpret_cast<T*>(cached().data + used_ - bytes);
    auto* extra = static_cast<Extra*>(aligned_alloc(64, size_t(bytes + 64)));
    if (extra == nullptr) throw std::bad_alloc();
    extra->next = extra_, extra_ = extra;
    return reinterpret_cast<T*>(reinterpret_cast<char*>(extra) + 64);
  }

 private:
  static constexpr int64_t kMostCached = 1 << 26;
  struct Extra {
    Extra* next;
  };
  struct Cached {
    char* data = nullptr;
    int64_t bytes = 0;
    bool in_use = false;
    ~Cached() { free(data); }
    void renew(int64_t size) {
      free(data);
      data = static_cast<char*>(aligned_alloc(64, size_t(size)));
      bytes = data == nullptr ? 0 : size;
    }
  };
  static Cached& cached() {
    static thread_local Cached block;
    return block;
  }

  const bool has_cached_;
  Extra* extra_ = nullptr;
  int64_t used_ = 0;
};

// A buffer of scratch memory for each thread. Two buffers never share a cache line.
template <class T>
class PerThread {
 public:
  PerThread(Scratch& scratch, int threads, int64_t count)
      : stride_(round_up(count + 64, 64)), all_(scratch.take<T>(stride_ * threads)) {}
  T* of(int thread) const { return all_ + thread * stride_; }

 private:
  int64_t stride_;
  T* all_;
};

// Calls f(item, thread) for each item, in any order and on any thread. Items must write disjoint
// memory, and what an item writes must depend on its number alone, so that results do not depend
// on the number of threads.
template <class F>
inline void parallel_items(int64_t items, int threads, F&& f) {
  if (threads <= 1 || items <= 1) {
    for (int64_t item = 0; item < items; item++) f(item, 0);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t item = 0; item < items; item++) f(item, thread);
  }
}

}  // namespace gralora::cpu::GRALORA_ISA
