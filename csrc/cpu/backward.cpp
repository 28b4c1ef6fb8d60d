// SPDX-License-Identifier: Apache-2.0
// backward, with g = dL/dy:
//   dU_j = s g_j B_j^T and s g Bg, stored as dH (project);   dx = (dH A^T + s g Bg Ag) * dropout factor (expand)
//   dB_j = s U_j^T g_j, dBg^T = s (x' Ag^T)^T g;   dA_n = x'_n^T dH_n, dAg = (s g Bg)^T x'   (weight_gradient)
//
// g is read once for dU and dB, then x once for dA while dx is written: an item is one chunk of
// columns for one segment of tokens, or those of a block. The chunks' parts of dU meet in `partial`
// and are added in the order of the chunks: at once where one thread takes the segment or the
// block, else when all are there. Weight gradients are summed in a fixed tree: kTokens tokens (or
// pairs of them) in registers, those blocks within a segment, segments in their order. It does not
// depend on the number of threads; neither does any other sum. Where g, x, A and B are bf16, all
// products can be of pairs (pairs.h), with U and dH rounded as factors; by tiles, other A and B
// meet bf16 g and x in pieces (pieces.h).
#include "backward_few.h"
#include "backward_passes.h"

namespace gralora::cpu::GRALORA_ISA {
namespace {

// How threads share the passes: over waves of segments, by tokens or by columns
template <class Acc, class Product>
struct Backward : private BackwardPasses<Acc, Product> {
  using Passes = BackwardPasses<Acc, Product>;
  using Passes::dA, Passes::dB, Passes::from_g, Passes::from_x, Passes::of_wave, Passes::p, Passes::pass_g,
      Passes::pass_x, Passes::project_U, Passes::remake_U, Passes::row, Passes::s, Passes::segment_tokens,
      Passes::segments, Passes::to_x, Passes::want_H, Passes::want_x;
  using typename Passes::Buffers;
  using typename Passes::FromWide;
  using typename Passes::Segment;

  static constexpr bool kPairs = BackwardRanks<Acc, Product>::kPairs;  // of which U is always kept

  explicit Backward(const BackwardParams& params) : Passes(params) {}

  // Whether all products are of pairs, whichever gradients are wanted; or by tiles
  static bool takes_pairs(const BackwardParams& p) {
    return Product::available() && p.shape.T >= kTokensToRound && p.u_bf16 &&
           project_g<Acc, Product>(p).takes_pairs() && project_x<Acc, Product>(p).takes_pairs() &&
           expand_x<Acc, Product>(p).takes_pairs();
  }
  static bool takes_tiles(const BackwardParams& p) {
    return Product::available() && p.shape.T >= tokens_for_tiles(p.u_bf16) &&
           project_g<Acc, Product>(p).takes_tiles() && project_x<Acc, Product>(p).takes_tiles();
  }

  Scratch scratch;
  // A wave of segments gives every thread one, or a share of the chunks.
  const int64_t wave = segments >= p.threads
                           ? int64_t(p.threads)
                           : smaller(segments, ceil_div(4 * p.threads, smaller(from_g.chunks(), from_x.chunks())));
  const int64_t wave_tokens = wave * segment_tokens;
  const PerThread<Acc> buffers{scratch, p.threads, Passes::buffers_size};
  // A token's ranks have one place, one for each thread that takes whole blocks, or one for each
  // chunk
  const int64_t chunk_places = larger(want_H ? from_g.chunks() : 0, remake_U ? from_x.chunks() : 0);
  const int64_t most_places = always_by_tokens() ? 1 : segments == 1 && takes_blocks(1) ? p.threads : chunk_places;
  Acc* partial = scratch.take<Acc>(smaller(chunk_places, most_places) * wave_tokens * from_g.sums());

  Buffers of(int thread) const { return Passes::buffers_at(buffers.of(thread)); }

  // How a wave of `count` segments is shared
  bool by_tokens(int64_t count) const { return shared_evenly(count, p.threads); }
  // By columns: whether a thread takes whole blocks, or single chunks
  bool takes_blocks(int64_t count) const { return s.h == 0 && shared_evenly(count * s.k, p.threads); }
  bool always_by_tokens() const { return by_tokens(wave) && by_tokens(segments % larger(wave, 1)); }

  void run() {
    if (want_H) of_wave.dH = scratch.take<Acc>(wave_tokens * row);
    if (remake_U) of_wave.remade = scratch.take<Acc>(wave_tokens * row);
    if (segments != 1) dB.reserve(scratch, wave), dA.reserve(scratch, wave);
    int64_t first = 0;
    do {  // once also where there are no tokens: the gradients are zeros then
      const int64_t count = smaller(wave, segments - first);
      if (by_tokens(count))
        run_by_tokens(first, count);
      else
        run_by_columns(first, count);
      if (segments != 1) finish(first, count);
      first += wave;
    } while (first < segments);
  }

  Segment segment(int64_t wave_first, int64_t index) const {
    const int64_t t0 = (wave_first + index) * segment_tokens;
    return {wave_first == 0, index, t0, index * segment_tokens, smaller(segment_tokens, s.T - t0)};
  }

