// SPDX-License-Identifier: Apache-2.0
#include "run.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#ifdef GRALORA_HAVE_CUDA
#include "cuda/launch.h"
#ifdef GRALORA_CUDA_STREAM_HEADER
#include <c10/cuda/CUDAStream.h>
#endif
#endif

namespace gralora {
namespace {

// Those that a pass may use: its plan may want fewer (cpu/plan.h).
int threads() { return at::in_parallel_region() ? 1 : at::get_num_threads(); }

#ifdef GRALORA_HAVE_CUDA
void* current_stream(const at::Device& device) {
#ifdef GRALORA_CUDA_STREAM_HEADER  // torch before 2.11
  return c10::cuda::getCurrentCUDAStream(device.index()).stream();
#else  // without a header of CUDA: this file is also compiled against a torch that was built without it
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
#endif
}

void check(int error) {
  TORCH_CHECK(error == 0, "gralora_ext: a CUDA kernel could not be launched: ", cuda::error_text(error));
}

template <class Params>
void run_on_device(const Params& p, const at::Tensor& like) {
  const c10::DeviceGuard guard(like.device());
  const auto bytes = like.options().dtype(at::kByte).memory_format(at::MemoryFormat::Contiguous);
  const at::Tensor workspace = at::empty({cuda::workspace_bytes(p)}, bytes);
  check(cuda::pass(p, workspace.mutable_data_ptr(), current_stream(like.device())));
}
#endif

}  // namespace

void run(ForwardParams p, [[maybe_unused]] const at::Tensor& like) {
#ifdef GRALORA_HAVE_CUDA
  if (!like.is_cpu()) return run_on_device(p, like);
#endif
  p.threads = threads();
  if (p.shape.T > 0) cpu::forward(p);
}

void run(BackwardParams p, [[maybe_unused]] const at::Tensor& like) {
#ifdef GRALORA_HAVE_CUDA
  if (!like.is_cpu()) return run_on_device(p, like);
#endif
  p.threads = threads();
  cpu::backward(p);
}

void run(MergeParams p, [[maybe_unused]] const at::Tensor& like) {
#ifdef GRALORA_HAVE_CUDA
  if (!like.is_cpu()) {
    const c10::DeviceGuard guard(like.device());
    return check(cuda::merge(p, current_stream(like.device())));
  }
#endif
  p.threads = threads();
  cpu::merge(p);
}

void run(LinearParams p) {
  p.threads = threads();
  if (p.shape.T > 0) cpu::linear(p);
}

void run_merge_coded(CodedParams p) {
  p.threads = threads();
  cpu::merge_coded(p);
}

void run_unmerge_coded(CodedParams p) {
  p.threads = threads();
  cpu::unmerge_coded(p);
}

void run_checksums(CodedParams p) {
  p.threads = threads();
  cpu::checksums(p);
}

}  // namespace gralora
