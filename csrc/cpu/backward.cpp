// backward, with g = dL/dy:
//   dU_j = s g_j B_j^T and s g Bg, stored as dH (project);   dx = (dH A^T + s g Bg Ag) * dropout factor (expand)
//   dB_j = s U_j^T g_j, dBg^T = s (x' Ag^T)^T g;   dA_n = x'_n^T dH_n, dAg = (s g Bg)^T x'   (weight_gradient)
//
// g is read once for dU and dB, then x once for dA while dx is written: an item is one chunk of columns for one segment of
// tokens, or those of a block. The chunks' parts of dU meet in `partial` and are added in the order of the chunks: at once where
// one thread takes the segment or the block, else when all are there. Weight gradients are summed in a fixed tree: kTokens tokens
// (or pairs of them) in registers, those blocks within a segment, segments in their order. It does not depend on the number of
// threads; neither does any other sum. Where g, x, A and B are bf16, all products can be of pairs (pairs.h), with U and dH rounded
// as factors; by tiles, other A and B meet bf16 g and x in pieces (pieces.h).
#include "backward_few.h"
#include "backward_ranks.h"
#include "capability.h"
#include "expand.h"
#include "gradient_totals.h"
#include "project.h"
#include "weight_gradient.h"

namespace gralora::cpu::GRALORA_ISA {
namespace {

// AMD's processors were slower where threads share columns of more than a few tokens (not measured since they take whole blocks), and
// where rows of dx are fetched before they are written though nothing is added to them.
static const bool kOnAmd = strcmp(vendor(), "amd") == 0;

template <class Acc, class Product>
struct Backward {
  using FromWide = Project<Acc, Product>;
  using ToWide = Expand<Acc, Product>;
  static constexpr int kTerms = Product::kTerms;
  static constexpr bool kTiles = kByTiles<Product>;

  explicit Backward(const BackwardParams& params) : p(params) {}

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

  const BackwardParams& p;
  const Shape& s = p.shape;
  const int64_t ranks = s.r + s.h, row = s.k * s.r + s.h;  // of u and dH
  const Mask mask = Mask(p.dropout);
  const FromWide from_g = project_g<Acc, Product>(p);
  // U again, where forward did not keep it
  const FromWide from_x = project_x<Acc, Product>(p);
  const ToWide to_x = expand_x<Acc, Product>(p);
  BackwardRanks<Acc, Product> of_wave{p};
  // As how many pieces tiles take the ranks
  const WeightGradient<Acc, Product> gradient{s.k, s.r, s.h, kTiles && !of_wave.rounded ? kMostPieces : 1};
  const RankPieces expanded{1, s.r, s.h, of_wave.rounded ? 1 : ToWide::kPieces};  // those of a block, for dx

  Scratch scratch;
  Totals<Acc> dB{from_g.cut,      s.r,      s.h,
                 from_g.chunks(), p.grad.B, transposed(blocks_of_rows(p.grad.B_general, s.M / s.k)),
                 Acc(p.scaling)};
  Totals<Acc> dA{
      from_x.cut,  s.r, s.h, from_x.chunks(), transposed(p.grad.A), blocks_of_columns(p.grad.A_general, s.N / s.k),
      from_x.scale};
  const bool want_x = p.grad_x.data != nullptr, want_H = want_x || dA.wanted();
  const bool remake_U = dB.wanted() && p.u == nullptr;

  // Whether all tokens are one segment, whose columns threads share: few, or not many where the parameters and their gradients, which
  // each thread would take for its own tokens, are large beside the ranks that threads exchange.
  bool one_segment() const {
    if (s.T < 192) return true;
    return !kOnAmd && s.T <= kSegment && s.h == 0 && s.k % 2 == 0 && s.r * (s.N + s.M) >= 256 * s.T * s.k;
  }