  // Each thread takes segments through everything.
  void run_by_tokens(int64_t wave_first, int64_t count) {
    parallel_items(count, p.threads, [&](int64_t index, int thread) {
      const Segment g = segment(wave_first, index);
      const Buffers b = of(thread);
      // Chunk after chunk is added to the same place: the order, and so the bits, of reduce().
      Acc* sums = partial + g.row * from_g.sums();
      const auto for_chunks = [&](const FromWide& project, auto* to, auto&& f) {
        if (to != nullptr) project.clear_sums(g.tokens, sums);
        for (int64_t chunk = 0; chunk < project.chunks(); chunk++) {
          f(chunk, project.cut.first(chunk) == 0);
          if (to != nullptr) project.finish_chunk(chunk, g.tokens, sums, to + g.row * row);
        }
      };
      if constexpr (!kPairs) {
        if (remake_U)
          for_chunks(from_x, of_wave.remade, [&](int64_t chunk, bool) { project_U(g, chunk, sums, true, b); });
      }
      of_wave.with_dH(0, [&](auto* to) {
        for_chunks(from_g, to,
                   [&](int64_t chunk, bool new_block) { pass_g(g, chunk, sums, true, b, new_block, nothing); });
      });
      if (want_H)
        for_chunks(from_x, static_cast<Acc*>(nullptr),
                   [&](int64_t chunk, bool new_block) { pass_x(g, chunk, b, new_block, nothing); });
    });
  }

  // Threads share the blocks of all segments, whose sums of ranks are done then, or the chunks,
  // whose sums are added when all are there.
  void run_by_columns(int64_t wave_first, int64_t count) {
    const bool by_block = takes_blocks(count);
    const auto for_chunks = [&](const FromWide& of_chunks, auto&& f) {
      parallel_chunks(count, of_chunks.chunks(), by_block ? of_chunks.cut.per_block : 1, p.threads,
                      [&](int64_t index, auto... rest) { f(segment(wave_first, index), rest...); });
    };
    const int64_t rows = smaller(count * segment_tokens, s.T - wave_first * segment_tokens);
    // Sums of ranks, to `to`: f(segment, chunk, next, place, add, buffers, begins) leaves or adds
    // those of a chunk.
    const auto project_all = [&](const FromWide& project, auto* to, auto&& f) {
      const int64_t sums = project.sums();
      for_chunks(project, [&](const Segment& g, int64_t chunk, int64_t next, int thread, bool begins) {
        Acc* place = partial + (by_block ? thread * segment_tokens : chunk * wave_tokens + g.row) * sums;
        if (by_block && begins && to != nullptr) project.clear_sums(g.tokens, place);
        f(g, chunk, next, place, by_block, of(thread), begins);
        if (by_block && to != nullptr) project.finish_chunk(chunk, g.tokens, place, to + g.row * row);
      });
      if (!by_block && to != nullptr)
        parallel_items(rows, rows < 16 ? 1 : p.threads, [&](int64_t m, int thread) {
          project.reduce(partial, wave_tokens, m, of(thread).panels, to + m * row);
        });
    };
    if constexpr (!kPairs) {
      if (remake_U)
        project_all(from_x, of_wave.remade,
                    [&](const Segment& g, int64_t chunk, int64_t, Acc* to, bool add, Buffers b, bool) {
                      project_U(g, chunk, to, add, b);
                    });
    }
    // While a thread works on an item, what it will read for the next one comes from memory.
    const auto ahead_of_x = [&](int64_t next, int64_t tokens) {
      if (!want_x || next >= from_x.chunks()) return Ahead{};
      return to_x.ahead(from_x.cut.block(next), from_x.cut.first(next), from_x.cut.length(next), tokens);
    };
    const auto ahead_of_g = [&](int64_t next, int64_t tokens) {
      const int64_t turn = next - from_g.chunks();
      if (turn < 0) return from_g.ahead(next, tokens);
      return ahead_of_x(turn * (by_block ? from_x.cut.per_block : 1), tokens);
    };
    of_wave.with_dH(0, [&](auto* dH) {
      project_all(from_g, dH,
                  [&](const Segment& g, int64_t chunk, int64_t next, Acc* to, bool add, Buffers b, bool begins) {
                    Ahead ahead = ahead_of_g(next, g.tokens);
                    pass_g(g, chunk, to, add, b, begins, Fetching{ahead});
                  });
    });
    if (!want_H) return;
    for_chunks(from_x, [&](const Segment& g, int64_t chunk, int64_t next, int thread, bool begins) {
      Ahead ahead = ahead_of_x(next, g.tokens);
      pass_x(g, chunk, of(thread), begins, Fetching{ahead});
    });
  }

  void finish(int64_t wave_first, int64_t count) const {
    const int64_t of_B = dB.wanted() ? dB.chunks : 0, of_A = dA.wanted() ? dA.chunks : 0;
    parallel_items(of_B + of_A, p.threads, [&](int64_t item, int) {
      const bool first = wave_first == 0, last = wave_first + count >= segments;
      if (item < of_B)
        dB.finish(first, last, count, item);
      else
        dA.finish(first, last, count, item - of_B);
    });
  }
};

template <class Acc>
void run(const BackwardParams& p) {
  if (BackwardFew<Acc>::fits(p)) return BackwardFew<Acc>{p}.run();
  if constexpr (kMultipliesTiles<Acc>) {
    if (Backward<Acc, Tiles>::takes_tiles(p)) return Backward<Acc, Tiles>(p).run();
  }
  if constexpr (kMultipliesPairs<Acc>) {
    if (Backward<Acc, Pairs>::takes_pairs(p)) return Backward<Acc, Pairs>(p).run();
  }
  Backward<Acc, Singles<Acc>>(p).run();
}

}  // namespace

void backward(const BackwardParams& p) {
  if constexpr (kHasFloat64) {
    if (p.accumulate_f64) return run<double>(p);
  }
  run<float>(p);
}

}  // namespace gralora::cpu::GRALORA_ISA
