// SPDX-License-Identifier: Apache-2.0
// What the emulator tells the sanitizers.
//
// ThreadSanitizer sees each CUDA thread as a fiber, ordered with others by the kernel's barriers alone.
// It then finds races in shared and global memory, within a block and between blocks. The emulator's own state,
// which all fibers share, is hidden from it.
#pragma once

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_write_range(void*, unsigned long);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#define GRALORA_TSAN 1
#define GRALORA_HIDDEN_FROM_TSAN __attribute__((no_sanitize("thread"), noinline))
#else
#define GRALORA_TSAN 0
#define GRALORA_HIDDEN_FROM_TSAN
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define GRALORA_ASAN 1
#else
#define GRALORA_ASAN 0
#endif

namespace gralora::emulator {

// What happened before a release of `object` happens before what follows an acquire of it.
inline void release([[maybe_unused]] void* object) {
#if GRALORA_TSAN
  __tsan_release(object);
#endif
}
inline void acquire([[maybe_unused]] void* object) {
#if GRALORA_TSAN
  __tsan_acquire(object);
#endif
}

// To the race detector the current fiber writes these bytes now.
inline void mark_written([[maybe_unused]] void* first, [[maybe_unused]] unsigned long bytes) {
#if GRALORA_TSAN
  __tsan_write_range(first, bytes);
#endif
}

// While one lives, the current fiber's accesses are the emulator's, not the kernel's.
struct OwnAccesses {
#if GRALORA_TSAN
  OwnAccesses() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~OwnAccesses() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  OwnAccesses() {}
  ~OwnAccesses() {}
#endif
  OwnAccesses(const OwnAccesses&) = delete;
  OwnAccesses& operator=(const OwnAccesses&) = delete;
};

}  // namespace gralora::emulator
