// SPDX-License-Identifier: Apache-2.0
// project: from a wide activation to a latent one, with the block exchange in the store.
//
//   u[t, j*r + n*rb + q] = s * sum_i x'[t, n*w + i] * P[n][i, j*rb + q]      n, j = 0 .. k-1;  w = width/k
//   u[t, k*r + c]        = s * sum_i x'[t, i] * G[i, c]                      c = 0 .. h-1
//
// x' is x after dropout; where the product is of pairs it lacks the factor 1/(1-p), which is in s.
// Forward: x, A, Ag^T give U. Backward: g, B^T, Bg give dH, since the exchange is its own inverse.
//
// Each chunk of columns is summed by itself, then chunks are added in their order: the result
// depends neither on the segment nor on the thread, and long sums lose less. The sums of a token
// are a row of sums_row() elements: the ranks of the block in turn, then the general ones.
#pragma once

#include "product_fp32.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Product>
struct Project {
  using Acc = typename Product::Acc;
  using Latent = typename Product::Latent;

  const Shape& s;
  int64_t width;
  const Activation& x;
  Mask mask;
  Reading reading;
  Param P, G;  // [k, w, r] and [k, w, h]
  Packing packing, general_packing;
  Acc scale;
  const Chunks& chunks;

  int64_t row() const { return s.k * s.r + s.h; }  // of u
  int64_t general_start() const { return round_up(s.r, kWidth<Acc>); }
  int64_t sums_row() const { return general_start() + round_up(s.h, kWidth<Acc>); }

  struct Panels {
    Panel<Acc> P, G;
  };
  int64_t panels_size(int64_t count) const {
    const int64_t rows = count * chunks.columns;
    return Product::panel_size(P.dtype, rows, s.r) + Product::panel_size(G.dtype, rows, s.h);
  }
  // `count` chunks of one block
  Panels read_panels(int64_t chunk, int64_t count, Acc* scratch) const {
    constexpr int kPieces = 3;  // all of a float's
    const int64_t b = chunks.block(chunk), first = chunks.first(chunk);
    const int64_t rows = smaller(count * chunks.columns, chunks.block_width - first);
    Panels panels{Product::read_panel(packing, {P, b, first, rows, 0, s.r}, kPieces, scratch), {}};
    if (s.h > 0)
      panels.G = Product::read_panel(general_packing, {G, b, first, rows, 0, s.h}, kPieces,
                                     scratch + Product::panel_size(P.dtype, rows, s.r));
    return panels;
  }

  Part part(int64_t chunk, int64_t t, int64_t tokens) const {
    return {x, mask, width, t, tokens, chunks.column(chunk), chunks.length(chunk)};
  }

  static int64_t steps(const Part& p) { return p.columns / Product::kTerms; }

  // u of the tokens t0 .. t0+tokens, by one thread. A panel of some chunks stays in L2 while groups
  // of tokens walk along x, which comes from memory in long runs, a chunk at a time in L1.
  int64_t segment_scratch(int64_t tokens, int64_t chunks_per_panel) const {
    return panels_size(chunks_per_panel) + Block<Acc>::size(Product::kRows) + tokens * sums_row();
  }
  void run_segment(int64_t t0, int64_t tokens, int64_t chunks_per_panel, Latent* u, Acc* scratch) const {
    [[maybe_unused]] typename Product::Scope scope;
    Acc* block = scratch + panels_size(chunks_per_panel);
    Acc* sum = block + Block<Acc>::size(Product::kRows);
    clear_sums(tokens, sum);
    for (int64_t begin = 0; begin < chunks.count;) {
      const int64_t in_block = chunks.per_block - begin % chunks.per_block, count = smaller(chunks_per_panel, in_block);
      const Panels panels = read_panels(begin, count, scratch);
      Product::for_row_groups(tokens, [&](auto group, int64_t m) {
        for (int64_t i = 0; i < count; i++) {
          const Part p = part(begin + i, t0 + m, group.count());
          const Source<Acc> left = Product::left_rows(reading, p, {block, Product::kRows});
          // What comes next is the next chunk of the same tokens, or the first one of the next.
          const bool same_tokens = i + 1 < count;
          const int64_t next = same_tokens ? m : m + group.count();
          const NextRows beside(group, x, next < tokens ? t0 + next : -1,
                                chunks.column(same_tokens ? begin + i + 1 : begin), p.columns, steps(p));
          add_group(group, panels, i * chunks.columns, p.columns, left, true, sum + m * sums_row(), beside);
        }
      });
      begin += count;
      finish_chunk(begin - 1, tokens, sum, u);
    }
  }

