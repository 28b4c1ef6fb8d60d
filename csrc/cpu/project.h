// SPDX-License-Identifier: Apache-2.0
// project: from a wide activation to the ranks, with the block exchange in the store.
//
//   u[t, j*r + n*rb + q] = s * sum_i x'[t, n*w + i] * P[n][i, j*rb + q]      n, j = 0 .. k-1;  w = width/k
//   u[t, k*r + c]        = s * sum_i x'[t, i] * G[i, c]                      c = 0 .. h-1
//
// x' is x after dropout; where products are of pairs it lacks the factor 1/(1-p), which is the
// caller's, in s. Forward: x, A, Ag^T give U. Backward: g, B^T, Bg give dH, since the exchange is
// its own inverse.
//
// Blocks are cut into chunks of at most kChunk columns. Each chunk is summed by itself, then chunks
// are added in their order: the result depends neither on the segment nor on the thread, and long
// sums lose less. P is made ready in runs of chunks, each once for a segment of tokens, and streams
// from L2; groups of kRows tokens walk along x, which comes from memory in long runs (short ones on
// many rows would miss the TLB), a chunk at a time in L1.
#pragma once

#include "pieces.h"

namespace gralora::cpu::GRALORA_ISA {

constexpr int64_t kSegment = 512;  // tokens that share a chunk of a parameter
constexpr int64_t kRowsAhead = 8;  // of u, fetched before they are written

// The chunks of a width in k blocks, of nearly equal size: a multiple of `unit` columns, but the
// last one of a block.
struct Chunks {
  int64_t block_width, per_block, columns;
  Chunks(int64_t width, int64_t k, int64_t unit)
      : block_width(width / k),
        per_block(ceil_div(block_width, kChunk)),
        columns(round_up(ceil_div(block_width, per_block), unit)) {
    per_block = ceil_div(block_width, columns);
  }
  int64_t block(int64_t chunk) const { return chunk / per_block; }
  int64_t first(int64_t chunk) const { return chunk % per_block * columns; }  // within the block
  int64_t length(int64_t chunk) const { return smaller(columns, block_width - first(chunk)); }
  bool ends_block(int64_t chunk) const { return chunk % per_block == per_block - 1; }
  int64_t column(int64_t chunk) const { return block(chunk) * block_width + first(chunk); }
};

template <class Acc, class Product>
struct Project {
  static constexpr int kTerms = Product::kTerms;
  int64_t width, k, r, h;
  Rows x;
  Mask mask;
  Param P;  // [k, w, r]
  Param G;  // [k, w, h]
  Acc scale;
  // A chunk begins at a whole tile of a parameter, and at a whole byte of the mask, which is kept
  // chunk by chunk.
  static constexpr int64_t kUnit = kTile<Acc> > 8 ? kTile<Acc> : 8;
  static_assert(kUnit % kTile<Acc> == 0 && kUnit % 8 == 0 && kChunk % kUnit == 0);
  Chunks cut = Chunks(width, k, kUnit);

  int64_t chunks() const { return k * cut.per_block; }
  int64_t general_start() const { return round_up(r, kWidth<Acc>); }
  int64_t sums() const { return general_start() + round_up(h, kWidth<Acc>); }  // per token: ranks of a block, then h

  int64_t run_length() const {  // chunks whose part of P and G fits in L2
    return larger(1, smaller(cut.per_block, kPanelElements / ((r + h) * cut.columns)));
  }
  int64_t panels_size(int64_t chunks) const {
    const int64_t rows = chunks * cut.columns;
    return panel_size_for<Product, Acc>(P.dtype, rows, r) + panel_size_for<Product, Acc>(G.dtype, rows, h);
  }

  struct Panels {
    Panel<Acc> P, G;
  };
  // `count` chunks of one block
  Panels read_panels(int64_t chunk, int64_t count, int64_t uses, Acc* scratch) const {
    const int64_t b = cut.block(chunk), first = cut.first(chunk);
    const int64_t rows = smaller(count * cut.columns, cut.block_width - first);
    Panels panels{read_panel_for<Product>(P, b, first, rows, 0, r, uses, kMostPieces, scratch), {}};
    if (h > 0)
      panels.G = read_panel_for<Product>(G, b, first, rows, 0, h, uses, kMostPieces,
                                         scratch + panel_size_for<Product, Acc>(P.dtype, rows, r));
    return panels;
  }

  // Rows of x as the left factor: their copy in `block` where they are not multiplied as they lie.
  // ld counts elements of Acc.
  Source<Acc> left_rows(int64_t t0, int64_t count, int64_t column, int64_t length, const Block<Acc>& block) const {
    if constexpr (kTerms == 2)
      return mask.on ? dropped_pairs(x, t0, count, column, length, width, mask, block) : pairs_in_place(x, t0, column);
    else
      return rows_to_multiply<Acc>(x, t0, count, column, length, width, mask, block);
  }

