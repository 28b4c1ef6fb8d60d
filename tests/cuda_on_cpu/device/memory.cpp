// SPDX-License-Identifier: Apache-2.0
#include "memory.h"

#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

namespace gralora::device {
namespace {

constexpr size_t kArena = size_t(1) << 33;  // addresses alone: pages are taken when they are written
constexpr size_t kAlignment = 512;
constexpr size_t kHugePage = size_t(1) << 21;  // to open and close few of them is quick

class Memory {
 public:
  static Memory& instance() {
    static auto* const memory = new Memory;  // never destroyed: tensors may outlive static objects
    return *memory;
  }

  void open() {
    mutex_.lock();
    if (depth_++ == 0) protect(PROT_READ | PROT_WRITE);
  }
  void close() {
    if (--depth_ == 0) protect(PROT_NONE);
    mutex_.unlock();
  }

  char* allocate(size_t bytes, c10::DeviceIndex device) {
    const Access access;
    // What lies between two blocks belongs to none.
    const size_t room = (bytes + kAlignment) / kAlignment * kAlignment + kAlignment;
    auto place = std::find_if(free_.begin(), free_.end(), [&](const auto& hole) { return hole.second >= room; });
    size_t first = used_;
    if (place != free_.end()) {
      first = place->first;
      if (place->second > room) free_[first + room] = place->second - room;
      free_.erase(place);
    } else {
      TORCH_CHECK(used_ + room <= kArena, "the emulated devices are out of memory");
      used_ += room;
      protect(PROT_READ | PROT_WRITE);
    }
    taken_[first] = {room, {arena_ + first, bytes, device}};
    std::memset(arena_ + first, 0xff, bytes);
    return arena_ + first;
  }

  void release(void* data) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    const size_t first = size_t(static_cast<char*>(data) - arena_);
    const auto block = taken_.find(first);
    auto hole = free_.emplace(first, block->second.room).first;
    taken_.erase(block);
    if (hole->second >= 2 * kHugePage) {  // its pages are given back: to open and close them costs
      const size_t from = (first + kHugePage - 1) / kHugePage * kHugePage;
      madvise(arena_ + from, (first + hole->second - from) / kHugePage * kHugePage, MADV_DONTNEED);
    }
    const auto next = std::next(hole);
    if (next != free_.end() && hole->first + hole->second == next->first)
      hole->second += next->second, free_.erase(next);
    if (hole == free_.begin()) return;
    const auto before = std::prev(hole);
    if (before->first + before->second == hole->first) before->second += hole->second, free_.erase(hole);
  }

  std::vector<Block> blocks_on(c10::DeviceIndex device) {
    const std::lock_guard<std::recursive_mutex> lock(mutex_);
    std::vector<Block> found;
    for (const auto& [first, taken] : taken_)
      if (taken.block.device == device) found.push_back(taken.block);
    return found;
  }

 private:
  struct Taken {
    size_t room;
    Block block;
  };

  Memory() {
    void* const arena =
        mmap(nullptr, kArena + kHugePage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    TORCH_CHECK(arena != MAP_FAILED, "no addresses for the memory of the emulated devices");
    arena_ = static_cast<char*>(arena) + (kHugePage - reinterpret_cast<uintptr_t>(arena) % kHugePage);
    madvise(arena_, kArena, MADV_HUGEPAGE);
  }

  void protect(int how) {
    const size_t pages = (used_ + kHugePage - 1) / kHugePage * kHugePage;
    TORCH_CHECK(mprotect(arena_, pages, how) == 0, "mprotect failed");
  }

  std::recursive_mutex mutex_;
  int depth_ = 0;
  char* arena_ = nullptr;
  size_t used_ = 0;
  std::map<size_t, Taken> taken_;  // by their place in the arena
  std::map<size_t, size_t> free_;  // place and size
};

class DeviceAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    const c10::Device device = c10::impl::VirtualGuardImpl(c10::kPrivateUse1).getDevice();
    void* const data = bytes > 0 ? Memory::instance().allocate(bytes, device.index()) : nullptr;
    return {data, data, &release, device};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    const Access access;
    std::memcpy(to, from, bytes);
  }

 private:
  static void release(void* data) {
    if (data != nullptr) Memory::instance().release(data);
  }
};

}  // namespace

void open_memory() { Memory::instance().open(); }
void close_memory() { Memory::instance().close(); }

c10::Allocator* allocator() {
  static auto* const instance = new DeviceAllocator;
  return instance;
}

std::vector<Block> blocks_on(c10::DeviceIndex device) { return Memory::instance().blocks_on(device); }

}  // namespace gralora::device
