// SPDX-License-Identifier: Apache-2.0
// forward: U = exchange(x' A) and x' Ag^T (project), then y = base + s (U B + x' Ag^T Bg^T)
// (expand), where x' is x after dropout.
//
// By tokens, a thread takes a segment through project and expand, and only u and y leave its
// cache. By columns, the threads share the columns of the same tokens: first blocks or chunks of
// x, then strips of y. Both give the same bits.
#include "expand.h"
#include "forward_few.h"
#include "latent_sums.h"
#include "products.h"

namespace gralora::cpu::GRALORA_ISA {
namespace {

template <class Product>
struct Forward {
  using Acc = typename Product::Acc;
  using Latent = typename Product::Latent;

  const ForwardParams& p;
  const ForwardPlan& plan;
  const Shape& s = p.shape;
  const Project<Product> project = project_x<Product>(p, plan.A, plan.A_general, plan.x, plan.chunks);
  const Expand<Product> expand = expand_y<Product>(p, plan);
  const int64_t row = s.k * s.r + s.h, w = s.M / s.k;  // columns of u; columns of a block of y

  // Where u is bf16 but latents are float, the latents are computed in scratch and rounded to u
  // afterwards.
  const bool rounds_u = p.u_bf16 && sizeof(Latent) > sizeof(bf16);
  const int64_t panels_size = plan.blocks_per_strip * expand.panels_size(plan.strip);
  const int64_t expand_scratch = panels_size + plan.blocks_per_strip * Product::latents_size(s, plan.segment);

  void run() const {
    if (plan.schedule == Schedule::ByTokens)
      run_by_tokens();
    else
      run_by_columns();
  }

  void run_by_tokens() const {
    const int64_t place = rounds_u ? round_up(plan.segment * row, kWidth<Acc>) : 0;
    Scratch scratch;
    const PerThread<Acc> buffers(scratch, plan.threads, place + larger(project.chunk_scratch(), expand_scratch));
    const LatentSums<Product> sums(plan, plan.segment, plan.chunks.count, project.sums_row(), scratch);
    parallel_items(ceil_div(s.T, plan.segment), plan.threads, [&](int64_t item, int thread) {
      const int64_t t0 = item * plan.segment, tokens = smaller(plan.segment, s.T - t0);
      Acc *own = buffers.of(thread), *rest = own + place;
      Latent* u = rounds_u ? reinterpret_cast<Latent*>(own) : static_cast<Latent*>(p.u) + t0 * row;
      project.run_chunks(sums.all(plan.chunks, thread), t0, tokens, u, rest);
      if (rounds_u) round_u(u, t0, tokens);
      for (int64_t j = 0; j < s.k; j += plan.blocks_per_strip)
        for (int64_t first = 0; first < w; first += plan.strip)
          expand_strip(t0, tokens, u, j, smaller(plan.blocks_per_strip, s.k - j), first, rest);
    });
  }

  void run_by_columns() const {
    Scratch scratch;  // for all segments: it must be taken before the first y is written
    const PerThread<Acc> buffers(scratch, plan.threads,
                                 larger(larger(project.chunk_scratch(), project.sums_row()), expand_scratch));
    const LatentSums<Product> sums(plan, plan.segment, plan.chunks.count, project.sums_row(), scratch);
    Latent* place = rounds_u ? scratch.take<Latent>(plan.segment * row) : nullptr;
    const int64_t strips = ceil_div(w, plan.strip);
    for (int64_t t0 = 0; t0 < s.T; t0 += plan.segment) {
      const int64_t tokens = smaller(plan.segment, s.T - t0);
      Latent* u = rounds_u ? place : static_cast<Latent*>(p.u) + t0 * row;
      sums.share(plan.chunks, 1, [&](int64_t, const auto& range, int thread) {
        project.run_chunks(range, t0, tokens, u, buffers.of(thread));
      });
      sums.reduce(project, tokens, u, buffers);
      if (rounds_u) round_u(u, t0, tokens);
      parallel_items(s.k * strips, plan.threads, [&](int64_t item, int thread) {
        expand_strip(t0, tokens, u, item / strips, 1, item % strips * plan.strip, buffers.of(thread));
      });
    }
  }

  // Columns [first, first + strip) of each of the output blocks j .. j+blocks-1
  void expand_strip(int64_t t0, int64_t tokens, const Latent* u, int64_t j, int64_t blocks, int64_t first,
                    Acc* scratch) const {
    [[maybe_unused]] typename Product::Scope scope;
    typename Expand<Product>::Panels panels[kMostBlocks];
    Latents<Acc> latents[kMostBlocks];
    const int64_t columns = smaller(plan.strip, w - first), latents_size = Product::latents_size(s, plan.segment);
    for (int64_t b = 0; b < blocks; b++) {
      panels[b] = expand.read_panels(j + b, first, columns, scratch + b * expand.panels_size(plan.strip));
      latents[b] = Product::read_latents(s, u, j + b, tokens, scratch + panels_size + b * latents_size);
    }
    Product::for_dtype(p.y.dtype, [&](auto* type) {
      using Y = std::remove_pointer_t<decltype(type)>;
      Product::for_row_groups(tokens, [&](auto group, int64_t m) {
        const int64_t next = m + group.count() < tokens ? t0 + m + group.count() : -1;
        for (int64_t b = 0; b < blocks; b++)
          expand.template run_rows<Y>(group, {panels[b], j + b, first, columns}, t0 + m, latents[b].from_token(m),
                                      nullptr, next);
      });
    });
  }

  void round_u(const Latent* u, int64_t t0, int64_t tokens) const {
    if constexpr (sizeof(Latent) > sizeof(bf16)) round_row<Acc>(u, tokens * row, static_cast<bf16*>(p.u) + t0 * row);
  }
};

}  // namespace

void forward(const ForwardParams& p, const ForwardPlan& plan) { run_pass<Forward, ForwardFew>(p, plan); }

}  // namespace gralora::cpu::GRALORA_ISA
