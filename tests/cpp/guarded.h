// SPDX-License-Identifier: Apache-2.0
// Memory that ends where a page begins that may not be touched: what reads or writes beyond an array dies at once.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#include <unistd.h>
#endif

template <class T>
struct GuardedAllocator {
  using value_type = T;

  GuardedAllocator() = default;
  template <class U>
  GuardedAllocator(const GuardedAllocator<U>&) {}

#ifdef __linux__
  T* allocate(size_t count) {
    const size_t size = pages(count);
    void* begin = mmap(nullptr, size + page(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (begin == MAP_FAILED || mprotect(static_cast<char*>(begin) + size, page(), PROT_NONE) != 0)
      throw std::bad_alloc();
    return reinterpret_cast<T*>(static_cast<char*>(begin) + size) - count;
  }
  void deallocate(T* data, size_t count) {
    const size_t size = pages(count);
    munmap(reinterpret_cast<char*>(data + count) - size, size + page());
  }

 private:
  static size_t page() { return size_t(sysconf(_SC_PAGESIZE)); }
  static size_t pages(size_t count) { return (count * sizeof(T) + page() - 1) / page() * page(); }
#else
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T))); }
  void deallocate(T* data, size_t) { ::operator delete(data); }
#endif
};

template <class T, class U>
bool operator==(const GuardedAllocator<T>&, const GuardedAllocator<U>&) {
  return true;
}
template <class T, class U>
bool operator!=(const GuardedAllocator<T>&, const GuardedAllocator<U>&) {
  return false;
}