  // Segments do not depend on the number of threads. A wave of them gives every thread one, or a share of the chunks.
  const int64_t wanted_segments = one_segment() ? 1 : round_up(ceil_div(s.T, kSegment), 2);
  const int64_t segment_tokens = larger(round_up(ceil_div(s.T, wanted_segments), Product::kRows), Product::kRows);
  const int64_t segments = ceil_div(s.T, segment_tokens);
  const int64_t wave = segments >= p.threads
                           ? int64_t(p.threads)
                           : smaller(segments, ceil_div(4 * p.threads, smaller(from_g.chunks(), from_x.chunks())));
  const int64_t wave_tokens = wave * segment_tokens;
  const int64_t panels_size = larger(to_x.panels_size(kChunk), larger(from_g.panels_size(1), from_x.panels_size(1)));
  const int64_t block_rows = smaller(kTokens, gradient.steps(s.T));
  const int64_t gradient_ranks_size = round_up(ranks * gradient.pieces * gradient.steps(segment_tokens), kWidth<Acc>);
  const int64_t expanded_size = of_wave.dH_in_place() ? 0 : segment_tokens * expanded.token;
  const PerThread<Acc> buffers{scratch, p.threads,
                               larger(from_g.sums(), panels_size) + gradient_ranks_size + expanded_size +
                                   Block<Acc>::size(block_rows) + (segments == 1 ? ranks * kChunk : 0)};
  // A token's ranks have one place, one for each thread that takes whole blocks, or one for each chunk
  const int64_t chunk_places = larger(want_H ? from_g.chunks() : 0, remake_U ? from_x.chunks() : 0);
  const int64_t most_places = always_by_tokens() ? 1 : segments == 1 && takes_blocks(1) ? p.threads : chunk_places;
  Acc* partial = scratch.take<Acc>(smaller(chunk_places, most_places) * wave_tokens * from_g.sums());

  // One thread's scratch
  struct Buffers {
    Acc *panels, *gradient_ranks, *expanded, *sums;
    Block<Acc> block;  // of g or x
  };
  Buffers of(int thread) const {
    Acc* panels = buffers.of(thread);
    Acc* gradient_ranks = panels + larger(from_g.sums(), panels_size);
    Acc* expanded = gradient_ranks + gradient_ranks_size;
    Acc* block = expanded + expanded_size;
    return {panels, gradient_ranks, expanded, block + Block<Acc>::size(block_rows), {block, block_rows}};
  }

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

