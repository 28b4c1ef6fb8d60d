// SPDX-License-Identifier: Apache-2.0
// Warp collectives: lanes meet, exchange operands, and go on.
#pragma once

#include "machine.h"

namespace gralora::emulator {

constexpr uint32_t kFullWarp = 0xffffffffu;

// Each lane of `mask` brings `in` and gets `out`; exchange(ins, outs), arrays of 32 pointers, runs once, in the lane
// that comes last. Only __syncwarp orders memory among the lanes.
template <class In, class Out, class Exchange>
void collective(const char* operation, uint32_t mask, const In& in, Out& out, bool orders_memory, Location at,
                Exchange&& exchange) {
  Fiber* me = current();
  Gathering* gathering = nullptr;
  char* sync;
  {
    OwnAccesses own;
    Warp& warp = machine()->block->warps[size_t(me->warp)];
    const auto refuse = [&](const std::string& why) { fail(std::string(operation) + " at " + at.text() + ": " + why); };
    if ((mask >> me->lane & 1) == 0) refuse("the calling lane is not in its own mask");
    if ((mask & ~warp.live) != 0) refuse("a lane of the mask has returned or does not exist");
    for (Gathering& other : warp.gatherings) {
      if (other.mask == mask)
        gathering = &other;
      else if (other.arrived != 0 && (other.mask & mask) != 0)
        refuse(std::string("others wait with an overlapping mask in ") + other.operation + " at " + other.at.text());
    }
    if (gathering == nullptr) {
      warp.gatherings.emplace_back();
      gathering = &warp.gatherings.back();
      gathering->mask = mask;
    }
    if (gathering->arrived != 0 && (strcmp(gathering->operation, operation) != 0 || !(gathering->at == at)))
      refuse(std::string("divergent: others wait in ") + gathering->operation + " at " + gathering->at.text());
    gathering->operation = operation;
    gathering->at = at;
    sync = &gathering->sync[gathering->phase];
  }
  if (orders_memory) release(sync);
  bool last;
  {
    OwnAccesses own;
    me->in = &in;
    me->out = &out;
    gathering->arrived |= 1u << me->lane;
    last = gathering->arrived == mask;
    if (last) {
      statistics().collectives++;
      const In* ins[32] = {};
      Out* outs[32] = {};
      Fiber* lanes = &machine()->fibers[size_t(me->warp) * 32];
      for (int lane = 0; lane < 32; lane++) {
        if ((mask >> lane & 1) == 0) continue;
        ins[lane] = static_cast<const In*>(lanes[lane].in);
        outs[lane] = static_cast<Out*>(lanes[lane].out);
      }
      exchange(ins, outs);
      gathering->arrived = 0;
      gathering->phase ^= 1;
      for (int lane = 0; lane < 32; lane++) {
        if ((mask >> lane & 1) == 0) continue;
        lanes[lane].in = nullptr;
        if (&lanes[lane] != me) wake(lanes[lane]);
      }
    }
  }
  if (!last) wait_in(operation, at);
  if (orders_memory) acquire(sync);
}

inline void sync_warp(uint32_t mask, Location at) {
  const char in = 0;
  char out = 0;
  collective("__syncwarp", mask, in, out, true, at, [](const char* const*, char* const*) {});
}

// The value of lane `source`.
template <class T>
T shuffle(const char* operation, uint32_t mask, T value, int source, Location at) {
  struct In {
    T value;
    int source;
  };
  const In in{value, source};
  T out{};
  collective(operation, mask, in, out, false, at, [&](const In* const* ins, T* const* outs) {
    for (int lane = 0; lane < 32; lane++) {
      if ((mask >> lane & 1) == 0) continue;
      const int from = ins[lane]->source;
      if (from < 0 || from > 31 || (mask >> from & 1) == 0)
        fail(std::string(operation) + " at " + at.text() + ": lane " + std::to_string(lane) + " reads lane " +
             std::to_string(from) + ", which is not in the mask");
      *outs[lane] = ins[from]->value;
    }
  });
  return out;
}

}  // namespace gralora::emulator
