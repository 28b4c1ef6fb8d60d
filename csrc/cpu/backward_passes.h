// SPDX-License-Identifier: Apache-2.0
// What backward does with one segment of tokens and some chunks of columns: a pass over g for dH
// and dB, then a pass over x for dA and dx.
#pragma once

#include "expand.h"
#include "gradient_totals.h"
#include "project.h"
#include "weight_gradient.h"

namespace gralora::cpu::GRALORA_ISA {
namespace {  // unnamed, so that GCC knows that there is one caller, and inlines

// A segment of tokens, and their latents
template <class Latent>
struct Segment {
  bool first_wave;
  int64_t index;       // of the segment in its wave
  int64_t t0, tokens;  // the first token, and how many there are
  const Latent* U;
  Latent* dH;  // null where it is not wanted
};

template <class Product>
struct BackwardPasses {
  using Acc = typename Product::Acc;
  using Latent = typename Product::Latent;

  const BackwardParams& p;
  const BackwardPlan& plan;
  const Shape& s = p.shape;
  const Project<Product> from_g = project_g<Product>(p, plan);
  const Project<Product> from_x = project_x<Product>(p, plan.A_for_U, plan.A_general_for_U, plan.x, plan.chunks_of_x);
  const Expand<Product> to_x = expand_x<Product>(p, plan);
  const WeightGradient<Product> gradient{s};
  Totals<Acc> dB{plan.chunks_of_g, s.r, s.h, p.grad.B, transposed(blocks_of_rows(p.grad.B_general, s.M / s.k)),
                 Acc(p.scaling)};
  Totals<Acc> dA{plan.chunks_of_x, s.r, s.h, transposed(p.grad.A), blocks_of_columns(p.grad.A_general, s.N / s.k),
                 from_x.scale};
  const bool want_x = p.grad_x.data != nullptr, want_H = want_x || dA.wanted();
  const int64_t row = s.k * s.r + s.h;  // elements of a row of U or dH

  // The scratch of one thread
  struct Buffers {
    Acc *panels, *packed, *latents, *sums;
    RowBuffer<Acc> rows;  // of a slice of g or x
  };
  const int64_t panels_size = larger(larger(from_g.sums_row(), from_x.chunk_scratch()),
                                     larger(to_x.panels_size(plan.chunks_of_x.columns), from_g.panels_size()));
  const int64_t packed_size = round_up(gradient.packed_size(plan.segment), kWidth<Acc>);
  const int64_t latents_size = Product::latents_size(s, plan.segment);
  const int64_t buffer_rows = Product::steps(smaller(gradient.kTokens, plan.segment));
  const int64_t sums_size = plan.segments == 1 ? (s.r + s.h) * kMostColumns : 0;
  const int64_t buffers_size = panels_size + packed_size + latents_size + sums_size + RowBuffer<Acc>::size(buffer_rows);
  Buffers buffers_at(Acc* scratch) const {
    Acc *packed = scratch + panels_size, *latents = packed + packed_size, *sums = latents + latents_size;
    return {scratch, packed, latents, sums, {sums + sums_size, buffer_rows}};
  }

  // From g to dH and dB
  void pass_g(const Segment<Latent>& g, const ChunkRange<Acc>& range, const Buffers& b) const {
    [[maybe_unused]] typename Product::Scope scope;
    from_g.for_chunks(range, g.tokens, g.dH, [&](int64_t chunk, bool new_block) {
      typename Project<Product>::Panels panels;
      if (want_H) panels = from_g.read_panels(chunk, b.panels);
      if (dB.wanted() && new_block) gradient.pack(g.U, plan.chunks_of_g.block(chunk), g.tokens, b.packed);
      Acc* sums = sums_of(dB, g, chunk, b);
      for_slices(g, [&](int64_t m, int64_t tokens) {
        const Part part = from_g.part(chunk, g.t0 + m, tokens);
        Source<Acc> right{}, left{};
        if (dB.wanted()) right = Product::right_rows(plan.g, part, b.rows), left = Product::left_of(right, part);
        if (!dB.wanted()) left = Product::left_rows(plan.g, part, b.rows);
        if (want_H) from_g.add_rows(panels, part, left, range.finishes, range.sums + m * from_g.sums_row());
        if (dB.wanted()) gradient.add(b.packed, {g.tokens, m, part, -1}, right, m > 0, sums);
      });
      if (dB.wanted() && plan.segments == 1) dB.write(chunk, sums);
    });
  }

  // From x and dH to dA and dx
  void pass_x(const Segment<Latent>& g, const ChunkRange<Acc>& range, const Buffers& b) const {
    [[maybe_unused]] typename Product::Scope scope;
    const Chunks& chunks = plan.chunks_of_x;
    Latents<Acc> latents{};
    for (int64_t chunk = range.begin; chunk < range.end; chunk++) {
      const int64_t block = chunks.block(chunk), first = chunks.first(chunk), columns = chunks.length(chunk);
      typename Expand<Product>::Panels panels;
      if (want_x) panels = to_x.read_panels(block, first, columns, b.panels);
      if (chunk == range.begin || first == 0) {
        if (dA.wanted()) gradient.pack(g.dH, block, g.tokens, b.packed);
        if (want_x) latents = Product::read_latents(s, g.dH, block, g.tokens, b.latents);
      }
      Acc* sums = sums_of(dA, g, chunk, b);
      for_slices(g, [&](int64_t m, int64_t tokens) {
        const Part part = from_x.part(chunk, g.t0 + m, tokens);
        Source<Acc> x{};
        // Dx needs the mask
        if (dA.wanted() || part.mask.on) x = Product::right_rows(plan.x, part, b.rows);
        const int64_t next = m + tokens < g.tokens ? g.t0 + m + tokens : -1;
        if (dA.wanted()) gradient.add(b.packed, {g.tokens, m, part, next}, x, m > 0, sums);
        if (want_x) expand_rows({panels, block, first, columns}, g, m, tokens, latents, b);
      });
      if (dA.wanted() && plan.segments == 1) dA.write(chunk, sums);
    }
  }

 private:
  template <class F>
  void for_slices(const Segment<Latent>& g, F&& f) const {
    for (int64_t m = 0; m < g.tokens; m += gradient.kTokens) f(m, smaller(gradient.kTokens, g.tokens - m));
  }

  Acc* sums_of(const Totals<Acc>& totals, const Segment<Latent>& g, int64_t chunk, const Buffers& b) const {
    return plan.segments == 1 ? b.sums : totals.slot(g.first_wave, g.index, chunk);
  }

  // dx of a slice that begins with token m0 of the segment
  void expand_rows(const typename Expand<Product>::Strip& strip, const Segment<Latent>& g, int64_t m0, int64_t tokens,
                   const Latents<Acc>& latents, const Buffers& b) const {
    Product::for_dtype(p.grad_x.dtype, [&](auto* type) {
      using X = std::remove_pointer_t<decltype(type)>;
      Product::for_row_groups(tokens, [&](auto group, int64_t m) {
        const int64_t t = m0 + m, next = t + group.count();
        to_x.template run_rows<X>(group, strip, g.t0 + t, latents.from_token(t), b.rows.mask + m * kMaskRow,
                                  next < g.tokens ? g.t0 + next : -1);
      });
    });
  }
};

}  // namespace
}  // namespace gralora::cpu::GRALORA_ISA
