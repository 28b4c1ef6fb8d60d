// SPDX-License-Identifier: Apache-2.0
// The run-time choice of the instruction set, under the cap in the environment variable GRALORA_EXT_CPU_CAPABILITY, which
// holds one of the three names, or "sse9", which must be refused.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "check.h"
#include "cpu/machine.h"

using gralora::cpu::Capability;

namespace {

void check_refused() {
  try {
    gralora::cpu::machine().capability;
    EXPECT(!"a wrong word was taken");
  } catch (const std::invalid_argument& error) {
    const std::string message = error.what();
    EXPECT(message.find("GRALORA_EXT_CPU_CAPABILITY") != std::string::npos);
    EXPECT(message.find("avx512") != std::string::npos);
    EXPECT(message.find("sse9") != std::string::npos);
  }
}

void check_chosen(const char* cap) {
  const std::vector<Capability> compiled = gralora::cpu::compiled_capabilities();
  EXPECT(!compiled.empty() && compiled.front() == Capability::Default);
  const Capability chosen = gralora::cpu::machine().capability;
  bool is_compiled = false, is_capped = false;
  for (const Capability capability : compiled) {
    is_compiled |= capability == chosen;
    is_capped |= std::strcmp(gralora::cpu::name(capability), cap) == 0 && chosen <= capability;
  }
  EXPECT(is_compiled);
  EXPECT(is_capped);
  EXPECT(gralora::cpu::machine().capability == chosen);
}

}  // namespace

int main() {
  const char* cap = std::getenv("GRALORA_EXT_CPU_CAPABILITY");
  std::strcmp(cap, "sse9") == 0 ? check_refused() : check_chosen(cap);
  return check::result();
}
