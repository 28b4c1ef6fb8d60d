// SPDX-License-Identifier: Apache-2.0
// merge: W (+)= dW. W is read and written once, along its rows.
#include "merge_blocks.h"

namespace gralora::cpu::GRALORA_ISA {
namespace {

template <class Acc, class Y>
void merge_whole(const Merge<Acc>& m, const IntoWeights<Acc, Y>& weights) {
  const int64_t height = m.plan.rows, ranges = ceil_div(m.H, height);
  Scratch scratch;
  const PerThread<Acc> buffers(scratch, m.plan.threads, m.buffers_size());
  parallel_items(m.k * ranges, m.plan.threads, [&](int64_t item, int thread) {
    const int64_t a = item / ranges, first = item % ranges * height, count = smaller(height, m.H - first);
    for (int64_t b = 0; b < m.k; b++)
      m.merge_block(a, b, first, count, 0, m.V, weights.at(a * m.H + first, b * m.V), m.buffers(buffers.of(thread)));
  });
}

template <class Acc>
void run(const MergeParams& p, const MergePlan& plan) {
  const Merge<Acc> merge = merge_of<Acc>(p.shape, p.adapter, p.scaling, plan);
  const Param W = plan.along_N ? transposed(p.weight) : p.weight;
  for_dtype<Acc>(W.dtype, [&](auto* type) {
    using Y = std::remove_pointer_t<decltype(type)>;
    const IntoWeights<Acc, Y> weights{static_cast<Y*>(W.data), W.row_stride, W.column_stride, p.accumulate,
                                      plan.prefetches};
    merge_whole(merge, weights);
  });
}

}  // namespace

void merge(const MergeParams& p, const MergePlan& plan) {
  if constexpr (kHasFloat64) {
    if (p.accumulate_f64) return run<double>(p, plan);
  }
  run<float>(p, plan);
}

}  // namespace gralora::cpu::GRALORA_ISA