  // Whether rows of x are copied while the rows before them are multiplied: those of 16 bits, as
  // floats, and those that L1 cannot hold side by side
  bool copied_ahead() const {
    if (kByTiles<Product> || mask.on || !evenly_spaced(x)) return false;
    if (kTerms == 1 && x.dtype != DTypeOf<Acc>::value) return true;
    return l1_ways() < Product::kRows && in_one_set(in_place<Acc>(x, 0, 0).ld * size_of(x.dtype));
  }

  // Of the panels of a chunk, while as many tokens meet another one; general parts are small.
  Ahead ahead(int64_t chunk, int64_t tokens) const {
    const int64_t groups = ceil_div(tokens, Product::kRows), tiles = ceil_div(r, kTile<Acc>);
    const int64_t calls = groups * tiles * ceil_div(cut.columns / kTerms, kSteps);
    return Ahead::of(P, cut.block(chunk), cut.first(chunk), cut.length(chunk), 0, r, calls);
  }

  // sum[m] (+)= the part of some tokens, whose rows are `a`, of a chunk that lies at `row` of the
  // panels. For every kSteps steps each(p) is called in the first tile of ranks, others(p) in the
  // others.
  template <class Group, class Each, class Others>
  void add_rows(Group rows, const Panels& panels, int64_t row, int64_t length, const Source<Acc>& a, bool accumulate,
                Acc* sum, Each&& each, Others&& others) const {
    const auto add = [&](const Panel<Acc>& panel, int64_t columns, bool first, Acc* to) {
      for_column_tiles<Acc>(round_up(columns, kWidth<Acc>), [&](auto nv, int64_t c) {
        const Source<Acc> b = panel.from(row / kTerms, c);
        if (first && c == 0)
          tile(rows, nv, length / kTerms, a, b, accumulate, to + c, each);
        else
          tile(rows, nv, length / kTerms, a, b, accumulate, to + c, others);
      });
    };
    add(panels.P, r, true, sum);
    if (h > 0) add(panels.G, h, false, sum + general_start());
  }

  // Whether products can be of pairs; by tiles, parameters are split where they are not pairs
  bool takes_pairs() const {
    return has_pairs(x) && has_pairs(P, cut.block_width) && (h == 0 || has_pairs(G, cut.block_width));
  }
  bool takes_tiles() const { return has_pairs(x) && even(cut.block_width); }

  // u [count, k*r + h] of the tokens t0 .. t0+count, by one thread; Rank: Acc, or bf16, to which
  // they are rounded
  int64_t segment_scratch(int64_t count) const {
    return panels_size(run_length()) + 2 * Block<Acc>::size(Product::kRows) + count * sums();
  }
  // next(calls): what will be read then, in so many calls
  template <class Rank, class Next>
  void run_segment(int64_t t0, int64_t count, Rank* u, Acc* scratch, Next&& next) const {
    [[maybe_unused]] typename Product::Scope scope;
    Acc* sum = scratch + panels_size(run_length()) + 2 * Block<Acc>::size(Product::kRows);
    clear_sums(count, sum);
    for (int64_t block = 0; block < k; block++) {
      for (int64_t done = 0; done < cut.per_block; done += run_length()) {
        const int64_t begin = block * cut.per_block + done, chunks = smaller(run_length(), cut.per_block - done);
        const Panels panels = read_panels(begin, chunks, count, scratch);
        Ahead ahead = ahead_of_run(begin + chunks, calls_of_others(chunks, count), next);
        add_run(panels, begin, chunks, t0, count, sum, scratch + panels_size(run_length()), Fetching{ahead});
      }
      finish_chunk((block + 1) * cut.per_block - 1, count, sum, u);
    }
  }

  // Sums of `count` tokens: before the first chunk, and after each. A block's go to u after its
  // last chunk, and start anew.
  void clear_sums(int64_t count, Acc* sum) const {
    for (int64_t i = 0; i < count * sums(); i++) sum[i] = Acc(0);
  }
  template <class Rank>
  void finish_chunk(int64_t chunk, int64_t count, Acc* sum, Rank* u) const {
    if (!cut.ends_block(chunk)) return;
    for (int64_t m = 0; m < count; m++)
      store_block(cut.block(chunk), sum + m * sums(), u + m * (k * r + h),
                  smaller(kRowsAhead, count - 1 - m) * (k * r + h));
    if (chunk + 1 < chunks()) return;
    for (int64_t m = 0; m < count; m++) store_general(sum + m * sums(), u + m * (k * r + h));
  }

