// SPDX-License-Identifier: Apache-2.0
// forward: U = exchange(x' A) and x' Ag^T (project), then y = base + s (U B + x' Ag^T Bg^T)
// (expand).
//
// Many tokens: a thread takes a segment through both passes, and nothing but u and y leaves its
// cache. Few: threads share the columns instead, blocks or chunks of x first, strips of y then.
// Both give the same bits.
#include "expand.h"
#include "forward_few.h"
#include "project.h"

namespace gralora::cpu::GRALORA_ISA {
namespace {

template <class Acc, class InProject, class InExpand>
struct Forward {
  const ForwardParams& p;
  Project<Acc, InProject> project;
  Expand<Acc, InExpand> expand;
  int64_t strip;     // columns of a block of B that are taken together
  int64_t together;  // blocks that are, where they are narrow: rows of y in long runs

  // Where threads share columns, each takes whole blocks of x, whose sums are done then, or some
  // chunks, whose sums are added when all are there.
  const bool by_block = p.shape.h == 0 && shared_evenly(p.shape.k, p.threads);
  // Below, threads share columns; where they would not, each packs all of A and B for its own
  // tokens.
  const int64_t tokens_per_thread = p.shape.r + p.shape.h < 64 ? 64 : InExpand::kTerms == 2 && by_block ? 128 : 80;
  static constexpr int64_t kTogether = 8;

  explicit Forward(const ForwardParams& params)
      : p(params),
        project(project_x<Acc, InProject>(p)),
        expand{p.shape.M,      p.shape.k,
               p.shape.r,      p.shape.h,
               p.adapter.B,    transposed(blocks_of_rows(p.adapter.B_general, p.shape.M / p.shape.k)),
               Acc(p.scaling), Mask(Dropout{}),
               p.base,         p.y} {
    const int64_t w = p.shape.M / p.shape.k;
    strip = larger(kPanelElements / (p.shape.r + p.shape.h), 4 * kTile<Acc>);
    strip = round_up(smaller(strip, w), kTile<Acc>);
    together = strip < w ? 1 : smaller(kTogether, larger(1, kPanelElements / ((p.shape.r + p.shape.h) * strip)));
    together = smaller(together, p.shape.k);
  }

  int64_t row() const { return p.shape.k * p.shape.r + p.shape.h; }

  // Expand takes ranks as they lie in u, or from a place of place_size() in scratch: where u is
  // rounded and products are of floats, project writes there what finish_ranks() rounds; for tiles,
  // finish_ranks() splits u into pieces there, or fills up its steps, which costs less than steps
  // that are not whole, but among few tokens.
  static constexpr bool kTiles = kByTiles<InExpand>, kPairs = InExpand::kTerms == 2 && !kTiles;
  bool in_u() const {
    const bool few = p.shape.T < kTokensToSplit;
    if (kTiles) return p.u_bf16 && (in_whole_steps(p.shape) || (few && in_whole_pairs(p.shape)));
    return kPairs == p.u_bf16;
  }
  int64_t place_size(int64_t tokens) const {
    if (in_u()) return 0;
    return kTiles ? tokens * pieces().token : round_up(tokens * row(), kWidth<Acc>);
  }
  RankPieces pieces() const { return RankPieces(p.shape.k, p.shape.r, p.shape.h, p.u_bf16 ? 1 : expand.kPieces); }
  // f(where project writes the ranks of tokens from t0 on)
  template <class F>
  void with_ranks(int64_t t0, Acc* place, F&& f) const {
    if constexpr (kTiles || kPairs) {
      if (p.u_bf16) return f(static_cast<bf16*>(p.u) + t0 * row());
    }
    if constexpr (!kPairs) f(kTiles || !p.u_bf16 ? static_cast<Acc*>(p.u) + t0 * row() : place);
  }
  // Of `count` tokens from t0+first on
  void finish_ranks(int64_t t0, int64_t first, int64_t count, Acc* place) const {
    if (in_u()) return;
    if constexpr (kTiles)
      with_ranks(t0 + first, place, [&](auto* u) {
        pieces().split(u, u + p.shape.k * p.shape.r, row(), count, place + first * pieces().token);
      });
    else if constexpr (!kPairs)
      round_run<Acc>(place + first * row(), count * row(), static_cast<bf16*>(p.u) + (t0 + first) * row());
  }
  Ranks<Acc> ranks(int64_t t0, const Acc* place) const {
    if constexpr (kTiles) {
      if (!in_u()) return pieces().of(place);
    }
    if (kTiles || kPairs) return Ranks<Acc>::of(static_cast<const bf16*>(p.u) + t0 * row(), p.shape);
    return Ranks<Acc>::of(in_u() ? static_cast<const Acc*>(p.u) + t0 * row() : place, p.shape);
  }

