// SPDX-License-Identifier: Apache-2.0
// A launch: block after block, each until all its threads have returned.
#pragma once

#include <numeric>
#include <utility>

#include "traffic.h"

namespace gralora::emulator {

// The first frame of each fiber.
GRALORA_HIDDEN_FROM_TSAN inline void run_thread() {
  Machine& m = *machine();
  Fiber* me = m.current;
#if GRALORA_ASAN
  const void* bottom;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &bytes);
  if (m.host.bottom == nullptr) m.host.bottom = bottom, m.host.bytes = bytes;  // the first one comes from the host
#endif
  try {
    m.entry(m.argument);
  } catch (const std::exception& error) {
    fail(error.what());
  }
  Fiber* next;
  {
    OwnAccesses own;
    Block& block = *m.block;
    block.live--;
    Warp& warp = block.warps[size_t(me->warp)];
    warp.live &= ~(1u << me->lane);
    for (const Gathering& gathering : warp.gatherings)
      if (gathering.arrived != 0 && (gathering.mask >> me->lane & 1) != 0)
        fail(std::string("returns while its warp waits for it in ") + gathering.operation + " at " +
             gathering.at.text());
    if (block.barrier.arrived > 0) fail("returns while others wait at the barrier at " + block.barrier.at.text());
    me->done = true;
    next = take_ready();
  }
  release(&m.launch_end);
  switch_to(me, next);
  abort();
}

// What lives as long as a launch.
class Launch {
 public:
  Launch(dim3 grid, dim3 block, size_t dynamic_bytes, void (*entry)(void*), void* argument) {
    if (machine() != nullptr) throw Error("a launch within a launch");
    const size_t threads = size_t(block.x) * block.y * block.z;
    constexpr unsigned kMaxGridYZ = 65535;
    if (threads == 0 || threads > 1024 || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
        grid.y > kMaxGridYZ || grid.z > kMaxGridYZ)
      throw Error("no such launch: grid " + text({grid.x, grid.y, grid.z}) + ", block " +
                  text({block.x, block.y, block.z}));
    const size_t limit = shared_limit(config().capability);
    if (dynamic_bytes > limit)
      throw Error("the launch takes " + std::to_string(dynamic_bytes) + " bytes of shared memory, more than " +
                  std::to_string(limit));
    m_.grid = grid;
    m_.block_size = block;
    m_.dynamic_bytes = dynamic_bytes;
    m_.threads = int(threads);
    m_.entry = entry;
    m_.argument = argument;
    m_.random_state = config().seed * 0x9E3779B97F4A7C15ull | 1;
    m_.fibers.resize(threads);
    m_.stacks.resize(threads);
#if GRALORA_TSAN
    m_.host.tsan = __tsan_get_current_fiber();
#endif
    machine() = &m_;
  }
  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;
  ~Launch() {
    acquire(&m_.launch_end);
    end_block();
    for (char* data : freed_) free(data);
    machine() = nullptr;
  }

  void run() {
    std::vector<size_t> order(size_t(m_.grid.x) * m_.grid.y * m_.grid.z);
    std::iota(order.begin(), order.end(), size_t(0));
    if (config().order == Order::Random)
      for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[m_.random() % i]);
    for (const size_t block : order) run_block(block);
  }

 private:
  static uint3 index_in(dim3 size, size_t linear) {
    return {unsigned(linear % size.x), unsigned(linear / size.x % size.y), unsigned(linear / size.x / size.y)};
  }

  void start_block(size_t linear) {
    OwnAccesses own;
    m_.block = std::make_unique<Block>();
    m_.block->index = index_in(m_.grid, linear);
    m_.block->live = m_.threads;
    m_.block->warps.resize(size_t(m_.threads + 31) / 32);
    m_.ready.clear();
    for (int i = 0; i < m_.threads; i++) {
      Fiber& fiber = m_.fibers[size_t(i)];
      fiber = Fiber();
      fiber.index = index_in(m_.block_size, size_t(i));
      fiber.linear = i, fiber.lane = i % 32, fiber.warp = i / 32;
      m_.block->warps[size_t(fiber.warp)].live |= 1u << fiber.lane;
      // Fresh ones for TSan: to it, what a new fiber writes on an old stack would race with the fiber before.
      auto& stack = m_.stacks[size_t(i)];
      if (stack == nullptr || GRALORA_TSAN) stack.reset(), stack = std::make_unique<Stack>(kStackBytes);
      fiber.stack_pointer = stack->enter(&run_thread);
#if GRALORA_TSAN
      fiber.tsan = __tsan_create_fiber(0);  // the host has acquired nothing from earlier blocks: they stay unordered
      __tsan_set_fiber_name(fiber.tsan, name_of(fiber).c_str());
#endif
      m_.ready.push_back(i);
    }
  }

  void run_block(size_t linear) {
    start_block(linear);
    switch_to(nullptr, take_ready());
    OwnAccesses own;
    std::string error = m_.error;
    if (error.empty() && m_.block->live > 0) error = deadlock();
    end_block();
    if (!error.empty()) throw Error(error);
  }

  std::string deadlock() const {
    std::string message = "deadlock:";
    constexpr int kShown = 4;
    int waiting = 0;
    for (const Fiber& fiber : m_.fibers)
      if (!fiber.done && waiting++ < kShown)
        message += "\n  " + name_of(fiber) + " waits in " + fiber.waits_in + " at " + fiber.waits_at.text();
    if (waiting > kShown) message += "\n  and " + std::to_string(waiting - kShown) + " more";
    return message;
  }

  void end_block() {
    if (m_.block == nullptr) return;
#if GRALORA_TSAN
    // One that was left amid the emulator's own accesses must not end so: TSan would report it.
    for (Fiber& fiber : m_.fibers)
      if (fiber.done) __tsan_destroy_fiber(fiber.tsan);
#endif
    for (const SharedArray& array : m_.block->shared) {
      // TSan would take the next block's use of the same address for a race.
      if (GRALORA_TSAN)
        freed_.push_back(array.data);
      else
        free(array.data);
    }
    m_.block.reset();
  }

  static constexpr size_t kStackBytes = (GRALORA_ASAN ? 256 : 64) * 1024;
  Machine m_;
  std::vector<char*> freed_;  // at the end of the launch
};

// What an observer wants to know of a launch (Config).
struct Observed {
  Observed(const std::string& name, cudaStream_t stream) {
    if (config().before == nullptr) return;
    const char* wrong = config().before(name.c_str(), stream);
    if (wrong != nullptr) config().after(), throw Error(wrong);
  }
  Observed(const Observed&) = delete;
  Observed& operator=(const Observed&) = delete;
  ~Observed() {
    if (config().after != nullptr) config().after();
  }
};

template <class Kernel>
cudaError_t launch(const Launched& what, cudaStream_t stream, Kernel&& kernel) {
  try {
    const Observed observed(what.name, stream);
    traffic().launches.push_back(what);
    const auto entry = [](void* argument) { (*static_cast<std::remove_reference_t<Kernel>*>(argument))(); };
    Launch(what.grid, what.block, what.dynamic_bytes, entry, &kernel).run();
    return cudaSuccess;
  } catch (const std::exception& error) {
    error_message() = what.name + ": " + error.what();
    return cudaErrorLaunchFailure;
  }
}

}  // namespace gralora::emulator
