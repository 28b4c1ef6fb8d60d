// SPDX-License-Identifier: Apache-2.0
#include "result_memory.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/accumulate.h>

#include <list>
#include <mutex>

#ifdef __linux__
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace gralora {
namespace {

constexpr size_t kSmallest = size_t(1) << 17;  // smaller ones glibc keeps itself
constexpr size_t kIdle = size_t(1) << 27;      // most that the pool holds when no tensor uses it

struct Block {
  c10::DataPtr memory;  // torch's own, so that its profiler and its settings apply
  size_t bytes;
};

// Asks for larger pages, as NumPy does: fewer faults where memory is new.
void advise_huge_pages(void* data, size_t bytes) {
#ifdef __linux__
  constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  if (bytes >= 4 * kHugePage) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

class Pool final : public c10::Allocator {
 public:
  static Pool& instance();

  // A fork waits for the lock: the child has one thread, and would wait for ever for another one
  // to open it.
  Pool() {
#ifdef __linux__
    const auto unlock = [] { instance().mutex_.unlock(); };
    pthread_atfork([] { instance().mutex_.lock(); }, unlock, unlock);
#endif
  }

  c10::DataPtr allocate(size_t bytes) override {
    Block* block = take(bytes);
    if (block == nullptr) {
      block = new Block{c10::GetCPUAllocator()->allocate(bytes), bytes};
      advise_huge_pages(block->memory.get(), bytes);
    }
    return {block->memory.get(), block, &Pool::release, c10::Device(c10::DeviceType::CPU)};
  }

  void copy_data(void* to, const void* from, std::size_t bytes) const override { default_copy_data(to, from, bytes); }

 private:
  // The idle block that fits best and wastes at most an eighth; of several the one released last,
  // which caches may still hold: blocks lie in the order of their release.
  Block* take(size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = idle_.end();
    for (auto it = idle_.begin(); it != idle_.end(); ++it) {
      const size_t has = (*it)->bytes;
      if (has >= bytes && has - bytes <= bytes / 8 && (best == idle_.end() || has <= (*best)->bytes)) best = it;
    }
    if (best == idle_.end()) return nullptr;
    Block* block = *best;
    idle_.erase(best);
    idle_bytes_ -= block->bytes;
    return block;
  }

  static void release(void* context) {
    Pool& pool = instance();
    auto* block = static_cast<Block*>(context);
    std::list<Block*> evicted;   // freed without the lock
    if (block->bytes > kIdle) {  // it would take the place of all others
      evicted.push_back(block);
    } else {
      const std::lock_guard<std::mutex> lock(pool.mutex_);
      pool.idle_.push_back(block);
      pool.idle_bytes_ += block->bytes;
      while (pool.idle_bytes_ > kIdle) {
        pool.idle_bytes_ -= pool.idle_.front()->bytes;
        evicted.splice(evicted.end(), pool.idle_, pool.idle_.begin());
      }
    }
    for (Block* old : evicted) delete old;
  }

  std::mutex mutex_;
  std::list<Block*> idle_;  // in the order of their release
  size_t idle_bytes_ = 0;
};

// Made when the library is loaded, before any fork could meet it half made; never destroyed:
// tensors may outlive static objects.
Pool* const the_pool = new Pool;
Pool& Pool::instance() { return *the_pool; }

// Straight from an allocator: on the CPU an op is below all that the dispatcher would ask.
constexpr c10::DispatchKeySet kCpu(c10::DispatchKey::CPU);

c10::Allocator* allocator_of(size_t bytes) {
  return bytes < kSmallest ? c10::GetCPUAllocator() : static_cast<c10::Allocator*>(&Pool::instance());
}

}  // namespace

at::Tensor empty_result_like(const at::Tensor& like) {
  if (!like.is_cpu() || !like.is_non_overlapping_and_dense()) return at::empty_like(like);
  return at::Tensor(at::detail::empty_strided_generic(like.sizes(), like.strides(), allocator_of(like.nbytes()), kCpu,
                                                      like.scalar_type()));
}

at::Tensor empty_result(at::IntArrayRef sizes, const at::Tensor& like, at::ScalarType type) {
  if (!like.is_cpu()) return at::empty(sizes, like.options().dtype(type).memory_format(at::MemoryFormat::Contiguous));
  const size_t bytes = size_t(c10::multiply_integers(sizes)) * c10::elementSize(type);
  return at::Tensor(at::detail::empty_generic(sizes, allocator_of(bytes), kCpu, type, at::MemoryFormat::Contiguous));
}

}  // namespace gralora
