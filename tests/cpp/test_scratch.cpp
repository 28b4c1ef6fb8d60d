// SPDX-License-Identifier: Apache-2.0
// Scratch of one thread: what lives at once lies apart, and the block that a thread keeps serves one user at a time.
#define GRALORA_CPU_CAPABILITY default
#include "cpu/memory.h"

#include <cstring>

#include "check.h"

using namespace gralora::cpu::isa_default;

namespace {

bool holds(const char* data, int value, int64_t count) {
  for (int64_t i = 0; i < count; i++)
    if (data[i] != char(value)) return false;
  return true;
}

void test_two_that_live_at_once_lie_apart() {
  constexpr int64_t kCount = 1000;
  {
    Scratch().take<char>(4 * kCount);
  }  // from here on this thread caches a block
  for (int round = 0; round < 3; round++) {
    Scratch outer;
    char* first = outer.take<char>(kCount);
    memset(first, 1, kCount);
    {
      Scratch inner, innermost;
      char *second = inner.take<char>(kCount), *third = innermost.take<char>(kCount);
      memset(second, 2, kCount), memset(third, 3, kCount);
      EXPECT(holds(first, 1, kCount) && holds(second, 2, kCount) && holds(third, 3, kCount));
    }
    char* last = outer.take<char>(8 * kCount);
    memset(last, 4, 8 * kCount);
    EXPECT(holds(first, 1, kCount) && holds(last, 4, 8 * kCount));
  }
}

void test_one_after_the_other_share_the_block() {
  {
    Scratch().take<char>(1 << 20);
  }
  char* places[2];
  for (char*& place : places) place = Scratch().take<char>(1 << 20);
  EXPECT(places[0] == places[1]);
}

}  // namespace

int main() {
  test_two_that_live_at_once_lie_apart();
  test_one_after_the_other_share_the_block();
  return check::result();
}