  // One row of u, of token m, where several threads summed chunks into partial
  // [chunks][tokens][sums()]
  template <class Rank>
  void reduce(const Acc* partial, int64_t tokens, int64_t m, Acc* sum, Rank* u) const {
    const auto add_chunks = [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
      for (int64_t c = first; c < last; c += kWidth<Acc>) {
        Vec<Acc> total{};
        for (int64_t chunk = begin; chunk < end; chunk++)
          total += load<Acc>(partial + (chunk * tokens + m) * sums() + c);
        store<Acc>(sum + c, total);
      }
    };
    for (int64_t n = 0; n < k; n++) {
      add_chunks(n * cut.per_block, (n + 1) * cut.per_block, 0, general_start());
      store_block(n, sum, u, 0);
    }
    add_chunks(0, chunks(), general_start(), sums());
    store_general(sum, u);
  }

 private:
  // How often add_rows calls others(p) for `chunks` chunks of `count` tokens
  int64_t calls_of_others(int64_t chunks, int64_t count) const {
    const int64_t groups = ceil_div(count, Product::kRows), tiles = ceil_div(r, kTile<Acc>) - 1;
    return groups * tiles * chunks * ceil_div(cut.columns / kTerms, kSteps);
  }
  // Of the run of chunks that begins at `begin`, or next(calls) after the last one
  template <class Next>
  Ahead ahead_of_run(int64_t begin, int64_t calls, Next&& next) const {
    if (!kFetchesMore || calls == 0) return {};
    if (begin == chunks()) return next(calls);
    const int64_t first = cut.first(begin), rows = smaller(run_length() * cut.columns, cut.block_width - first);
    return Ahead::of(P, cut.block(begin), first, rows, 0, r, calls);
  }

  // Adds the part of `chunks` chunks of one block, from `begin` on, to the sums of `count` tokens.
  template <class Others>
  void add_run(const Panels& panels, int64_t begin, int64_t chunks, int64_t t0, int64_t count, Acc* sum, Acc* scratch,
               Others&& others) const {
    const bool ahead = copied_ahead();
    // Twelve lines at once held up Zen 4's products; Intel's were slower by parts.
    const bool in_parts = l1_ways() < kMaxRows;
    constexpr int most = Product::kRows;
    Block<Acc> now(scratch, most), next(scratch + Block<Acc>::size(most), most);
    for_dtype_of<Product, Acc>(x.dtype, [&](auto* type) {
      using X = std::conditional_t<kTerms == 2, Acc, std::remove_pointer_t<decltype(type)>>;  // pairs: as floats
      const auto rows_of = [&](int64_t t, int64_t chunk) {
        if constexpr (kTerms == 2)
          return pairs_in_place(x, t, cut.column(chunk));
        else
          return in_place<X>(x, t, cut.column(chunk));
      };
      if (ahead) {
        const Source<X> from = rows_of(t0, begin);
        const int64_t steps = cut.length(begin) / kTerms;
        for (int64_t p = 0; p < steps; p += kSteps)
          copy_columns(from.data, from.ld, smaller(most, count), p, steps, now.rows);
      }
      for_groups<Product>(count, [&](auto group, int64_t m) {
        for (int64_t i = 0; i < chunks; i++) {
          const int64_t length = cut.length(begin + i), column = cut.column(begin + i);
          const Source<Acc> a =
              ahead ? Source<Acc>{now.rows, kRow<Acc>} : left_rows(t0 + m, group.count(), column, length, now);
          const bool same_rows = i + 1 < chunks;  // what comes next: a chunk of the same rows, or other rows
          const int64_t chunk = same_rows ? begin + i + 1 : begin, row = same_rows ? m : m + group.count();
          const Prefetch prefetch =
              ahead         ? Prefetch::of(x, m + group.count() < count ? t0 + m + group.count() : -1, column)
              : row < count ? Prefetch::of(x, t0 + row, cut.column(chunk))
                            : Prefetch{};
          const int64_t rows = !ahead ? 0 : same_rows ? group.count() : smaller(most, count - row);
          const int64_t next_steps = cut.length(chunk) / kTerms;
          const Source<X> from = rows > 0 ? rows_of(t0 + row, chunk) : Source<X>{};
          const auto copy = [=, to = next.rows](int64_t p) {
            copy_columns(from.data, from.ld, rows, p, next_steps, to);
          };
          const auto each = [=, fetched = RowsAhead(group, prefetch, 0), to = next.rows](int64_t p, int part) mutable {
            fetched.fetch(part);
            if (in_parts)
              copy_part<most>(from, rows, part, p, next_steps, to);
            else if (part == 0)
              copy(p);
          };
          add_rows(group, panels, i * cut.columns, length, a, true, sum + m * sums(), each, others);
          for (int64_t p = round_up(length / kTerms, kSteps); p < next_steps; p += kSteps) copy(p);
          const Block<Acc> last = now;
          now = next, next = last;
        }
      });
    });
  }

