// SPDX-License-Identifier: Apache-2.0
// The whole test harness: EXPECT(condition) prints what failed and where, and makes result() non-zero.
#pragma once

#include <cstdio>

namespace check {

inline int& failures() {
  static int count = 0;
  return count;
}

inline int result() {
  std::printf("%d failed checks\n", failures());
  return failures() == 0 ? 0 : 1;
}

}  // namespace check

#define EXPECT(condition)                                                        \
  do {                                                                           \
    if (!(condition)) {                                                          \
      std::printf("%s:%d: EXPECT(%s) failed\n", __FILE__, __LINE__, #condition); \
      ++check::failures();                                                       \
    }                                                                            \
  } while (false)
