// SPDX-License-Identifier: Apache-2.0
// project: from a wide activation to a latent one, with the block exchange in the store.
//
//   u[t, j*r + n*rb + q] = scale * sum_i x'[t, n*w + i] * P[n][i, j*rb + q]    n, j = 0 .. k-1
//   u[t, k*r + c]        = scale * sum_i x'[t, i] * G[i, c]                    c = 0 .. h-1
//
// w = width/k. In forward, x with A and Ag^T gives U, and scale is 1. In backward, g with B^T and
// Bg gives dH, since the exchange is its own inverse, and scale is the adapter's scaling. x' is x
// after dropout. Where the product is of pairs, x' lacks the factor 1/(1-p), and scale is that
// factor.
//
// Each chunk of columns is summed by itself, then the chunks are added in their order: the result
// depends neither on the segment nor on the thread, and long sums lose fewer digits. The sums of a
// token are a row of sums_row() elements: the r latents of the block that is summed now, then the
// h general ones.
#pragma once

#include "product_fp32.h"

namespace gralora::cpu::GRALORA_ISA {

// Chunks that one thread takes, and the place of their sums. Where they are whole blocks, the
// thread finishes them: it adds their chunks and stores the latents. Otherwise it is a single
// chunk, and its sums are added to those of other threads later.
template <class Acc>
struct ChunkRange {
  int64_t begin, end;
  Acc* sums;
  bool finishes;
};

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

  int64_t row() const { return s.k * s.r + s.h; }  // elements of a row of u
  int64_t general_start() const { return round_up(s.r, kWidth<Acc>); }
  int64_t sums_row() const { return general_start() + round_up(s.h, kWidth<Acc>); }