  // A function of its own, as in Expand.
  template <int MR, int NV, class Each>
  __attribute__((noinline)) void tile(Int<MR>, Int<NV>, int64_t steps, const Source<Acc>& a, const Source<Acc>& b,
                                      bool accumulate, Acc* to, Each&& each) const {
    Vec<Acc> acc[MR][NV] = {};
    multiply_rows<Product>(steps, a.data, a.ld, b.data, b.ld, acc, each);
    const int64_t ld = sums();  // GCC would compute it again after each store
    for_accumulators<MR, NV>([&](int m, int v) {
      Acc* at = to + m * ld + v * kWidth<Acc>;
      store<Acc>(at, accumulate ? load<Acc>(at) + acc[m][v] : acc[m][v]);
    });
  }
  template <int MR, bool all, int NV, class Each>
  __attribute__((noinline)) void tile(UpTo<MR, all> rows, Int<NV>, int64_t steps, const Source<Acc>& a,
                                      const Source<Acc>& b, bool accumulate, Acc* to, Each&& each) const {
    typename Product::Sums chunk(rows.count(), NV * kWidth<Acc>);
    chunk.add(steps, a, b, each);
    if (!accumulate) return chunk.store(to, sums());
    alignas(64) Acc sum[MR][kTile<Acc>];
    chunk.store(sum[0], kTile<Acc>);
    for (int m = 0; m < rows.count(); m++)
      for (int v = 0; v < NV * kWidth<Acc>; v += kWidth<Acc>)
        store<Acc>(to + m * sums() + v, load<Acc>(to + m * sums() + v) + load<Acc>(sum[m] + v));
  }

  // One row of u; the sums of the block are cleared for the next one. u + ahead is a row that will
  // be written soon: each of its k parts is a cache line far from the others, and stores alone
  // would wait for one after the other.
  template <class Rank>
  void store_block(int64_t n, Acc* sum, Rank* u, int64_t ahead) const {
    constexpr int64_t W = kWidth<Acc>;
    const int64_t rb = r / k;
    if (rb % W == 0) {
      for (int64_t j = 0; j < k; j++) __builtin_prefetch(u + ahead + j * r + n * rb, 1);
      for (int64_t j = 0; j < k; j++)
        for (int64_t q = 0; q < rb; q += W, sum += W) {
          store<Acc>(u + j * r + n * rb + q, scale * load<Acc>(sum));
          store<Acc>(sum, Vec<Acc>{});
        }
      return;
    }
    Rank* scaled = reinterpret_cast<Rank*>(sum);  // in their place: a Rank is never wider than a sum
    for (int64_t c = 0; c < r; c += W) store<Acc>(scaled + c, scale * load<Acc>(sum + c));
    switch (rb) {
      case 1: exchange<1>(n, scaled, u); break;
      case 2: exchange<2>(n, scaled, u); break;
      case 4: exchange<4>(n, scaled, u); break;
      case 8: exchange<8>(n, scaled, u); break;
      default:
        for (int64_t j = 0; j < k; j++)
          for (int64_t q = 0; q < rb; q++) u[j * r + n * rb + q] = scaled[j * rb + q];
    }
    for (int64_t c = 0; c < r; c += W) store<Acc>(sum + c, Vec<Acc>{});
  }

  template <int rb, class Rank>
  void exchange(int64_t n, const Rank* scaled, Rank* u) const {
    for (int64_t j = 0; j < k; j++) memcpy(u + j * r + n * rb, scaled + j * rb, rb * sizeof(Rank));
  }

  template <class Rank>
  void store_general(const Acc* sum, Rank* u) const {
    for (int64_t c = 0; c < h; c += kWidth<Acc>)
      store_some<Acc>(u + k * r + c, scale * load<Acc>(sum + general_start() + c), h - c);
  }
};

// x to U, from the params of forward or backward. Pairs lack the factor 1/(1-p) of dropout: it is
// that of the sums.
template <class Acc, class Product, class Params>
Project<Acc, Product> project_x(const Params& p) {
  const Shape& s = p.shape;
  const Mask mask(p.dropout);
  const Param G = blocks_of_rows(transposed(p.adapter.A_general), s.N / s.k);
  return {s.N, s.k, s.r, s.h, p.x, mask, p.adapter.A, G, Acc(Product::kTerms == 2 ? mask.keep_scale : 1.0)};
}

// g to dH
template <class Acc, class Product>
Project<Acc, Product> project_g(const BackwardParams& p) {
  const Shape& s = p.shape;
  const Param G = blocks_of_rows(p.adapter.B_general, s.M / s.k);
  return {s.M, s.k, s.r, s.h, p.grad_y, Mask(Dropout{}), transposed(p.adapter.B), G, Acc(p.scaling)};
}

}  // namespace gralora::cpu::GRALORA_ISA
