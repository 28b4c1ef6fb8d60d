// SPDX-License-Identifier: Apache-2.0
// cp.async: a thread's copies land when it waits for their group, at once, or at either by chance. A kernel that is
// right with each does not depend on when the hardware does it.
#pragma once

#include "traffic.h"

namespace gralora::emulator {

inline void land(const PendingCopy& copy) {
  if (copy.valid > 0) memcpy(copy.to, copy.from, size_t(copy.valid));
  if (copy.bytes > copy.valid) memset(static_cast<char*>(copy.to) + copy.valid, 0, size_t(copy.bytes - copy.valid));
}

inline void copy_async(void* to, const void* from, int bytes, int valid, Location at) {
  if (valid < 0 || valid > bytes)
    fail("cp.async at " + at.text() + ": " + std::to_string(valid) + " valid bytes of " + std::to_string(bytes));
  check_aligned("cp.async", to, size_t(bytes), at);
  if (valid > 0) check_aligned("cp.async", from, size_t(bytes), at);
  if (!is_shared(to, size_t(bytes))) fail("cp.async at " + at.text() + ": destination outside of the shared arrays");
  count_global("cp.async", from, size_t(valid), kRead, at);
  const PendingCopy copy{to, from, bytes, valid};
  bool now;
  {
    OwnAccesses own;
    const Copies when = config().copies;
    now = when == Copies::Eager || (when == Copies::Random && (machine()->random() & 1) != 0);
    if (!now) current()->open_copies.push_back(copy);
  }
  if (now)
    land(copy);
  else
    mark_written(to, size_t(bytes));  // it may land from here on
}

inline void commit_copies() {
  OwnAccesses own;
  Fiber* me = current();
  me->copy_groups.push_back(std::move(me->open_copies));
  me->open_copies.clear();
}

// Lands all but the newest `pending` groups.
inline void wait_copies(size_t pending) {
  while (true) {
    std::vector<PendingCopy> group;
    {
      OwnAccesses own;
      auto& groups = current()->copy_groups;
      if (groups.size() <= pending) return;
      group = std::move(groups.front());
      groups.pop_front();
    }
    for (const PendingCopy& copy : group) land(copy);
  }
}

}  // namespace gralora::emulator
