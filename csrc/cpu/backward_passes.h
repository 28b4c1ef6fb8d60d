// SPDX-License-Identifier: Apache-2.0
// What backward does with one chunk of columns and one segment of tokens: a pass over g for dU and
// dB, one over x for dA and dx.
#pragma once

#include <utility>

#include "backward_ranks.h"
#include "expand.h"
#include "gradient_totals.h"
#include "project.h"
#include "weight_gradient.h"

namespace gralora::cpu::GRALORA_ISA {
namespace {  // one caller: GCC inlines what is called once

template <class Acc, class Product>
struct BackwardPasses {
  using FromWide = Project<Acc, Product>;
  using ToWide = Expand<Acc, Product>;
  static constexpr int kTerms = Product::kTerms;
  static constexpr bool kTiles = kByTiles<Product>;

  explicit BackwardPasses(const BackwardParams& params) : p(params) {}

  const BackwardParams& p;
  const Shape& s = p.shape;
  const int64_t ranks = s.r + s.h, row = s.k * s.r + s.h;  // of u and dH
  const Mask mask = Mask(p.dropout);
  const FromWide from_g = project_g<Acc, Product>(p);
  const FromWide from_x = project_x<Acc, Product>(p);
  const ToWide to_x = expand_x<Acc, Product>(p);
  BackwardRanks<Acc, Product> of_wave{p};
  // As how many pieces tiles take the ranks
  const WeightGradient<Acc, Product> gradient{s.k, s.r, s.h, kTiles && !of_wave.rounded ? kMostPieces : 1};
  const RankPieces expanded{1, s.r, s.h, of_wave.rounded ? 1 : ToWide::kPieces};  // those of a block, for dx
  Totals<Acc> dB{from_g.cut,      s.r,      s.h,
                 from_g.chunks(), p.grad.B, transposed(blocks_of_rows(p.grad.B_general, s.M / s.k)),
                 Acc(p.scaling)};
  Totals<Acc> dA{
      from_x.cut,  s.r, s.h, from_x.chunks(), transposed(p.grad.A), blocks_of_columns(p.grad.A_general, s.N / s.k),
      from_x.scale};
  const bool want_x = p.grad_x.data != nullptr, want_H = want_x || dA.wanted();
  const bool remake_U = dB.wanted() && p.u == nullptr;

  // Whether all tokens are one segment, whose columns threads share: few, or not many where the
  // parameters and their gradients, which each thread would take for its own tokens, are large
  // beside the ranks that threads exchange.
  bool one_segment() const {
    if (s.T < 192) return true;
    return s.T <= kSegment && s.h == 0 && s.k % 2 == 0 && s.r * (s.N + s.M) >= 128 * s.T * s.k;
  }

  // Segments do not depend on the number of threads. One alone writes its gradients, several add
  // theirs.
  const int64_t wanted_segments = one_segment() ? 1 : round_up(ceil_div(s.T, kSegment), 2);
  const int64_t segment_tokens = larger(round_up(ceil_div(s.T, wanted_segments), Product::kRows), Product::kRows);
  const int64_t segments = ceil_div(s.T, segment_tokens);
  // Whether dA is written as rows of ranks
  const bool dA_in_rows = !kTiles && segments == 1 && s.T <= kTokens * kTerms && s.h == 0 && s.r >= kTile<Acc> &&
                          p.grad.A.column_stride == 1;

  // Some tokens, `index` of their wave; their rows of u and dH begin at `row`.
  struct Segment {
    bool first;  // whether the wave is
    int64_t index, t0, row, tokens;
  };

