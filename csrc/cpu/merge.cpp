// SPDX-License-Identifier: Apache-2.0
// merge: W (+)= dW. W is read and written once, along its rows.
#include "merge_blocks.h"

namespace gralora::cpu::GRALORA_ISA {
namespace {

template <class Acc, class Y>
void merge_whole(const Merge<Acc>& m) {
  const int64_t height = m.plan.rows, ranges = ceil_div(m.H, height);
  Scratch scratch;
  const PerThread<Acc> buffers(scratch, m.plan.threads, m.buffers_size());
  parallel_items(m.k * ranges, m.plan.threads, [&](int64_t item, int thread) {
    const int64_t a = item / ranges, first = item % ranges * height, count = smaller(height, m.H - first);
    Y* row = static_cast<Y*>(m.W.data) + (a * m.H + first) * m.W.row_stride;
    for (int64_t b = 0; b < m.k; b++)
      m.merge_block(a, b, first, count, 0, m.V, row + b * m.V * m.W.column_stride, m.buffers(buffers.of(thread)));
  });
}

template <class Acc>
void run(const MergeParams& p, const MergePlan& plan) {
  const Merge<Acc> merge = merge_of<Acc>(p.shape, p.adapter, p.scaling, plan, p.weight, p.accumulate);
  for_dtype<Acc>(p.weight.dtype, [&](auto* type) { merge_whole<Acc, std::remove_pointer_t<decltype(type)>>(merge); });
}

}  // namespace

void merge(const MergeParams& p, const MergePlan& plan) {
  if constexpr (kHasFloat64) {
    if (p.accumulate_f64) return run<double>(p, plan);
  }
  run<float>(p, plan);
}

}  // namespace gralora::cpu::GRALORA_ISA
