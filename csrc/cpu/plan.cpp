// SPDX-License-Identifier: Apache-2.0
// How the plans are made, and every threshold with its reason. Where a comment says "measured",
// the figures are in benchmarks/results/NOTES.md.
#include "plan.h"

#include <algorithm>

namespace gralora::cpu {
namespace {

// ------------------------------------------------------------------ thresholds

// Below so many multiply-adds, waking the other threads takes longer than they save. Forward needs
// more work than backward and merge before threads pay: those two also write as many numbers as
// the parameters have.
constexpr int64_t kSerialWork = 1 << 18, kSerialForward = 1 << 21;
// Reading one number of a parameter takes as long as so many multiply-adds.
constexpr int64_t kReadingWork = 4;

// A panel in float takes at most half of L2, since activations share it, and at most so many
// bytes.
constexpr int64_t kMostPanelBytes = 1 << 19;
int64_t panel_elements(const Machine& machine) {
  return (machine.l2.bytes > 0 ? std::min(kMostPanelBytes, machine.l2.bytes / 2) : kMostPanelBytes) / 4;
}
// MC: tokens that share packed parameters. Their latents stay in L2 from project (x to U) to
// expand (U to y).
constexpr int64_t kMostTokens = 512;
// From so many groups of MR tokens on, packing a block of a parameter pays. Fewer tokens read it
// in place, if its layout and dtype allow that.
constexpr int64_t kGroupsWorthPacking = 3;

// A product of pairs rounds U to bfloat16. With fewer tokens than this, reading the parameters
// takes most of the time, pairs would gain little, and U is left exact.
constexpr int64_t kTokensToRound = 5;
// From so many tokens on, splitting the parameters into bfloat16 pieces pays.
constexpr int64_t kTokensToSplit = 128;

// Forward goes by columns where there are fewer tokens than this for each thread. By tokens, each
// thread would pack all of A and B for its own tokens only. With small ranks the packing is cheap,
// so that fewer tokens suffice. Pairs with whole blocks need more tokens before going by tokens
// pays: by columns, no sums of different threads are then left to add.
int64_t tokens_for_a_thread(const Shape& s, bool of_pairs, bool whole_blocks) {
  if (s.r + s.h < 64) return 64;
  return of_pairs && whole_blocks ? 128 : 80;
}

// Backward takes all tokens as one segment, whose columns the threads share, where the tokens are
// few, or few compared with the size of the parameters. Otherwise each thread would pack all
// parameters, and sum all of their gradients, for a few tokens of its own (measured).
bool is_one_segment(const Shape& s) {
  if (s.T < 192) return true;
  return s.T <= kMostTokens && s.h == 0 && s.k % 2 == 0 && s.r * (s.N + s.M) >= 128 * s.T * s.k;
}

// The scratch that a wave of backward may take, for all threads together, beside the totals of the
// weight gradients.
constexpr int64_t kWaveBytes = 64 << 20;

// A strip for few tokens: columns of y whose sums stay in L1.
constexpr int64_t kFewTokensStrip = 1024;

// ------------------------------------------------------------------ the micro-kernel

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// W, MR and NR of microkernel.h, in elements of the accumulation type.
struct MicroKernel {
  DType accumulated;
  int64_t W, MR, NR;

