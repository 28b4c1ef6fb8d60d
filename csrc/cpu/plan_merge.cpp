// SPDX-License-Identifier: Apache-2.0
// How the plans are made of the passes that compute dW: merge, merge with codes, and linear's one
// product with W + dW.
#include "plan_parts.h"

namespace gralora::cpu {

// ------------------------------------------------------------------ merge

MergePlan plan(const MergeParams& p, const Machine& machine) {
  constexpr int64_t kMostGroups = 48;  // groups of MR rows that share a panel
  const Shape& s = p.shape;
  const MicroKernel kernel(machine, p.accumulate_f64);
  MergePlan plan;
  plan.threads = threads_for(s.M * s.N * (s.r / s.k + s.h), kSerialWork, p.threads);
  plan.along_N = p.weight.column_stride != 1 && p.weight.row_stride == 1;
  // Memory bounds a merge of wide weights: prefetching them takes up to 30 % less on AMD's
  // processors, and 5 to 25 % more on Intel's (measured).
  plan.prefetches = machine.vendor == Vendor::Amd && p.weight.dtype == kernel.accumulated;
  const int64_t rows = plan.along_N ? s.N : s.M, columns = plan.along_N ? s.M : s.N;
  const int64_t H = rows / s.k, V = columns / s.k, ranks = s.r / s.k + s.h;
  plan.strip = round_up(std::min(V, std::max(panel_elements(machine) / ranks, 4 * kernel.NR)), kernel.NR);
  const int64_t share = ceil_div(rows, 4 * plan.threads);  // about four ranges for each thread
  plan.rows = std::min(kMostGroups * kernel.MR, std::max(kernel.MR, share));
  plan.rows = round_up(std::min(plan.rows, H), kernel.MR);
  const Param At = transposed(p.adapter.A), Ag = blocks_of_columns(p.adapter.A_general, s.N / s.k);
  const Param Bgt = transposed(blocks_of_rows(p.adapter.B_general, s.M / s.k));
  const Product product = plain(p.accumulate_f64);
  const auto left = [&](const Param& param) { return packing(param, ranks, kernel.W, 0, product, kernel); };
  const auto right = [&](const Param& param) { return packing(param, ranks, V, plan.rows, product, kernel); };
  plan.left = left(plan.along_N ? At : p.adapter.B), plan.right = right(plan.along_N ? p.adapter.B : At);
  plan.left_general = left(plan.along_N ? Ag : Bgt), plan.right_general = right(plan.along_N ? Bgt : Ag);
  return plan;
}

// ------------------------------------------------------------------ merge with codes

CodedPlan plan(const CodedParams& p, const Machine& machine) {
  // The sums of a tile, 384 KiB for an adapter, stay in L2 until the row by row work. Columns are
  // a multiple of the words of a checksum and of a micro-panel.
  constexpr int64_t kGroups = 8, kColumns = 1024;
  const MicroKernel kernel(machine, p.weight.dtype == DType::f64);
  CodedPlan plan;
  int64_t ranks = 1;
  for (int64_t i = 0; i < p.count; i++) ranks += p.adapters[i].shape.r / p.adapters[i].shape.k + p.adapters[i].shape.h;
  plan.threads = threads_for(p.M * p.N * ranks, kSerialWork, p.threads);
  plan.along_N = p.weight.column_stride != 1 && p.weight.row_stride == 1;
  plan.rows = kGroups * kernel.MR, plan.columns = kColumns;
  return plan;
}

MergePlan plan_in_tile(const CodedParams& p, const MergedAdapter& adapter, const CodedPlan& tile,
                       const Machine& machine) {
  MergeParams merge;
  merge.shape = adapter.shape, merge.adapter = adapter.adapter, merge.weight = p.weight;
  merge.accumulate_f64 = p.weight.dtype == DType::f64, merge.threads = p.threads;
  const MicroKernel kernel(machine, merge.accumulate_f64);
  MergePlan plan = cpu::plan(merge, machine);
  plan.rows = tile.rows, plan.strip = tile.columns, plan.prefetches = false;
  // A tile may begin and end within a block. In place, whole vectors are read there, which must be
  // within the rows of the parameter.
  const int64_t V = (tile.along_N ? p.M : p.N) / adapter.shape.k;
  if (V % kernel.NR != 0) {
    plan.right = Packing::Packed;
    if (adapter.shape.h > 0) plan.right_general = Packing::Packed;
  }
  return plan;
}

// ------------------------------------------------------------------ one product with W + dW

LinearPlan plan(const LinearParams& p, const Machine& machine) {
  // A strip is so many micro-panels wide, tried in this order. Computing a panel takes as long as
  // multiplying kPanelTokens tokens by it. There are at most kMostSegments segments, each of at
  // least kGroups groups of rows.
  constexpr int64_t kMicroPanels[] = {3, 4, 2}, kPanelTokens = 16, kGroups = 8, kMostSegments = 8;
  const int64_t T = p.shape.T, rows = p.transposed ? p.shape.M : p.shape.N;
  const int64_t columns = p.transposed ? p.shape.N : p.shape.M;
  const MicroKernel kernel(machine, p.accumulate_f64);
  LinearPlan plan;
  plan.threads = threads_for(T * rows * columns, kSerialWork, p.threads);
  plan.in = reading(p.in, false, 0, plain(p.accumulate_f64), kernel);
  plan.chunks = chunks(rows, 1, kernel);
  const Param Ag = blocks_of_columns(p.adapter.A_general, p.shape.N / p.shape.k);
  const Param Bgt = transposed(blocks_of_rows(p.adapter.B_general, p.shape.M / p.shape.k));
  const auto left = [&](const Param& param) { return packing(param, 0, kernel.W, 0, plain(p.accumulate_f64), kernel); };
  plan.left = left(p.transposed ? p.adapter.B : transposed(p.adapter.A));
  plan.left_general = left(p.transposed ? Bgt : Ag);
  plan.tokens_together = kGroups * kernel.MR;
  // Of all cuts, the one that takes the least time when each thread takes an equal number of
  // items. The time is counted in columns times tokens.
  int64_t least = INT64_MAX;
  for (const int64_t micro_panels : kMicroPanels) {
    const int64_t strip = micro_panels * kernel.NR, strips = ceil_div(columns, strip);
    for (int64_t n = 1; n == 1 || (n <= kMostSegments && T / n >= kGroups * kernel.MR); n++) {
      const int64_t tokens = std::max(kernel.MR, round_up(ceil_div(T, n), kernel.MR));
      const int64_t items = strips * ceil_div(T, tokens);
      const int64_t time = ceil_div(items, plan.threads) * strip * (tokens + kPanelTokens);
      if (time < least) least = time, plan.strip = strip, plan.segment = tokens;
    }
  }
  // Panels of nearly equal length, each of which fits into L2.
  const int64_t most = std::max<int64_t>(1, panel_elements(machine) / (plan.strip * plan.chunks.columns));
  plan.chunks_per_panel = ceil_div(plan.chunks.per_block, ceil_div(plan.chunks.per_block, most));
  return plan;
}

// With fewer tokens, making W + dW takes longer than the one product saves.
int64_t tokens_for_one_operation() { return 64; }

// On AMD's processors MKL, which makes torch's product, does not go beyond AVX2: linear has been
// up to twice as fast with AVX-512, and 1.1 times as fast with AVX2. On a Xeon it took 1.0 to 1.1
// of the time of torch's product and the adapter's forward.
bool one_product_is_quicker(const Machine& machine) {
  return machine.vendor == Vendor::Amd && machine.capability != Capability::Default;
}

}  // namespace gralora::cpu
