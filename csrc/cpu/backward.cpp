// SPDX-License-Identifier: Apache-2.0
// backward, with g = dL/dy:
//   dU_j = s g_j B_j^T and s g Bg, stored as dH           (project)
//   dx = (dH A^T + s g Bg Ag) * dropout factor            (expand)
//   dB_j = s U_j^T g_j, dBg^T = s (x' Ag^T)^T g           (weight_gradient)
//   dA_n = x'_n^T dH_n, dAg = (s g Bg)^T x'               (weight_gradient)
//
// g is read once for dH and dB; then x is read once for dA, while dx is written. Tokens are cut
// into segments, in a way that does not depend on the number of threads, and worked on in waves of
// segments. Every sum has a fixed order: over tokens within a slice (in registers), then over the
// slices of a segment, then over segments; over columns within a chunk, then over chunks. So
// results do not depend on the number of threads.
#include "backward_few.h"
#include "backward_passes.h"
#include "latent_sums.h"
#include "products.h"

namespace gralora::cpu::GRALORA_ISA {
namespace {

template <class Product>
struct Backward {
  using Acc = typename Product::Acc;
  using Latent = typename Product::Latent;

  const BackwardParams& p;
  const BackwardPlan& plan;
  const Shape& s = p.shape;
  BackwardPasses<Product> passes{p, plan};
  const int64_t row = passes.row, sums_row = passes.from_g.sums_row(), wave_tokens = plan.wave * plan.segment;

  // U is read where forward saved it, or it is made again or converted in scratch.
  const bool converts_U = !plan.remakes_U && passes.dB.wanted() && p.u_bf16 != (sizeof(Latent) == sizeof(bf16));
  Scratch scratch{};
  const PerThread<Acc> buffers{scratch, plan.threads, passes.buffers_size};
  Latent* dH = passes.want_H ? scratch.take<Latent>(wave_tokens * row) : nullptr;
  Latent* U = plan.remakes_U || converts_U ? scratch.take<Latent>(wave_tokens * row) : nullptr;
  LatentSums<Product> sums{plan, wave_tokens, larger(plan.chunks_of_g.count, plan.chunks_of_x.count), sums_row,
                           scratch};

  void run() {
    if (plan.segments != 1) passes.dB.reserve(scratch, plan.wave), passes.dA.reserve(scratch, plan.wave);
    int64_t first = 0;
    do {  // once even where there are no tokens, since the gradients must become zeros then
      const int64_t count = smaller(plan.wave, plan.segments - first);
      if (plan.schedule == Schedule::ByTokens)
        run_by_tokens(first, count);
      else
        run_by_columns(first, count);
      if (plan.segments != 1) finish(first, count);
      first += plan.wave;
    } while (first < plan.segments);
  }

  Segment<Latent> segment(int64_t wave_first, int64_t index) const {
    const int64_t in_wave = index * plan.segment, t0 = wave_first * plan.segment + in_wave;
    const Latent* saved = static_cast<const Latent*>(p.u);
    const Latent* segment_U = U != nullptr ? U_of(index) : saved == nullptr ? nullptr : saved + t0 * row;
    return {wave_first == 0,
            index,
            t0,
            smaller(plan.segment, s.T - t0),
            segment_U,
            dH == nullptr ? nullptr : dH + in_wave * row};
  }

  // The scratch for U of a segment of the wave
  Latent* U_of(int64_t index) const { return U + index * plan.segment * row; }

  // Each thread takes a segment through the whole pass.
  void run_by_tokens(int64_t wave_first, int64_t count) const {
    parallel_items(count, plan.threads, [&](int64_t index, int thread) {
      const Segment<Latent> g = segment(wave_first, index);
      const auto all_g = sums.all(plan.chunks_of_g, thread), all_x = sums.all(plan.chunks_of_x, thread);
      if (plan.remakes_U) passes.from_x.run_chunks(all_x, g.t0, g.tokens, U_of(index), buffers.of(thread));
      if (converts_U) convert_U(g.t0, g.tokens, U_of(index));
      passes.pass_g(g, all_g, passes.buffers_at(buffers.of(thread)));
      if (passes.want_H) passes.pass_x(g, all_x, passes.buffers_at(buffers.of(thread)));
    });
  }

  // The threads share the blocks of all segments of a wave, or their single chunks.
  void run_by_columns(int64_t wave_first, int64_t count) const {
    const int64_t t0 = wave_first * plan.segment, tokens = smaller(count * plan.segment, s.T - t0);
    if (plan.remakes_U) {
      sums.share(plan.chunks_of_x, count, [&](int64_t index, const auto& range, int thread) {
        const Segment<Latent> g = segment(wave_first, index);
        passes.from_x.run_chunks(range, g.t0, g.tokens, U_of(index), buffers.of(thread));
      });
      sums.reduce(passes.from_x, tokens, U, buffers);
    }
    if (converts_U) parallel_items(tokens, plan.threads, [&](int64_t m, int) { convert_U(t0 + m, 1, U + m * row); });
    sums.share(plan.chunks_of_g, count, [&](int64_t index, const auto& range, int thread) {
      passes.pass_g(segment(wave_first, index), range, passes.buffers_at(buffers.of(thread)));
    });
    if (!passes.want_H) return;
    sums.reduce(passes.from_g, tokens, dH, buffers);
    sums.share(plan.chunks_of_x, count, [&](int64_t index, const auto& range, int thread) {
      passes.pass_x(segment(wave_first, index), range, passes.buffers_at(buffers.of(thread)));
    });
  }

  void convert_U(int64_t t0, int64_t tokens, Latent* to) const {
    if constexpr (sizeof(Latent) > sizeof(bf16))
      convert_row<Acc>(static_cast<const bf16*>(p.u) + t0 * row, 1, tokens * row, to);
  }

  // Adds the weight gradients of the segments of a wave, and writes them after the last wave.
  void finish(int64_t wave_first, int64_t count) const {
    const Totals<Acc>&dA = passes.dA, &dB = passes.dB;
    const int64_t of_B = dB.wanted() ? dB.chunks.count : 0, of_A = dA.wanted() ? dA.chunks.count : 0;
    parallel_items(of_B + of_A, plan.threads, [&](int64_t item, int) {
      const bool first = wave_first == 0, last = wave_first + count >= plan.segments;
      if (item < of_B)
        dB.finish(first, last, count, item);
      else
        dA.finish(first, last, count, item - of_B);
    });
  }
};

}  // namespace

void backward(const BackwardParams& p, const BackwardPlan& plan) { run_pass<Backward, BackwardFew>(p, plan); }

}  // namespace gralora::cpu::GRALORA_ISA