  // The part of u that one chunk gives, as sums of `tokens` tokens that are written, or added
  int64_t chunk_scratch() const { return panels_size(1) + Block<Acc>::size(Product::kRows); }
  void run_chunk(int64_t chunk, int64_t t0, int64_t tokens, bool accumulate, Acc* sum, Acc* scratch) const {
    [[maybe_unused]] typename Product::Scope scope;
    const Panels panels = read_panels(chunk, 1, scratch);
    Product::for_row_groups(tokens, [&](auto group, int64_t m) {
      const Part p = part(chunk, t0 + m, group.count());
      const Source<Acc> left = Product::left_rows(reading, p, {scratch + panels_size(1), Product::kRows});
      const int64_t next = m + group.count();
      add_group(group, panels, 0, p.columns, left, accumulate, sum + m * sums_row(),
                NextRows(group, x, next < tokens ? t0 + next : -1, p.column, p.columns, steps(p)));
    });
  }

  // The same for rows that were read already: those of part p
  void add_rows(const Panels& panels, const Part& p, const Source<Acc>& left, bool accumulate, Acc* sum) const {
    Product::for_row_groups(p.tokens, [&](auto group, int64_t m) {
      const int64_t next = m + group.count();
      add_group(group, panels, 0, p.columns, left.from_row(m), accumulate, sum + m * sums_row(),
                NextRows(group, x, next < p.tokens ? p.t0 + next : -1, p.column, p.columns, steps(p)));
    });
  }

  // The sums of `tokens` tokens: zeros before the first chunk; after the last chunk of a block they
  // go to u, and begin anew.
  void clear_sums(int64_t tokens, Acc* sum) const {
    for (int64_t i = 0; i < tokens * sums_row(); i++) sum[i] = Acc(0);
  }
  void finish_chunk(int64_t chunk, int64_t tokens, Acc* sum, Latent* u) const {
    if (!chunks.ends_block(chunk)) return;
    for (int64_t m = 0; m < tokens; m++) store_block(chunks.block(chunk), sum + m * sums_row(), u + m * row());
    if (chunk + 1 < chunks.count) return;
    for (int64_t m = 0; m < tokens; m++) store_general(sum + m * sums_row(), u + m * row());
  }

  // Row m of u, where threads left the sums of each chunk by themselves: partial[chunk][tokens][sums_row()].
  // `sum` is scratch for one row.
  void reduce(const Acc* partial, int64_t tokens, int64_t m, Acc* sum, Latent* u) const {
    const auto add_chunks = [&](int64_t begin, int64_t end, int64_t first, int64_t last) {
      for (int64_t c = first; c < last; c += kWidth<Acc>) {
        Vec<Acc> total{};
        for (int64_t chunk = begin; chunk < end; chunk++)
          total += load<Acc>(partial + (chunk * tokens + m) * sums_row() + c);
        store<Acc>(sum + c, total);
      }
    };
    for (int64_t n = 0; n < s.k; n++) {
      add_chunks(n * chunks.per_block, (n + 1) * chunks.per_block, 0, general_start());
      store_block(n, sum, u);
    }
    add_chunks(0, chunks.count, general_start(), sums_row());
    store_general(sum, u);
  }

