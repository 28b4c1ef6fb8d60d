// SPDX-License-Identifier: Apache-2.0
// How the plans of forward and backward are made.
#include "plan_parts.h"

namespace gralora::cpu {
namespace {

// ------------------------------------------------------------------ thresholds

// Forward needs more work than backward and merge before threads pay: those two also write as many
// numbers as the parameters have.
constexpr int64_t kSerialForward = 1 << 21;
// Reading one number of a parameter takes as long as so many multiply-adds.
constexpr int64_t kReadingWork = 4;

// MC: tokens that share packed parameters. Their latents stay in L2 from project (x to U) to
// expand (U to y).
constexpr int64_t kMostTokens = 512;
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

// ------------------------------------------------------------------ products

int64_t rows_of(Product product, const MicroKernel& kernel) {
  return product == Product::Bf16Amx || product == Product::SplitAmx ? 32 : kernel.MR;
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

}  // namespace gralora::cpu
