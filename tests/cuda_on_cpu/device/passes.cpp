// SPDX-License-Identifier: Apache-2.0
// The operations of gralora_ext on the emulated devices, by the same C++ as on CUDA's, and what is
// checked of each launch: it goes to the current stream of the current device, and touches that
// device's memory alone, within its blocks.
#include <map>
#include <string>

#include "memory.h"
#include "registration.h"
#include "streams.h"

extern "C" {  // of the emulator (emulator/c_api.h), which is in the library of the kernels
void gralora_emulator_observe(const char* (*before)(const char*, void*), void (*after)());
void gralora_emulator_clear();
int gralora_emulator_register(const char* name, const void* data, int64_t bytes);
}

TORCH_LIBRARY_IMPL(gralora_ext, PrivateUse1, m) { gralora::register_kernels(m); }

// csrc/run.cpp would call them for tensors of the CPU.
namespace gralora::cpu {
namespace {
[[noreturn]] void refuse() { TORCH_CHECK(false, "a tensor of an emulated device came to the CPU's kernels"); }
}  // namespace
void forward(const ForwardParams&) { refuse(); }
void backward(const BackwardParams&) { refuse(); }
void merge(const MergeParams&) { refuse(); }
void linear(const LinearParams&) { refuse(); }
void merge_coded(const CodedParams&) { refuse(); }
void unmerge_coded(const CodedParams&) { refuse(); }
void checksums(const CodedParams&) { refuse(); }
}  // namespace gralora::cpu

namespace gralora::device {
namespace {

std::map<std::string, int64_t>& launches() {
  static std::map<std::string, int64_t> instance;
  return instance;
}

// Returns what is wrong, or nullptr.
const char* before_launch(const char* name, void* stream) {
  open_memory();
  if (stream != current_handle()) return "the stream is not the current one of the current device";
  launches()[name]++;
  gralora_emulator_clear();
  const auto blocks = blocks_on(current_index());
  for (size_t i = 0; i < blocks.size(); i++)
    if (gralora_emulator_register(std::to_string(i).c_str(), blocks[i].data, int64_t(blocks[i].bytes)) != 0)
      return "the blocks of the device overlap";
  if (blocks.empty()) return "there is no memory on the current device";
  return nullptr;
}

const bool observed = [] {
  gralora_emulator_observe(&before_launch, &close_memory);
  return true;
}();

}  // namespace
}  // namespace gralora::device

// How often a kernel of that name was launched
extern "C" __attribute__((visibility("default"))) int64_t gralora_device_launches(const char* name) {
  const auto& counts = gralora::device::launches();
  const auto found = counts.find(name);
  return found == counts.end() ? 0 : found->second;
}
