// SPDX-License-Identifier: Apache-2.0
// The emulated machine: one block at a time, its threads as fibers on one OS thread, in an order that a seed decides.
// A launch runs to its end before it returns; there is one machine in the process, and one launch at a time.
#pragma once

#include <cstdlib>
#include <memory>
#include <utility>

#include "fiber.h"

namespace gralora::emulator {

// Which ready thread runs next; with Random the blocks are shuffled too.
enum class Order { Fifo, Lifo, Random };
// When an asynchronous copy lands: at its wait, at its issue, or at either.
enum class Copies { Lazy, Eager, Random };

struct Config {
  Order order = Order::Random;
  uint64_t seed = 1;
  Copies copies = Copies::Lazy;
  int capability = 80, multiprocessors = 108;
  // mma adds as this capability's tensor cores do (tensor_core.h); else in double, rounded once
  bool truncates = false;
  // Called at each launch; what `before` returns is why it fails, and nullptr lets it run.
  const char* (*before)(const char* name, void* stream) = nullptr;
  void (*after)() = nullptr;
};
struct Statistics {
  int64_t switches, collectives, mma, ldmatrix;
  int64_t wavefronts, least_wavefronts;  // of ldmatrix's reads: more than the least are bank conflicts
  int64_t shared_bytes;                  // the most that a block took
};
inline Config& config() {
  static Config instance;
  return instance;
}
inline Statistics& statistics() {
  static Statistics instance;
  return instance;
}
// The bytes of shared memory that a block may take on a device of this compute capability; 0 where we do not know it.
// Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability", "Maximum amount of shared memory
// per thread block".
constexpr size_t shared_limit(int capability) {
  constexpr size_t kKiB = 1024;
  switch (capability) {
    case 70: return 96 * kKiB;
    case 75: return 64 * kKiB;
    case 80: return 163 * kKiB;
    case 86:
    case 89:
    case 120: return 99 * kKiB;
    case 90:
    case 100: return 227 * kKiB;
    default: return 0;
  }
}

// Of the last failure.
inline std::string& error_message() {
  static std::string instance;
  return instance;
}

// A warp collective that some lanes have reached.
struct Gathering {
  uint32_t mask = 0, arrived = 0;
  const char* operation = "";
  Location at{};
  int phase = 0;
  char sync[2] = {};  // one per phase: a lane may come back while others still leave
};
struct Warp {
  uint32_t live = 0;
  std::deque<Gathering> gatherings;
};
struct Barrier {
  int arrived = 0, phase = 0;
  Location at{};
  char sync[2] = {};
};
struct SharedArray {
  const void* key;
  char* data;
  size_t bytes;
  char sync = 0;
};

// Made anew for each block: the race detector must not take a block's synchronisation for the next one's.
struct Block {
  uint3 index{};
  int live = 0;  // threads that have not returned
  std::vector<Warp> warps;
  Barrier barrier;
  std::deque<SharedArray> shared;
};

struct Machine {
  dim3 grid, block_size;
  size_t dynamic_bytes = 0;
  int threads = 0;
  void (*entry)(void*) = nullptr;
  void* argument = nullptr;
  uint64_t random_state = 1;

  std::vector<Fiber> fibers;
  std::vector<std::unique_ptr<Stack>> stacks;  // of the fibers
  std::deque<int> ready;
  std::unique_ptr<Block> block;
  Fiber* current = nullptr;  // nullptr: the host
  std::string error;

  struct Host {
    void *stack_pointer = nullptr, *tsan = nullptr, *asan = nullptr;
    const void* bottom = nullptr;
    size_t bytes = 0;
  } host;
  char launch_end = 0;  // object of release and acquire; only the host acquires it

  uint64_t random() {  // xorshift64
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
  }
};
inline Machine*& machine() {
  static Machine* running = nullptr;
  return running;
}

GRALORA_HIDDEN_FROM_TSAN inline Fiber* current() { return machine()->current; }
GRALORA_HIDDEN_FROM_TSAN inline uint3 thread_index() { return machine()->current->index; }
GRALORA_HIDDEN_FROM_TSAN inline uint3 block_index() { return machine()->block->index; }
GRALORA_HIDDEN_FROM_TSAN inline dim3 block_size() { return machine()->block_size; }
GRALORA_HIDDEN_FROM_TSAN inline dim3 grid_size() { return machine()->grid; }

inline std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}
inline std::string name_of(const Fiber& fiber) {
  return "block " + text(machine()->block->index) + " thread " + text(fiber.index);
}

// From the running context to another; nullptr is the host.
GRALORA_HIDDEN_FROM_TSAN inline void switch_to(Fiber* from, Fiber* to) {
  Machine& m = *machine();
  statistics().switches++;
  m.current = to;
#if GRALORA_TSAN
  __tsan_switch_to_fiber(to ? to->tsan : m.host.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if GRALORA_ASAN
  const Stack* stack = to ? m.stacks[size_t(to->linear)].get() : nullptr;
  __sanitizer_start_switch_fiber(from ? (from->done ? nullptr : &from->asan) : &m.host.asan,
                                 to ? stack->bottom() : m.host.bottom, to ? stack->bytes() : m.host.bytes);
#endif
  gralora_emulator_switch(from ? &from->stack_pointer : &m.host.stack_pointer,
                          to ? to->stack_pointer : m.host.stack_pointer);
#if GRALORA_ASAN
  __sanitizer_finish_switch_fiber(from ? from->asan : m.host.asan, nullptr, nullptr);
#endif
}

// nullptr, the host, where none is ready: all threads have returned, or they wait for each other.
inline Fiber* take_ready() {
  OwnAccesses own;
  Machine& m = *machine();
  if (m.ready.empty() || !m.error.empty()) return nullptr;
  const size_t count = m.ready.size();
  const size_t chosen = config().order == Order::Fifo   ? 0
                        : config().order == Order::Lifo ? count - 1
                                                        : m.random() % count;
  if (chosen > 0) std::swap(m.ready[chosen], m.ready.back());
  const int thread = chosen > 0 ? m.ready.back() : m.ready.front();
  chosen > 0 ? m.ready.pop_back() : m.ready.pop_front();
  return &m.fibers[size_t(thread)];
}

GRALORA_HIDDEN_FROM_TSAN inline void wait_in(const char* operation, Location at) {
  Fiber* me = machine()->current;
  me->waits_in = operation;
  me->waits_at = at;
  release(&machine()->launch_end);  // it may never go on: where others fail
  switch_to(me, take_ready());
}
inline void wake(Fiber& fiber) {
  fiber.waits_in = nullptr;
  machine()->ready.push_back(fiber.linear);
}

// Ends the launch. The stacks of the threads are not unwound: what they own is lost.
[[noreturn]] GRALORA_HIDDEN_FROM_TSAN inline void fail(const std::string& message) {
  Machine* m = machine();
  if (m == nullptr || m->current == nullptr) throw Error(message);
  m->error = name_of(*m->current) + ": " + message;
  release(&m->launch_end);
  switch_to(m->current, nullptr);
  abort();
}

// For what intrinsics.cuh does not declare in code for older devices.
GRALORA_HIDDEN_FROM_TSAN inline void need_ampere(const char* operation, Location at) {
  if (config().capability < 80)
    fail(std::string(operation) + " at " + at.text() + ": there is none before compute capability 8.0");
}

}  // namespace gralora::emulator