  void run() {
    if (p.threads == 1 || p.shape.T >= tokens_per_thread * p.threads)
      run_by_tokens();
    else
      for (int64_t t0 = 0; t0 < p.shape.T; t0 += kSegment) run_by_columns(t0, smaller(kSegment, p.shape.T - t0));
  }

  void run_by_tokens() {
    const int64_t T = p.shape.T, segments = round_up(ceil_div(T, kSegment), p.threads);
    const int64_t tokens = round_up(ceil_div(T, segments), InProject::kRows);
    Scratch scratch;
    const PerThread<Acc> buffers(scratch, p.threads,
                                 larger(project.segment_scratch(tokens), expand_scratch()) + place_size(tokens));
    parallel_items(ceil_div(T, tokens), p.threads, [&](int64_t item, int thread) {
      const int64_t t0 = item * tokens, count = smaller(tokens, T - t0);
      Acc *place = buffers.of(thread), *rest = place + place_size(tokens);
      with_ranks(t0, place, [&](auto* u) {
        const int64_t columns = smaller(strip, p.shape.M / p.shape.k);
        project.run_segment(t0, count, u, rest,
                            [&](int64_t calls) { return Ahead::of(expand.Q, 0, 0, p.shape.r, 0, columns, calls); });
      });
      finish_ranks(t0, 0, count, place);
      expand_segment(t0, count, ranks(t0, place), rest);
    });
  }

  void run_by_columns(int64_t t0, int64_t tokens) {
    const int64_t w = p.shape.M / p.shape.k;
    strip = smaller(strip, larger(kTile<Acc>, round_up(ceil_div(p.shape.M, 4 * p.threads), kTile<Acc>)));
    const int64_t strips = ceil_div(w, strip);
    const int64_t chunks = project.chunks(), sums = project.sums();
    Scratch scratch;
    const PerThread<Acc> buffers(
        scratch, p.threads,
        larger(project.panels_size(1) + Block<Acc>::size(InProject::kRows), larger(sums, expand_scratch())));
    Acc* partial = scratch.take<Acc>((by_block ? p.threads : chunks) * tokens * sums);
    Acc* place = scratch.take<Acc>(place_size(tokens));
    // While a thread works on an item, what it will read for the next one, if all take turns, comes
    // from memory.
    const int64_t items = p.shape.k * strips;
    const auto first = [&](int64_t item) { return item % strips * strip; };
    const auto last = [&](int64_t item) { return smaller(first(item) + strip, w); };
    const auto ahead_of = [&](int64_t item) {
      if (item >= items) return Ahead{};
      return expand.ahead(item / strips, first(item), last(item) - first(item), tokens);
    };
    const auto add_chunk = [&](int64_t, int64_t chunk, int64_t next, int thread, bool begins) {
      Acc* sum = partial + (by_block ? thread : chunk) * tokens * sums;
      if (by_block && begins) project.clear_sums(tokens, sum);
      Ahead ahead = next < chunks ? project.ahead(next, tokens) : ahead_of(next - chunks);
      project_chunk(chunk, t0, tokens, by_block, sum, buffers.of(thread), Fetching{ahead});
      if (by_block) with_ranks(t0, place, [&](auto* u) { project.finish_chunk(chunk, tokens, sum, u); });
    };
    parallel_chunks(1, chunks, by_block ? project.cut.per_block : 1, p.threads, add_chunk);
    if (!by_block || !in_u())
      parallel_items(tokens, tokens < 16 ? 1 : p.threads, [&](int64_t m, int thread) {
        if (!by_block)
          with_ranks(t0, place,
                     [&](auto* u) { project.reduce(partial, tokens, m, buffers.of(thread), u + m * row()); });
        finish_ranks(t0, m, 1, place);
      });
    parallel_items(items, p.threads, [&](int64_t item, int thread) {
      Ahead ahead = ahead_of(item + p.threads);
      expand_blocks(t0, tokens, ranks(t0, place), item / strips, 1, first(item), last(item) - first(item),
                    buffers.of(thread), Fetching{ahead});
    });
  }