 private:
  // The sums of a group of tokens, whose columns `left` begin at row `row` of the panels
  template <class Group, class Beside>
  void add_group(Group group, const Panels& panels, int64_t row, int64_t columns, const Source<Acc>& left,
                 bool accumulate, Acc* sum, const Beside& beside) const {
    const int64_t steps = columns / Product::kTerms, from = row / Product::kTerms;
    for_column_groups<Acc>(s.r, [&](auto nv, int64_t c) {
      if (c == 0)
        micro_tile(group, nv, steps, left, panels.P.from(from, c), accumulate, sum + c, beside);
      else
        micro_tile(group, nv, steps, left, panels.P.from(from, c), accumulate, sum + c, Nothing{});
    });
    if (s.h == 0) return;
    for_column_groups<Acc>(s.h, [&](auto nv, int64_t c) {
      micro_tile(group, nv, steps, left, panels.G.from(from, c), accumulate, sum + general_start() + c, Nothing{});
    });
  }

  // A function of its own: inlined among other code, GCC would keep part of the sums in memory.
  template <class Group, int NV, class Beside>
  __attribute__((noinline)) void micro_tile(Group group, Int<NV>, int64_t steps, const Source<Acc>& a,
                                            const Source<Acc>& b, bool accumulate, Acc* to,
                                            const Beside& beside) const {
    typename Product::template Sums<Group, NV> sums(group);
    sums.add(steps, Product::left(group, a), b, beside);
    sums.store_to(to, sums_row(), accumulate);
  }

  // The ranks of one token and block; their sums begin anew.
  void store_block(int64_t n, Acc* sum, Latent* u) const {
    constexpr int64_t W = kWidth<Acc>;
    const int64_t r = s.r, rb = s.r / s.k;
    Latent* scaled = reinterpret_cast<Latent*>(sum);  // in their place: a Latent is never wider than a sum
    for (int64_t c = 0; c < r; c += W) store<Acc>(scaled + c, scale * load<Acc>(sum + c));
    switch (rb) {  // copies of a size that GCC knows
      case 1: exchange<1>(n, scaled, u); break;
      case 2: exchange<2>(n, scaled, u); break;
      case 4: exchange<4>(n, scaled, u); break;
      case 8: exchange<8>(n, scaled, u); break;
      case 16: exchange<16>(n, scaled, u); break;
      case 32: exchange<32>(n, scaled, u); break;
      default:
        for (int64_t j = 0; j < s.k; j++) memcpy(u + j * r + n * rb, scaled + j * rb, size_t(rb) * sizeof(Latent));
    }
    for (int64_t c = 0; c < r; c += W) store<Acc>(sum + c, Vec<Acc>{});
  }
  template <int rb>
  void exchange(int64_t n, const Latent* scaled, Latent* u) const {
    for (int64_t j = 0; j < s.k; j++) memcpy(u + j * s.r + n * rb, scaled + j * rb, rb * sizeof(Latent));
  }

  void store_general(const Acc* sum, Latent* u) const {
    for (int64_t c = 0; c < s.h; c += kWidth<Acc>)
      store_some<Acc>(u + s.k * s.r + c, scale * load<Acc>(sum + general_start() + c), s.h - c);
  }
};

// x to U, from the params and the plan of forward, or of a backward that makes U again. Pairs lack
// the factor 1/(1-p) of dropout: it is that of the sums.
template <class Product, class Params>
Project<Product> project_x(const Params& p, Packing A, Packing A_general, Reading x, const Chunks& chunks) {
  const Shape& s = p.shape;
  const Mask mask(p.dropout);
  const Param G = blocks_of_rows(transposed(p.adapter.A_general), s.N / s.k);
  const double scale = Product::kTerms == 2 ? mask.keep_scale : 1.0;
  return {s, s.N, p.x, mask, x, p.adapter.A, G, A, A_general, typename Product::Acc(scale), chunks};
}

// g to dH
template <class Product>
Project<Product> project_g(const BackwardParams& p, const BackwardPlan& plan) {
  const Shape& s = p.shape;
  const Param G = blocks_of_rows(p.adapter.B_general, s.M / s.k);
  return {s,
          s.M,
          p.grad_y,
          Mask(Dropout{}),
          plan.g,
          transposed(p.adapter.B),
          G,
          plan.B,
          plan.B_general,
          typename Product::Acc(p.scaling),
          plan.chunks_of_g};
}

}  // namespace gralora::cpu::GRALORA_ISA