  // One thread's scratch
  struct Buffers {
    Acc *panels, *gradient_ranks, *expanded, *sums, *kept;
    Acc* copies;       // of pairs of two groups of rows
    Block<Acc> block;  // of g or x
  };
  const int64_t panels_size =
      larger(from_g.sums(), larger(to_x.panels_size(kChunk), larger(from_g.panels_size(1), from_x.panels_size(1))));
  const int64_t gradient_ranks_size =
      larger(round_up(ranks * gradient.pieces * gradient.steps(segment_tokens), kWidth<Acc>),
             dA_in_rows ? gradient.rank_rows_size(s.T) : 0);
  const int64_t expanded_size = of_wave.dH_in_place() ? 0 : segment_tokens * expanded.token;
  const int64_t block_rows = smaller(kTokens, gradient.steps(s.T));
  const int64_t sums_size = segments == 1 ? ranks * kChunk : 0;
  static constexpr int64_t copies_size = kTerms == 2 && !kTiles ? 2 * Product::kRows * kRow<Acc> : 0;
  const int64_t buffers_size = panels_size + gradient_ranks_size + expanded_size + Block<Acc>::size(block_rows) +
                               sums_size + gradient.kept_size + copies_size;
  Buffers buffers_at(Acc* panels) const {
    Acc* gradient_ranks = panels + panels_size;
    Acc* expanded = gradient_ranks + gradient_ranks_size;
    Acc* block = expanded + expanded_size;
    Acc* sums = block + Block<Acc>::size(block_rows);
    Acc* kept = sums + sums_size;
    return {panels, gradient_ranks, expanded, sums, kept, kept + gradient.kept_size, {block, block_rows}};
  }

  // The part of U that one chunk of x gives, written or added to `to`
  void project_U(const Segment& g, int64_t chunk, Acc* to, bool add, Buffers b) const {
    [[maybe_unused]] typename Product::Scope scope;
    const auto panels = from_x.read_panels(chunk, 1, g.tokens, b.panels);
    for_blocks(g, [&](int64_t m, int64_t tokens) {
      project_block(from_x, panels, chunk, g, m, tokens, to, add, false, b, nothing);
    });
  }

  // The part of dU and of dB that one chunk of g gives, the former written or added to `to`;
  // new_ranks: b has not those of this chunk's block yet; others(p) is called beside the products.
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
    const bool copy = dB.wanted() && (!usable_in_place<Acc>(p.grad_y, from_g.mask) || (want_H && copied_ahead(from_g)));
    for_blocks(g, [&](int64_t m, int64_t tokens) {
      if (want_H)
        project_block(from_g, panels, chunk, g, m, tokens, to, add, copy, b, others);
      else if (copy)
        read(from_g, chunk, g.t0 + m, tokens, b);
      if (dB.wanted())
        gradient.add(b.gradient_ranks, g.tokens, m, tokens, rows(from_g, chunk, g.t0 + m, copy, b),
                     from_g.cut.length(chunk), m > 0, sums, {}, b.kept);
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
        if (dA.wanted()) read_dA_ranks(dH, block, g.tokens, b.gradient_ranks);
        if constexpr (kTiles) {
          if (want_x && !of_wave.dH_in_place())
            expanded.split(dH + block * s.r, dH + s.k * s.r, row, g.tokens, b.expanded);
        }
      });
    Acc* sums = segments == 1 ? b.sums : dA.slot(g.first, g.index, chunk);
    const bool copy = mask.on || (dA.wanted() && !usable_in_place<Acc>(p.x, mask));
    for_blocks(g, [&](int64_t m, int64_t tokens) {
      if (copy) read(from_x, chunk, g.t0 + m, tokens, b);
      const auto x = rows(from_x, chunk, g.t0 + m, copy, b);
      if (dA.wanted() && !write_dA(chunk, g, x, b))
        gradient.add(b.gradient_ranks, g.tokens, m, tokens, x, columns, m > 0, sums,
                     prefetch_from(from_x, chunk, g, m + tokens, tokens), b.kept);
      if (want_x) expand_block(panels, chunk, g, m, tokens, b, others);
    });
    if (dA.wanted() && segments == 1 && !dA_in_rows) dA.write(chunk, sums);
  }