  struct Panels {
    Panel<Acc> P, G;
  };
  int64_t panels_size() const {
    return Product::panel_size(P.dtype, chunks.columns, s.r) + Product::panel_size(G.dtype, chunks.columns, s.h);
  }
  Panels read_panels(int64_t chunk, Acc* scratch) const {
    constexpr int kPieces = 3;  // all pieces of a float, since u may stay a float
    const int64_t b = chunks.block(chunk), first = chunks.first(chunk), rows = chunks.length(chunk);
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

  // The sums of `tokens` tokens over one chunk are written to `sum`, or added to it.
  int64_t chunk_scratch() const { return panels_size() + RowBuffer<Acc>::size(Product::kRows); }
  void run_chunk(int64_t chunk, int64_t t0, int64_t tokens, bool accumulate, Acc* sum, Acc* scratch) const {
    [[maybe_unused]] typename Product::Scope scope;
    const Panels panels = read_panels(chunk, scratch);
    Product::for_row_groups(tokens, [&](auto group, int64_t m) {
      const Part p = part(chunk, t0 + m, group.count());
      const Source<Acc> left = Product::left_rows(reading, p, {scratch + panels_size(), Product::kRows});
      const int64_t next = m + group.count();
      add_group(group, panels, steps(p), left, accumulate, sum + m * sums_row(),
                NextRows(group, x, next < tokens ? t0 + next : -1, p.column, p.columns, steps(p)));
    });
  }

  // The same for rows that were read before: those of part p, as `left`.
  void add_rows(const Panels& panels, const Part& p, const Source<Acc>& left, bool accumulate, Acc* sum) const {
    Product::for_row_groups(p.tokens, [&](auto group, int64_t m) {
      const int64_t next = m + group.count();
      add_group(group, panels, steps(p), left.from_row(m), accumulate, sum + m * sums_row(),
                NextRows(group, x, next < p.tokens ? p.t0 + next : -1, p.column, p.columns, steps(p)));
    });
  }

  void run_chunks(const ChunkRange<Acc>& range, int64_t t0, int64_t tokens, Latent* u, Acc* scratch) const {
    for_chunks(range, tokens, u,
               [&](int64_t chunk, bool) { run_chunk(chunk, t0, tokens, range.finishes, range.sums, scratch); });
  }

  // Calls f(chunk, whether a block begins) for the chunks of a range. Where the range is finished,
  // the sums are zeros before the first chunk; after the last chunk of a block they are stored to
  // u and are zeros again. u is null where it is not wanted.
  template <class F>
  void for_chunks(const ChunkRange<Acc>& range, int64_t tokens, Latent* u, F&& f) const {
    const bool finishes = range.finishes && u != nullptr;
    for (int64_t i = 0; finishes && i < tokens * sums_row(); i++) range.sums[i] = Acc(0);
    for (int64_t chunk = range.begin; chunk < range.end; chunk++) {
      f(chunk, chunk == range.begin || chunks.first(chunk) == 0);
      if (finishes) finish_chunk(chunk, tokens, range.sums, u);
    }
  }

  // Computes row m of u where each chunk was summed apart: partial[chunk][token][sums_row()].
  // `sum` is scratch for one row of sums.
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
  void finish_chunk(int64_t chunk, int64_t tokens, Acc* sum, Latent* u) const {
    if (!chunks.ends_block(chunk)) return;
    for (int64_t m = 0; m < tokens; m++) store_block(chunks.block(chunk), sum + m * sums_row(), u + m * row());
    if (chunk + 1 < chunks.count) return;
    for (int64_t m = 0; m < tokens; m++) store_general(sum + m * sums_row(), u + m * row());
  }

  // The sums of a group of tokens. Software prefetch is done beside the first micro-tile only.
  template <class Group, class Beside>
  void add_group(Group group, const Panels& panels, int64_t steps, const Source<Acc>& left, bool accumulate, Acc* sum,
                 const Beside& beside) const {
    for_column_groups<Acc>(s.r, [&](auto nv, int64_t c) {
      if (c == 0)
        micro_tile(group, nv, steps, left, panels.P.from(0, c), accumulate, sum + c, beside);
      else
        micro_tile(group, nv, steps, left, panels.P.from(0, c), accumulate, sum + c, Nothing{});
    });
    if (s.h == 0) return;
    for_column_groups<Acc>(s.h, [&](auto nv, int64_t c) {
      micro_tile(group, nv, steps, left, panels.G.from(0, c), accumulate, sum + general_start() + c, Nothing{});
    });
  }

  // Not inlined, since GCC would then hold part of the sums in memory.
  template <class Group, int NV, class Beside>
  __attribute__((noinline)) void micro_tile(Group group, Int<NV>, int64_t steps, const Source<Acc>& a,
                                            const Source<Acc>& b, bool accumulate, Acc* to,
                                            const Beside& beside) const {
    typename Product::template Sums<Group, NV> sums(group);
    sums.add(steps, Product::left(group, a), b, beside);
    sums.store_to(to, sums_row(), accumulate);
  }

  // Stores the latents of one token and block, exchanged, and sets their sums to zero.
  void store_block(int64_t n, Acc* sum, Latent* u) const {
    constexpr int64_t W = kWidth<Acc>;
    const int64_t r = s.r, rb = s.r / s.k;
    // Over the sums: a Latent is never wider than a sum
    Latent* scaled = reinterpret_cast<Latent*>(sum);
    for (int64_t c = 0; c < r; c += W) store<Acc>(scaled + c, scale * load<Acc>(sum + c));
    const auto copy = [&](auto size) {
      for (int64_t j = 0; j < s.k; j++)
        memcpy(u + j * r + n * rb, scaled + j * rb, size_t(size.count()) * sizeof(Latent));
    };
    switch (rb) {  // GCC copies in registers where it knows the size
      case 1: copy(Int<1>{}); break;
      case 2: copy(Int<2>{}); break;
      case 4: copy(Int<4>{}); break;
      case 8: copy(Int<8>{}); break;
      case 16: copy(Int<16>{}); break;
      default: copy(AtMost<1 << 30>{int(rb)});
    }
    for (int64_t c = 0; c < r; c += W) store<Acc>(sum + c, Vec<Acc>{});
  }

  void store_general(const Acc* sum, Latent* u) const {
    for (int64_t c = 0; c < s.h; c += kWidth<Acc>)
      store_some<Acc>(u + s.k * s.r + c, scale * load<Acc>(sum + general_start() + c), s.h - c);
  }
};

// From x to U, with the params and the plan of forward, or of a backward that makes U again. Pairs
// lack the factor 1/(1-p) of dropout, so the sums are multiplied by it.
template <class Product, class Params>
Project<Product> project_x(const Params& p, Packing A, Packing A_general, Reading x, const Chunks& chunks) {
  const Shape& s = p.shape;
  const Mask mask(p.dropout);
  const Param G = blocks_of_rows(transposed(p.adapter.A_general), s.N / s.k);
  const double scale = Product::kTerms == 2 ? mask.keep_scale : 1.0;
  return {s, s.N, p.x, mask, x, p.adapter.A, G, A, A_general, typename Product::Acc(scale), chunks};
}

// From g to dH
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