  // A segment of tokens, `index` of its wave; its rows of `partial`, u and dH begin at `row`.
  struct Segment {
    bool first;
    int64_t index, t0, row, tokens;
  };
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
      if (remake_U)
        of_wave.with_remade(
            [&](auto* u) { for_chunks(from_x, u, [&](int64_t chunk, bool) { project_U(g, chunk, sums, true, b); }); });
      of_wave.with_dH(0, [&](auto* to) {
        for_chunks(from_g, to,
                   [&](int64_t chunk, bool new_block) { pass_g(g, chunk, sums, true, b, new_block, nothing); });
      });
      if (want_H)
        for_chunks(from_x, static_cast<Acc*>(nullptr),
                   [&](int64_t chunk, bool new_block) { pass_x(g, chunk, b, new_block, nothing); });
    });
  }

  // Threads share the blocks of all segments, whose sums of ranks are done then, or the chunks, whose sums are added when all are
  // there.
  void run_by_columns(int64_t wave_first, int64_t count) {
    const bool by_block = takes_blocks(count);
    const auto for_chunks = [&](const FromWide& of_chunks, auto&& f) {
      parallel_chunks(count, of_chunks.chunks(), by_block ? of_chunks.cut.per_block : 1, p.threads,
                      [&](int64_t index, auto... rest) { f(segment(wave_first, index), rest...); });
    };
    const int64_t rows = smaller(count * segment_tokens, s.T - wave_first * segment_tokens);
    // Sums of ranks, to `to`: f(segment, chunk, next, place, add, buffers, begins) leaves or adds those of a chunk.
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
    if (remake_U)
      of_wave.with_remade([&](auto* u) {
        project_all(from_x, u, [&](const Segment& g, int64_t chunk, int64_t, Acc* to, bool add, Buffers b, bool) {
          project_U(g, chunk, to, add, b);
        });
      });
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
                    pass_g(g, chunk, to, add, b, begins, [&](int64_t) { ahead.fetch(); });
                  });
    });
    if (!want_H) return;
    for_chunks(from_x, [&](const Segment& g, int64_t chunk, int64_t next, int thread, bool begins) {
      Ahead ahead = ahead_of_x(next, g.tokens);
      pass_x(g, chunk, of(thread), begins, [&](int64_t) { ahead.fetch(); });
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

  void project_U(const Segment& g, int64_t chunk, Acc* to, bool add, Buffers b) const {
    [[maybe_unused]] typename Product::Scope scope;
    const auto panels = from_x.read_panels(chunk, 1, g.tokens, b.panels);
    for_blocks(g, [&](int64_t m, int64_t tokens) {
      project_block(from_x, panels, chunk, g, m, tokens, to, add, false, b, nothing);
    });
  }

  // The part of dU and of dB that one chunk of g gives, the former written or added to `to`; new_ranks: b has not those of this
  // chunk's block yet; others(p) is called beside the products.
  template <class Others>
  void pass_g(const Segment& g, int64_t chunk, Acc* to, bool add, Buffers b, bool new_ranks, Others&& others) const {
    [[maybe_unused]] typename Product::Scope scope;
    typename FromWide::Panels panels;
    if (want_H) panels = from_g.read_panels(chunk, 1, g.tokens, b.panels);
    if (dB.wanted() && new_ranks)
      of_wave.with_U(g.t0, g.row, [&](const auto* u) {
        gradient.read_ranks(u, from_g.cut.block(chunk), g.tokens, b.gradient_ranks);
      });
    Acc* sums = segments == 1 ? b.sums : dB.slot(g.first, g.index, chunk);
    const bool copy = dB.wanted() && !usable_in_place_by_columns<Acc>(p.grad_y, from_g.mask, from_g.cut.length(chunk));
    for_blocks(g, [&](int64_t m, int64_t tokens) {
      if (want_H)
        project_block(from_g, panels, chunk, g, m, tokens, to, add, copy, b, others);
      else if (copy)
        read(from_g, chunk, g.t0 + m, tokens, b);
      if (dB.wanted())
        gradient.add(b.gradient_ranks, g.tokens, m, tokens, rows(from_g, chunk, g.t0 + m, copy, b),
                     from_g.cut.length(chunk), m > 0, sums, {});
    });
    if (dB.wanted() && segments == 1) dB.write(chunk, sums);
  }

  // dx of one chunk of x, and its part of dA
  template <class Others>
  void pass_x(const Segment& g, int64_t chunk, Buffers b, bool new_ranks, Others&& others) const {
    const int64_t block = from_x.cut.block(chunk), column = from_x.cut.first(chunk), columns = from_x.cut.length(chunk);
    [[maybe_unused]] typename Product::Scope scope;
    typename ToWide::Panels panels;
    if (want_x) panels = to_x.read_panels(block, column, columns, g.tokens, b.panels);
    if (new_ranks)
      of_wave.with_dH(g.row, [&](const auto* dH) {
        if (dA.wanted()) gradient.read_ranks(dH, block, g.tokens, b.gradient_ranks);
        if constexpr (kTiles) {
          if (want_x && !of_wave.dH_in_place())
            expanded.split(dH + block * s.r, dH + s.k * s.r, row, g.tokens, b.expanded);
        }
      });
    Acc* sums = segments == 1 ? b.sums : dA.slot(g.first, g.index, chunk);
    const bool copy = mask.on || (dA.wanted() && !usable_in_place_by_columns<Acc>(p.x, mask, columns));
    for_blocks(g, [&](int64_t m, int64_t tokens) {
      if (copy) read(from_x, chunk, g.t0 + m, tokens, b);
      if (dA.wanted())
        gradient.add(b.gradient_ranks, g.tokens, m, tokens, rows(from_x, chunk, g.t0 + m, copy, b), columns, m > 0,
                     sums, prefetch_from(from_x, chunk, g, m + tokens, tokens));
      if (want_x) expand_block(panels, chunk, g, m, tokens, b, others);
    });
    if (dA.wanted() && segments == 1) dA.write(chunk, sums);
  }

  template <class F>
  static void for_blocks(const Segment& g, F&& f) {
    constexpr int64_t most = kTokens * kTerms;
    for (int64_t m = 0; m < g.tokens; m += most) f(m, smaller(most, g.tokens - m));
  }

  // Rows m.. of a segment's chunk, or where there are not as many, the first ones of the next chunk
  Prefetch prefetch_from(const FromWide& from, int64_t chunk, const Segment& g, int64_t m, int64_t rows) const {
    if (m + rows <= g.tokens) return Prefetch::of(from.x, g.t0 + m, from.cut.column(chunk));
    if (chunk + 1 < from.chunks()) return Prefetch::of(from.x, g.t0, from.cut.column(chunk + 1));
    return {};
  }

  void read(const FromWide& from, int64_t chunk, int64_t t, int64_t tokens, Buffers b) const {
    const int64_t column = from.cut.column(chunk), length = from.cut.length(chunk);
    if constexpr (kTerms == 2) {
      if (from.mask.on) from.mask.rows(t, tokens, from.width, column, length, b.block.kept, kKept);
      interleave_rows(in_place<bf16>(from.x, t, column), tokens, 0, length, length,
                      from.mask.on ? b.block.kept : nullptr, b.block.rows);
      pad_block(tokens, length, b);
    } else
      read_block<Acc>(from.x, t, tokens, column, length, from.width, from.mask, b.block);
  }

  // Zeros below a block's pairs of rows, as far as products read
  void pad_block(int64_t tokens, int64_t columns, Buffers b) const {
    for (int64_t i = ceil_div(tokens, kTerms); i < gradient.steps(tokens); i++)
      for (int64_t c = 0; c < round_up(columns, kTile<Acc>); c++) b.block.rows[i * kRow<Acc> + c] = Acc(0);
  }

  // The rows of tokens t.. of a chunk: their copy, or as they lie
  Source<Acc> rows(const FromWide& from, int64_t chunk, int64_t t, bool copied, Buffers b) const {
    return copied ? Source<Acc>{b.block.rows, kRow<Acc>} : in_place<Acc>(from.x, t, from.cut.column(chunk));
  }

  // Writes or adds the part of the ranks of tokens m0.. of a segment's chunk, and leaves the chunk itself in b.block, if it is
  // to be kept. Where the rows can be multiplied as they lie, they are copied meanwhile.
  template <class Others>
  void project_block(const FromWide& from, const typename FromWide::Panels& panels, int64_t chunk, const Segment& g,
                     int64_t m0, int64_t tokens, Acc* to, bool add, bool keep, Buffers b, Others&& others) const {
    const int64_t length = from.cut.length(chunk);
    const bool copy = keep && (kTerms == 2 || usable_in_place<Acc>(from.x, from.mask));
    Source<Acc> rows{};
    if constexpr (kTerms == 1) rows = from.left_rows(g.t0 + m0, tokens, from.cut.column(chunk), length, b.block);
    for_groups<Product>(tokens, [&](auto group, int64_t m) {
      const Prefetch prefetch = prefetch_from(from, chunk, g, m0 + m + group.count(), group.count());
      Source<Acc> a{rows.data + m * rows.ld, rows.ld};
      if constexpr (kTerms == 2)  // whose copies have no room for more rows
        a = from.left_rows(g.t0 + m0 + m, group.count(), from.cut.column(chunk), length, b.block);
      const auto each = [=, &others, fetched = RowsAhead(group, prefetch, 0)](int64_t i, int part) mutable {
        fetched.fetch(part);
        if (part > 0) return;
        others(i);
        if (!copy) return;
        if constexpr (kTerms == 2)
          interleave_rows(in_place<bf16>(from.x, g.t0 + m0 + m, from.cut.column(chunk)), group.count(), 2 * i,
                          2 * (i + kSteps), length, nullptr, b.block.rows + m / 2 * kRow<Acc>);
        else
          copy_columns(a.data, a.ld, group.count(), i, length, b.block.rows + m * kRow<Acc>);
      };
      from.add_rows(group, panels, 0, length, a, add, to + (m0 + m) * from.sums(), each, others);
    });
    if (copy) pad_block(tokens, length, b);
  }

  // dx of tokens m0.. of a segment's chunk
  template <class Others>
  void expand_block(const typename ToWide::Panels& panels, int64_t chunk, const Segment& g, int64_t m0, int64_t tokens,
                    Buffers b, Others&& others) const {
    const int64_t block = from_x.cut.block(chunk), column = from_x.cut.column(chunk);
    const auto run = [&](const Ranks<Acc>& ranks) {
      for_dtype_of<Product, Acc>(p.grad_x.dtype, [&](auto* type) {
        using X = std::remove_pointer_t<decltype(type)>;
        for_groups<Product>(tokens, [&](auto group, int64_t m) {
          const int64_t after = m0 + m + group.count();
          const Prefetch dx = Prefetch::of(kOnAmd ? to_x.base : to_x.y, after < g.tokens ? g.t0 + after : -1, column);
          to_x.template run_rows<X>(group, panels, g.t0 + m0 + m, block, from_x.cut.first(chunk),
                                    from_x.cut.length(chunk), ranks.from_token(m), b.block.kept + m * kKept, dx,
                                    others);
        });
      });
    };
    if constexpr (kTiles) {
      if (!of_wave.dH_in_place()) return run(expanded.of(b.expanded + m0 * expanded.token));
    }
    of_wave.with_dH(g.row + m0, [&](const auto* dH) { run(Ranks<Acc>::of(dH, s)); });
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