 private:
  // As in Project::add_run, but pairs only where several tiles of ranks read them, and other rows
  // of 16 bits are converted before
  static bool copied_ahead(const FromWide& from) {
    return (kTerms == 2 ? from.r > kTile<Acc> : from.x.dtype == DTypeOf<Acc>::value) && from.copied_ahead();
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

  // Writes or adds the part of the ranks of tokens m0.. of a segment's chunk. Rows that are not
  // multiplied as they lie are left in b.block; and pairs of them, which are interleaved meanwhile,
  // if they are to be kept.
  template <class Others>
  void project_block(const FromWide& from, const typename FromWide::Panels& panels, int64_t chunk, const Segment& g,
                     int64_t m0, int64_t tokens, Acc* to, bool add, bool keep, Buffers b, Others&& others) const {
    const int64_t length = from.cut.length(chunk), steps = length / kTerms;
    const bool interleave = keep && kTerms == 2, ahead = copied_ahead(from);
    const int64_t t = g.t0 + m0, column = from.cut.column(chunk);
    Source<Acc> rows{};    // of the block, where they are not copied ahead
    Source<Acc> direct{};  // those in place, where they are; their copies go on in b.block, those of pairs take turns
    Acc *now = kTerms == 2 ? b.copies : b.block.rows, *next = b.copies + copies_size / 2;
    if (ahead) {
      if constexpr (kTerms == 2)
        direct = pairs_in_place(from.x, t, column);
      else
        direct = in_place<Acc>(from.x, t, column);
      for (int64_t i = 0; i < steps; i += kSteps)
        copy_columns(direct.data, direct.ld, smaller(Product::kRows, tokens), i, steps, now);
    } else if (kTerms == 1) {
      rows = from.left_rows(t, tokens, column, length, b.block);
    }
    for_groups<Product>(tokens, [&](auto group, int64_t m) {
      // Those of the group that is copied during the next one
      const Prefetch prefetch = prefetch_from(from, chunk, g, m0 + m + (ahead ? 2 : 1) * group.count(), group.count());
      Source<Acc> a{rows.data + m * rows.ld, rows.ld};
      if (kTerms == 1) next = now + group.count() * kRow<Acc>;
      if (ahead)
        a = {now, kRow<Acc>};
      else if (kTerms == 2)  // whose copies have no room for more rows
        a = from.left_rows(t + m, group.count(), column, length, b.block);
      const int64_t after = m + group.count(), left = ahead ? smaller(Product::kRows, tokens - after) : 0;
      const Source<Acc> following{direct.data + (left > 0 ? after : 0) * direct.ld, direct.ld};
      const auto each = [=, &others, to = next, fetched = RowsAhead(group, prefetch, 0)](int64_t i, int part) mutable {
        fetched.fetch(part);
        copy_part<Product::kRows>(following, left, part, i, steps, to);
        if (part > 0) return;
        others(i);
        if constexpr (kTerms == 2) {
          if (interleave)
            interleave_rows(in_place<bf16>(from.x, t + m, column), group.count(), 2 * i, 2 * (i + kSteps), length,
                            nullptr, b.block.rows + m / 2 * kRow<Acc>);
        }
      };
      from.add_rows(group, panels, 0, length, a, add, to + (m0 + m) * from.sums(), each, others);
      std::swap(now, next);
    });
    if (interleave) pad_block(tokens, length, b);
  }

  // What dA takes of dH
  template <class Rank>
  void read_dA_ranks(const Rank* dH, int64_t block, int64_t tokens, Acc* to) const {
    if constexpr (!kTiles) {
      if (dA_in_rows) return gradient.read_rank_rows(dH, block, tokens, to);
    }
    gradient.read_ranks(dH, block, tokens, to);
  }

  // dA of a chunk of all tokens of x, if it is written as rows; the next chunk is fetched
  // meanwhile.
  bool write_dA(int64_t chunk, const Segment& g, const Source<Acc>& x, Buffers b) const {
    if (!dA_in_rows) return false;
    const int64_t columns = from_x.cut.length(chunk);
    const int64_t tiles = ceil_div(columns, Product::kRows) * ceil_div(s.r, kTile<Acc>);
    Ahead ahead = Ahead::of_rows(prefetch_from(from_x, chunk, g, g.tokens, g.tokens), g.tokens, columns,
                                 tiles * ceil_div(gradient.steps(g.tokens), kSteps));
    const Param& to = p.grad.A;
    for_dtype<Acc>(to.dtype, [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      P* out = static_cast<P*>(to.data) + from_x.cut.block(chunk) * to.block_stride +
               from_x.cut.first(chunk) * to.row_stride;
      if constexpr (!kTiles)
        gradient.template write_rows<P>(b.gradient_ranks, g.tokens, x, columns, from_x.scale, out, to.row_stride,
                                        Fetching{ahead});
    });
    return true;
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
          const Prefetch dx = Prefetch::of(to_x.y, after < g.tokens ? g.t0 + after : -1, column);
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

}  // namespace
}  // namespace gralora::cpu::GRALORA_ISA
