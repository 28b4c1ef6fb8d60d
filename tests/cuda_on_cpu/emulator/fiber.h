// SPDX-License-Identifier: Apache-2.0
// A fiber per CUDA thread: its stack, the switch between two fibers, and what the thread carries.
#pragma once

#include <cuda_runtime.h>  // types alone: nothing of libcudart is linked
#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "sanitizers.h"

#if !defined(__x86_64__)
#error "gralora_emulator_switch is written for x86-64 (System V ABI)"
#endif

// Saves the callee-saved registers on the running stack, that stack's pointer in *save, and goes on where the other
// stack was left.
extern "C" __attribute__((visibility("hidden"))) void gralora_emulator_switch(void** save, void* other);
asm(R"(
.pushsection .text
.weak gralora_emulator_switch
.hidden gralora_emulator_switch
.type gralora_emulator_switch, @function
gralora_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size gralora_emulator_switch, . - gralora_emulator_switch
.popsection
)");

namespace gralora::emulator {

struct Error : std::runtime_error {
  using runtime_error::runtime_error;
};

// A place in the kernel's source; as a default argument that of the caller.
struct Location {
  const char* file;
  int line;
  static constexpr Location here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
  bool operator==(const Location& other) const { return line == other.line && strcmp(file, other.file) == 0; }
  std::string text() const { return std::string(file) + ":" + std::to_string(line); }
};

// A cp.async that was issued and has not landed.
struct PendingCopy {
  void* to;
  const void* from;
  int bytes, valid;
};

// Grows downwards onto a guard page, so that an overflow faults.
class Stack {
 public:
  explicit Stack(size_t bytes) : bytes_(bytes) {
    void* all =
        mmap(nullptr, bytes + kGuard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (all == MAP_FAILED) throw Error("no memory for the stack of a thread");
    mprotect(all, kGuard, PROT_NONE);
    bottom_ = static_cast<char*>(all) + kGuard;
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  ~Stack() {
    unpoison();
    munmap(bottom_ - kGuard, bytes_ + kGuard);
  }

  // The stack pointer from which a switch enters `function`, which must not return.
  void* enter(void (*function)()) {
    unpoison();
    void** top = reinterpret_cast<void**>(bottom_ + bytes_);
    *--top = nullptr;  // as a return address would: the ABI wants rsp % 16 == 8 at entry
    *--top = reinterpret_cast<void*>(function);
    for (int saved = 0; saved < 6; saved++) *--top = nullptr;
    return top;
  }
  const void* bottom() const { return bottom_; }
  size_t bytes() const { return bytes_; }

 private:
  static constexpr size_t kGuard = 4096;
  // A fiber that was left for good leaves ASan's marks of its frames behind.
  void unpoison() {
#if GRALORA_ASAN
    __asan_unpoison_memory_region(bottom_, bytes_);
#endif
  }
  char* bottom_;
  size_t bytes_;
};

struct Fiber {
  void* stack_pointer = nullptr;
  uint3 index{};
  int linear = 0, lane = 0, warp = 0;
  bool done = false;

  const char* waits_in = nullptr;  // nullptr: it runs or is ready to
  Location waits_at{};
  const void* in = nullptr;  // a collective's operands, or the barrier that it waits at
  void* out = nullptr;

  std::vector<PendingCopy> open_copies;              // not committed
  std::deque<std::vector<PendingCopy>> copy_groups;  // the oldest first

  void* tsan = nullptr;
  void* asan = nullptr;
};

}  // namespace gralora::emulator