  // sum[m] (+)= the part of all tokens of a chunk of x
  template <class Each>
  void project_chunk(int64_t chunk, int64_t t0, int64_t tokens, bool add, Acc* sum, Acc* scratch, Each&& each) const {
    [[maybe_unused]] typename InProject::Scope scope;
    const auto panels = project.read_panels(chunk, 1, tokens, scratch);
    const Block<Acc> rows(scratch + project.panels_size(1), InProject::kRows);
    const int64_t length = project.cut.length(chunk);
    for_groups<InProject>(tokens, [&](auto group, int64_t m) {
      const Source<Acc> a = project.left_rows(t0 + m, group.count(), project.cut.column(chunk), length, rows);
      project.add_rows(group, panels, 0, length, a, add, sum + m * project.sums(), each, each);
    });
  }

  int64_t expand_scratch() const { return together * expand.panels_size(strip); }

  // All columns of `count` tokens, a strip of some blocks after the other. What the next panels are
  // made of comes from memory meanwhile, where there are several tiles of ranks; with few, tiles
  // are short.
  void expand_segment(int64_t t0, int64_t count, const Ranks<Acc>& ranks, Acc* scratch) const {
    const int64_t k = p.shape.k, w = p.shape.M / k;
    for (int64_t j = 0; j < k; j += together)
      for (int64_t first = 0; first < w; first += strip) {
        const auto run = [&](auto&& each) {
          expand_blocks(t0, count, ranks, j, smaller(together, k - j), first, smaller(strip, w - first), scratch, each);
        };
        const bool ends = first + strip >= w;
        const int64_t next_j = ends ? j + together : j, next = ends ? 0 : first + strip;
        if (!kFetchesMore || p.shape.r <= kTile<Acc> || next_j >= k) {
          run(nothing);
        } else {
          Ahead ahead = expand.ahead(next_j, next, smaller(strip, w - next), count);
          run(Fetching{ahead});
        }
      }
  }

  // `columns` from `first` on (a strip at most) of the output blocks j .. j+blocks, for `count`
  // tokens with `ranks`
  template <class Each>
  void expand_blocks(int64_t t0, int64_t count, const Ranks<Acc>& ranks, int64_t j, int64_t blocks, int64_t first,
                     int64_t columns, Acc* scratch, Each&& each) const {
    [[maybe_unused]] typename InExpand::Scope scope;
    const int64_t w = p.shape.M / p.shape.k;
    for_dtype_of<InExpand, Acc>(p.y.dtype, [&](auto* type) {
      using Y = std::remove_pointer_t<decltype(type)>;
      typename Expand<Acc, InExpand>::Panels panels[kTogether];
      for (int64_t b = 0; b < blocks; b++)
        panels[b] = expand.read_panels(j + b, first, columns, count, scratch + b * expand.panels_size(strip));
      for_groups<InExpand>(count, [&](auto group, int64_t m) {
        const int64_t after = m + group.count();
        for (int64_t b = 0; b < blocks; b++)
          expand.template run_rows<Y>(group, panels[b], t0 + m, j + b, first, columns, ranks.from_token(m), nullptr,
                                      Prefetch::of(p.base, after < count ? t0 + after : -1, (j + b) * w + first), each);
      });
    });
  }
};

// Runs by products of pairs, or by tiles, where it can; returns whether it did
template <class Product>
bool run_in_pairs(const ForwardParams& p) {
  if (!Product::available()) return false;
  Forward<float, Product, Product> pairs(p);
  if (!pairs.project.takes_pairs()) return false;
  if (p.shape.T >= kTokensToRound && p.u_bf16 && pairs.expand.takes_pairs())
    pairs.run();
  else
    Forward<float, Product, Singles<float>>(p).run();
  return true;
}
template <class Product>
bool run_by_tiles(const ForwardParams& p) {
  if (!Product::available() || p.y.dtype != DType::bf16 || p.shape.T < tokens_for_tiles(p.u_bf16)) return false;
  Forward<float, Product, Product> tiles(p);
  if (!tiles.project.takes_tiles()) return false;
  tiles.run();
  return true;
}

template <class Acc>
void run(const ForwardParams& p) {
  if (ForwardFew<Acc>::fits(p)) return ForwardFew<Acc>{p}.run();
  if constexpr (kMultipliesTiles<Acc>) {
    if (run_by_tiles<Tiles>(p)) return;
  }
  if constexpr (kMultipliesPairs<Acc>) {
    if (run_in_pairs<Pairs>(p)) return;
  }
  Forward<Acc, Singles<Acc>, Singles<Acc>>(p).run();
}

}  // namespace

void forward(const ForwardParams& p) {
  if constexpr (kHasFloat64) {
    if (p.accumulate_f64) return run<double>(p);
  }
  run<float>(p);
}

}  // namespace gralora::cpu::GRALORA_ISA
