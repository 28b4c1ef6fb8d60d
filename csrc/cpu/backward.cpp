// SPDX-License-Identifier: Apache-2.0
// backward, with g = dL/dy:
//   dU_j = s g_j B_j^T and s g Bg, stored as dH (project);   dx = (dH A^T + s g Bg Ag) * dropout factor (expand)
//   dB_j = s U_j^T g_j, dBg^T = s (x' Ag^T)^T g;   dA_n = x'_n^T dH_n, dAg = (s g Bg)^T x'   (weight_gradient)
//
// g is read once for dH and dB, then x once for dA while dx is written. Tokens are cut into
// segments, which do not depend on the number of threads; a wave of them is worked on at a time.
// Every sum has a fixed order: a block of tokens in registers, the blocks of a segment, segments;
// columns within a chunk, chunks. So results do not depend on the number of threads.
#include "backward_few.h"
#include "backward_passes.h"
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

  // U is read where forward left it, or from scratch: made again, or converted.
  const bool converts_U = !plan.remakes_U && passes.dB.wanted() && p.u_bf16 != (sizeof(Latent) == sizeof(bf16));
  Scratch scratch{};
  const PerThread<Acc> buffers{scratch, plan.threads, passes.buffers_size};
  Latent* dH = passes.want_H ? scratch.take<Latent>(wave_tokens * row) : nullptr;
  Latent* U = plan.remakes_U || converts_U ? scratch.take<Latent>(wave_tokens * row) : nullptr;
  // Sums of latents: for each thread that takes whole segments or blocks, or for each chunk
  const int64_t places = plan.schedule == Schedule::ByTokens || plan.whole_blocks
                             ? plan.threads
                             : larger(plan.chunks_of_g.count, plan.chunks_of_x.count);
  const int64_t place_tokens = plan.schedule == Schedule::ByTokens || plan.whole_blocks ? plan.segment : wave_tokens;
  Acc* partial = scratch.take<Acc>(places * place_tokens * sums_row);

  void run() {
    if (plan.segments != 1) passes.dB.reserve(scratch, plan.wave), passes.dA.reserve(scratch, plan.wave);
    int64_t first = 0;
    do {  // once also where there are no tokens: the gradients are zeros then
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
    const Latent* kept = static_cast<const Latent*>(p.u);
    const Latent* own_U = U != nullptr ? U + in_wave * row : kept == nullptr ? nullptr : kept + t0 * row;
    return {wave_first == 0,
            index,
            t0,
            smaller(plan.segment, s.T - t0),
            own_U,
            dH == nullptr ? nullptr : dH + in_wave * row};
  }

  // Each thread takes segments through everything.
  void run_by_tokens(int64_t wave_first, int64_t count) const {
    parallel_items(count, plan.threads, [&](int64_t index, int thread) {
      const Segment<Latent> g = segment(wave_first, index);
      const auto b = passes.buffers_at(buffers.of(thread));
      Acc* sums = partial + thread * place_tokens * sums_row;
      const ChunkRange<Acc> all_g{0, plan.chunks_of_g.count, sums, true};
      const ChunkRange<Acc> all_x{0, plan.chunks_of_x.count, sums, true};
      if (plan.remakes_U) passes.pass_U(g, all_x, U + index * plan.segment * row, b);
      if (converts_U) convert_U(g.t0, g.tokens, U + index * plan.segment * row);
      passes.pass_g(g, all_g, b);
      if (passes.want_H) passes.pass_x(g, all_x, b);
    });
  }

  // Threads share the blocks of all segments, whose latents are done then, or single chunks, whose
  // sums are added when all are there.
  void run_by_columns(int64_t wave_first, int64_t count) const {
    const int64_t t0 = wave_first * plan.segment, tokens = smaller(count * plan.segment, s.T - t0);
    if (plan.remakes_U) {
      share_chunks(plan.chunks_of_x, wave_first, count, [&](const auto& g, const auto& range, const auto& b) {
        passes.pass_U(g, range, U + g.index * plan.segment * row, b);
      });
      reduce(passes.from_x, tokens, U);
    }
    if (converts_U) parallel_items(tokens, plan.threads, [&](int64_t m, int) { convert_U(t0 + m, 1, U + m * row); });
    share_chunks(plan.chunks_of_g, wave_first, count,
                 [&](const auto& g, const auto& range, const auto& b) { passes.pass_g(g, range, b); });
    if (!passes.want_H) return;
    reduce(passes.from_g, tokens, dH);
    share_chunks(plan.chunks_of_x, wave_first, count,
                 [&](const auto& g, const auto& range, const auto& b) { passes.pass_x(g, range, b); });
  }

  // f(segment, chunks, buffers)
  template <class F>
  void share_chunks(const Chunks& chunks, int64_t wave_first, int64_t count, F&& f) const {
    const int64_t together = plan.whole_blocks ? chunks.per_block : 1, items = chunks.count / together;
    parallel_items(count * items, plan.threads, [&](int64_t item, int thread) {
      const int64_t index = item / items, begin = item % items * together;
      const int64_t place = plan.whole_blocks ? thread * place_tokens : begin * wave_tokens + index * plan.segment;
      const ChunkRange<Acc> range{begin, begin + together, partial + place * sums_row, plan.whole_blocks};
      f(segment(wave_first, index), range, passes.buffers_at(buffers.of(thread)));
    });
  }

  void reduce(const Project<Product>& project, int64_t tokens, Latent* to) const {
    if (plan.whole_blocks) return;
    parallel_items(tokens, tokens < 16 ? 1 : plan.threads, [&](int64_t m, int thread) {
      project.reduce(partial, wave_tokens, m, buffers.of(thread), to + m * row);
    });
  }

  void convert_U(int64_t t0, int64_t tokens, Latent* to) const {
    if constexpr (sizeof(Latent) > sizeof(bf16))
      convert_row<Acc>(static_cast<const bf16*>(p.u) + t0 * row, 1, tokens * row, to);
  }

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
