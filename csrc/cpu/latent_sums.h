// SPDX-License-Identifier: Apache-2.0
// The places where the chunks of latents are summed. A thread that takes whole segments or whole
// blocks sums their chunks in one place, one after the other. Otherwise each chunk has a place,
// and they are added when all of them are there. Both give the same bits.
#pragma once

#include "project.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Product>
struct LatentSums {
  using Acc = typename Product::Acc;
  using Latent = typename Product::Latent;

  int threads;
  bool whole;             // items are whole segments or blocks: there is one place for each thread
  int64_t segment, wave;  // tokens of a segment, and tokens whose sums one chunk has a place for
  int64_t row;            // elements of the sums of a token
  Acc* sums;

  template <class Plan>
  LatentSums(const Plan& plan, int64_t wave, int64_t most_chunks, int64_t row, Scratch& scratch)
      : threads(plan.threads),
        whole(plan.schedule == Schedule::ByTokens || plan.whole_blocks),
        segment(plan.segment),
        wave(whole ? plan.segment : wave),
        row(row),
        sums(scratch.take<Acc>((whole ? threads : most_chunks) * this->wave * row)) {}

  // By tokens: all chunks, summed by one thread
  ChunkRange<Acc> all(const Chunks& chunks, int thread) const {
    return {0, chunks.count, sums + thread * segment * row, true};
  }

  // By columns: calls f(segment, range of chunks, thread) in parallel, for each block or chunk of
  // each segment.
  template <class F>
  void share(const Chunks& chunks, int64_t segments, F&& f) const {
    const int64_t together = whole ? chunks.per_block : 1, items = chunks.count / together;
    parallel_items(segments * items, threads, [&](int64_t item, int thread) {
      const int64_t index = item / items, begin = item % items * together;
      const int64_t place = whole ? thread * segment : begin * wave + index * segment;
      f(index, ChunkRange<Acc>{begin, begin + together, sums + place * row, whole}, thread);
    });
  }

  // After share(): computes u of `tokens` tokens, unless their chunks were summed in one place.
  void reduce(const Project<Product>& project, int64_t tokens, Latent* u, const PerThread<Acc>& scratch) const {
    if (whole) return;
    parallel_items(tokens, tokens < 16 ? 1 : threads, [&](int64_t m, int thread) {
      project.reduce(sums, wave, m, scratch.of(thread), u + m * project.row());
    });
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