  MicroKernel(const Machine& machine, bool f64)
      : accumulated(f64 ? DType::f64 : DType::f32),
        W((f64 ? 16 : machine.vector_bytes()) / (f64 ? 8 : 4)),
        MR(!f64 && machine.capability == Capability::Avx512 ? 12 : 6),
        NR(2 * W) {}
};

int64_t rows_of(Product product, const MicroKernel& kernel) {
  return product == Product::Bf16Amx || product == Product::SplitAmx ? 32 : kernel.MR;
}

Product plain(bool f64) { return f64 ? Product::Float64 : Product::Float32; }

// A chunk begins at a multiple of NR, so that micro-panels stay whole, and at a multiple of 8
// columns, so that it begins with a whole byte of the dropout mask.
Chunks chunks(int64_t width, int64_t k, const MicroKernel& kernel) {
  Chunks cut;
  cut.block_width = width / k;
  const int64_t wanted = std::max<int64_t>(1, ceil_div(cut.block_width, kMostColumns));
  cut.columns = round_up(ceil_div(cut.block_width, wanted), std::max<int64_t>(kernel.NR, 8));
  cut.per_block = ceil_div(cut.block_width, cut.columns);
  cut.count = k * cut.per_block;
  return cut;
}

int threads_for(int64_t multiply_adds, int64_t serial, int threads) { return multiply_adds < serial ? 1 : threads; }

// ------------------------------------------------------------------ operands

bool even(int64_t n) { return n % 2 == 0; }
bool in_rows(const Param& param) { return param.column_stride == 1; }
bool evenly_spaced(const Activation& x) { return x.column_stride == 1 && x.leading_dims <= 1; }
bool aligned_to_pairs(const void* data) { return reinterpret_cast<uintptr_t>(data) % 4 == 0; }

// Whether pairs of columns of x can be read in place.
bool has_pairs(const Activation& x) {
  return x.dtype == DType::bf16 && evenly_spaced(x) && aligned_to_pairs(x.data) &&
         (x.leading_dims == 0 || even(x.strides[0]));
}
// Whether the `rows` rows of each block of a parameter can be packed as pairs.
bool has_pairs(const Param& param, int64_t rows) {
  return param.dtype == DType::bf16 && even(rows) &&
         (param.column_stride == 1 || (param.row_stride == 1 && even(param.column_stride) && even(param.block_stride) &&
                                       aligned_to_pairs(param.data)));
}

// The product of a pass. `activations`: all of them can be read as pairs; `widths`: the widths of
// their blocks are even; `parameters`: all of them can be packed as pairs.
template <class Params>
Product product_of(const Params& p, bool activations, bool widths, bool parameters, const Machine& machine) {
  if (p.accumulate_f64 || !activations) return plain(p.accumulate_f64);
  if (machine.amx && widths && p.shape.T >= (p.u_bf16 ? kTokensToRound : kTokensToSplit))
    return p.u_bf16 ? Product::Bf16Amx : Product::SplitAmx;
  // Intel's processors take four times as long for a step with pairs as for one with floats.
  const bool quicker = machine.bf16_instructions && machine.vendor != Vendor::Intel;
  return quicker && p.u_bf16 && parameters && p.shape.T >= kTokensToRound ? Product::Bf16Pairs : Product::Float32;
}

// gradient_width: the width of a block of x or g whose rows are also the right factor of a weight
// gradient, which reads them in whole vectors; 0 where they are not.
Reading reading(const Activation& x, bool dropped, int64_t gradient_width, Product product, const MicroKernel& kernel) {
  if (dropped) return Reading::Dropped;
  // product_of() asked has_pairs()
  if (product != plain(kernel.accumulated == DType::f64)) return Reading::InPlace;
  const bool usable = x.dtype == kernel.accumulated && evenly_spaced(x) && gradient_width % kernel.W == 0;
  return usable ? Reading::InPlace : Reading::Copied;
}

// How blocks of `rows` rows are read. columns: those of a block, or, where a block is cut into
// several panels, of a panel; tokens: how many are multiplied by the packed block, 0 where it is
// packed only if it must be.
Packing packing(const Param& param, int64_t rows, int64_t columns, int64_t tokens, Product product,
                const MicroKernel& kernel) {
  if (param.data == nullptr) return Packing::Absent;
  if (product == Product::Bf16Pairs) return Packing::Paired;
  if (product == Product::Bf16Amx || product == Product::SplitAmx)
    return has_pairs(param, rows) ? Packing::Paired : Packing::Split;
  const bool usable = param.dtype == kernel.accumulated && in_rows(param) && columns % kernel.W == 0;
  const bool is_micro_panel = columns <= kernel.NR && param.row_stride == columns;
  const bool few = tokens < kGroupsWorthPacking * kernel.MR;
  return usable && (few || is_micro_panel) ? Packing::InPlace : Packing::Packed;
}

// ------------------------------------------------------------------ forward

struct ForwardOperands {
  Param A, B, Ag, Bg;  // the right factors: [k, w, r], [k, r, w], [k, w, h], [k, h, w]
};
ForwardOperands operands(const ForwardParams& p) {
  const Shape& s = p.shape;
  return {p.adapter.A, p.adapter.B, blocks_of_rows(transposed(p.adapter.A_general), s.N / s.k),
          transposed(blocks_of_rows(p.adapter.B_general, s.M / s.k))};
}

bool takes_few_tokens(const ForwardParams& p) {
  return p.shape.T > 0 && p.shape.T <= kFewTokens && p.shape.h == 0 && in_rows(p.adapter.A) && in_rows(p.adapter.B) &&
         p.base.column_stride == 1 && p.y.column_stride == 1;
}

Product product_of(const ForwardParams& p, const ForwardOperands& o, const Machine& machine) {
  const Shape& s = p.shape;
  const int64_t w = s.N / s.k;
  const bool general = s.h == 0 || (has_pairs(o.Ag, w) && has_pairs(o.Bg, s.h));
  return product_of(p, p.y.dtype == DType::bf16 && has_pairs(p.x), even(w),
                    has_pairs(o.A, w) && has_pairs(o.B, s.r) && general, machine);
}

// A strip is as wide as the panel of B that fits into L2. Several narrow blocks share that place.
void cut_y(ForwardPlan& plan, const Shape& s, const MicroKernel& kernel, int64_t panel) {
  const int64_t w = s.M / s.k, ranks = s.r + s.h;
  plan.strip = round_up(std::min(std::max(panel / ranks, 4 * kernel.NR), w), kernel.NR);
  if (plan.schedule == Schedule::ByColumns) {  // about four strips for each thread
    const int64_t share = round_up(ceil_div(s.M, 4 * plan.threads), kernel.NR);
    plan.strip = std::min(plan.strip, std::max(kernel.NR, share));
  } else if (plan.strip >= w) {
    plan.blocks_per_strip = std::min({kMostBlocks, s.k, std::max<int64_t>(1, panel / (ranks * plan.strip))});
  }
}

}  // namespace

ForwardPlan plan(const ForwardParams& p, const Machine& machine) {
  const Shape& s = p.shape;
  const MicroKernel kernel(machine, p.accumulate_f64);
  const ForwardOperands o = operands(p);
  const bool dropped = p.dropout.p > 0.0;
  ForwardPlan plan;
  plan.threads = threads_for((s.T + kReadingWork) * (s.r + s.h) * (s.N + s.M), kSerialForward, p.threads);
  plan.chunks = chunks(s.N, s.k, kernel);
  if (takes_few_tokens(p)) {
    plan.product = plain(p.accumulate_f64);
    plan.x = reading(p.x, dropped, 0, plan.product, kernel);
    const int64_t share = plan.threads == 1 ? kFewTokensStrip : ceil_div(s.M, 4 * plan.threads);
    plan.strip = std::min(kFewTokensStrip, round_up(std::min(share, s.M / s.k), kernel.NR));
    return plan;
  }
  plan.product = product_of(p, o, machine);
  plan.x = reading(p.x, dropped, 0, plan.product, kernel);
  const int64_t rows = rows_of(plan.product, kernel);
  const bool whole_blocks = s.h == 0 && shared_evenly(s.k, plan.threads);
  const int64_t enough = tokens_for_a_thread(s, plan.product != plain(p.accumulate_f64), whole_blocks);
  if (plan.threads == 1 || s.T >= enough * plan.threads) {
    plan.schedule = Schedule::ByTokens;
    const int64_t T = std::max<int64_t>(s.T, 1), segments = round_up(ceil_div(T, kMostTokens), plan.threads);
    plan.segment = round_up(ceil_div(T, segments), rows);
  } else {
    plan.schedule = Schedule::ByColumns;
    plan.segment = std::min(s.T, kMostTokens);
    plan.whole_blocks = whole_blocks;
  }
  cut_y(plan, s, kernel, panel_elements(machine));
  plan.A = packing(o.A, s.N / s.k, s.r, plan.segment, plan.product, kernel);
  plan.A_general = packing(o.Ag, s.N / s.k, s.h, plan.segment, plan.product, kernel);
  plan.B = packing(o.B, s.r, s.M / s.k, plan.segment, plan.product, kernel);
  plan.B_general = packing(o.Bg, s.h, s.M / s.k, plan.segment, plan.product, kernel);
  return plan;
}

// ------------------------------------------------------------------ backward

namespace {

struct BackwardOperands {
  Param A, B, Ag, Bg;       // for dx and dH: [k, r, w], [k, w, r], [k, h, w], [k, w, h]
  Param A_for_U, Ag_for_U;  // [k, w, r], [k, w, h]
};
BackwardOperands operands(const BackwardParams& p) {
  const Shape& s = p.shape;
  const Adapter& a = p.adapter;
  return {transposed(a.A),
          transposed(a.B),
          blocks_of_columns(a.A_general, s.N / s.k),
          blocks_of_rows(a.B_general, s.M / s.k),
          a.A,
          blocks_of_rows(transposed(a.A_general), s.N / s.k)};
}

bool takes_few_tokens(const BackwardParams& p, bool remakes_U) {
  const auto rows = [](const Param& parameter, const Param& gradient) {
    return in_rows(parameter) && (gradient.data == nullptr || (in_rows(gradient) && gradient.dtype == parameter.dtype));
  };
  return p.shape.T > 0 && p.shape.T <= kFewTokens && p.shape.h == 0 && !remakes_U && !p.add_to_grad_x &&
         p.grad_x.column_stride == 1 && rows(p.adapter.A, p.grad.A) && rows(p.adapter.B, p.grad.B);
}

Product product_of(const BackwardParams& p, const BackwardOperands& o, const Machine& machine) {
  const Shape& s = p.shape;
  const int64_t w_in = s.N / s.k, w_out = s.M / s.k;
  const bool general = s.h == 0 || (has_pairs(o.Ag, s.h) && has_pairs(o.Ag_for_U, w_in) && has_pairs(o.Bg, w_out));
  const bool block = has_pairs(o.A, s.r) && has_pairs(o.A_for_U, w_in) && has_pairs(o.B, w_out);
  return product_of(p, has_pairs(p.x) && has_pairs(p.grad_y), even(w_in) && even(w_out), block && general, machine);
}

// The segments do not depend on the number of threads; otherwise the gradients would. By tokens, a
// wave gives each thread one segment. By columns, a wave has enough segments for each thread to
// get about four chunks, as far as kWaveBytes allows.
void cut_tokens(BackwardPlan& plan, const BackwardParams& p, int64_t rows, int64_t W) {
  const Shape& s = p.shape;
  const int64_t wanted = is_one_segment(s) ? 1 : round_up(ceil_div(s.T, kMostTokens), 2);
  plan.segment = std::max(round_up(ceil_div(s.T, wanted), rows), rows);
  plan.segments = ceil_div(s.T, plan.segment);

  // Bytes of one segment. The sums of a chunk have a place of kMostColumns, however narrow it is.
  const int64_t element = p.accumulate_f64 ? 8 : 4, row = s.k * s.r + s.h;
  const int64_t columns = (plan.chunks_of_g.count + plan.chunks_of_x.count) * kMostColumns;
  const int64_t gradients = (s.r + s.h) * columns * element, latents = 2 * plan.segment * row * element;
  const int64_t sums = plan.segment * (round_up(s.r, W) + round_up(s.h, W)) * element;
  const int64_t by_tokens = std::max<int64_t>(1, kWaveBytes / (gradients + latents + sums));
  if (plan.threads <= by_tokens && plan.segments >= plan.threads && shared_evenly(plan.segments, plan.threads)) {
    plan.schedule = Schedule::ByTokens;
    plan.wave = plan.threads;
    return;
  }
  const int64_t most = std::max(plan.chunks_of_g.count, plan.chunks_of_x.count);
  const int64_t least = std::min(plan.chunks_of_g.count, plan.chunks_of_x.count);
  const int64_t by_columns = std::max<int64_t>(1, kWaveBytes / (gradients + latents + most * sums));
  plan.schedule = plan.segments == 0 ? Schedule::ByTokens : Schedule::ByColumns;
  plan.wave = std::max<int64_t>(1, std::min({plan.segments, by_columns, ceil_div(4 * plan.threads, least)}));
  plan.whole_blocks = s.h == 0 && shared_evenly(plan.wave * s.k, plan.threads);
}

}  // namespace

BackwardPlan plan(const BackwardParams& p, const Machine& machine) {
  const Shape& s = p.shape;
  const MicroKernel kernel(machine, p.accumulate_f64);
  const BackwardOperands o = operands(p);
  const int64_t w_in = s.N / s.k, w_out = s.M / s.k;
  const bool want_A = p.grad.A.data != nullptr || p.grad.A_general.data != nullptr;
  const bool want_B = p.grad.B.data != nullptr || p.grad.B_general.data != nullptr;
  const bool dropped = p.dropout.p > 0.0, remakes_U = want_B && p.u == nullptr, few = takes_few_tokens(p, remakes_U);
  BackwardPlan plan;
  plan.threads = threads_for(2 * s.T * (s.r + s.h) * (s.N + s.M), kSerialWork, p.threads);
  plan.remakes_U = remakes_U;
  plan.chunks_of_g = chunks(s.M, s.k, kernel), plan.chunks_of_x = chunks(s.N, s.k, kernel);
  plan.product = few ? plain(p.accumulate_f64) : product_of(p, o, machine);
  plan.g = reading(p.grad_y, false, want_B ? w_out : 0, plan.product, kernel);
  plan.x = reading(p.x, dropped, want_A ? w_in : 0, plan.product, kernel);
  if (!few) cut_tokens(plan, p, rows_of(plan.product, kernel), kernel.W);
  const int64_t tokens = few ? s.T : plan.segment;
  plan.A = packing(o.A, s.r, w_in, tokens, plan.product, kernel);
  plan.A_general = packing(o.Ag, s.h, w_in, tokens, plan.product, kernel);
  plan.B = packing(o.B, w_out, s.r, tokens, plan.product, kernel);
  plan.B_general = packing(o.Bg, w_out, s.h, tokens, plan.product, kernel);
  if (plan.remakes_U) {
    plan.A_for_U = packing(o.A_for_U, w_in, s.r, tokens, plan.product, kernel);
    plan.A_general_for_U = packing(o.Ag_for_U, w_in, s.h, tokens, plan.product, kernel);
  }
  return plan;
}

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
