// Scratch memory and the parallel loop of the kernels.
#pragma once

#include <omp.h>

#include <cstdlib>
#include <new>

#include "microkernel.h"

namespace gralora::cpu::GRALORA_ISA {

// Uninitialised memory, aligned to a cache line; made outside parallel regions, where a failure may be thrown.
template <class Acc>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count) { reserve(count); }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void reserve(int64_t count) {
    free(data_);
    data_ = static_cast<Acc*>(aligned_alloc(64, size_t(round_up(larger(count, 1) * int64_t(sizeof(Acc)), 64))));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  Acc* get() const { return data_; }

 private:
  Acc* data_ = nullptr;
};

// One piece of scratch per thread, a cache line apart.
template <class Acc>
class ThreadBuffers {
 public:
  ThreadBuffers(int threads, int64_t count) : stride_(round_up(count + 64, 64)), all_(stride_ * threads) {}
  Acc* of(int thread) const { return all_.get() + thread * stride_; }

 private:
  int64_t stride_;
  Buffer<Acc> all_;
};

// Calls f(item, thread) for each item, in any order and on any thread: items must write disjoint memory, and what one
// writes must depend on its number alone; then results do not depend on the number of threads.
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
