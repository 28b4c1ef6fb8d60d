// What becomes of the sums of weight gradients: segments of tokens are added in their order, then the gradients are written.
#pragma once

#include "project.h"
#include "weight_gradient.h"

namespace gralora::cpu::GRALORA_ISA {

// The sums of a weight gradient and its general part, chunk by chunk: a total, and a slot for each further segment of a
// wave. Where there is one segment only, a chunk's sums are written out at once and need no place here.
template <class Acc>
struct Totals {
  const Chunks& cut;
  int64_t r, h, chunks;
  Param block, general;  // the gradients; data == nullptr: not wanted
  Acc scale;
  Acc* sums = nullptr;

  bool wanted() const { return block.data != nullptr || general.data != nullptr; }
  void reserve(Scratch& scratch, int64_t slots) {
    if (wanted()) sums = scratch.take<Acc>((slots + 1) * chunks * (r + h) * kChunk);
  }
  Acc* total(int64_t chunk) const { return sums + chunk * (r + h) * kChunk; }
  // Where a segment's sums go: the first one of all straight to the total
  Acc* slot(bool first, int64_t segment, int64_t chunk) const {
    return first && segment == 0 ? total(chunk) : sums + ((segment + 1) * chunks + chunk) * (r + h) * kChunk;
  }
  // Adds a wave's segments to the total in their order; after the last wave writes the gradients.
  void finish(bool first, bool last, int64_t segments, int64_t chunk) const {
    Acc* to = total(chunk);
    for (int64_t s = first ? 1 : 0; s < segments; s++) {
      const Acc* from = slot(first, s, chunk);
      for (int64_t c = 0; c < r + h; c++)
        for (int64_t o = 0; o < cut.length(chunk); o++) to[c * kChunk + o] += from[c * kChunk + o];
    }
    if (first && segments == 0)  // no tokens
      for (int64_t o = 0; o < (r + h) * kChunk; o++) to[o] = Acc(0);
    if (last) write(chunk, to);
  }
  void write(int64_t chunk, const Acc* from) const {
    const int64_t b = cut.block(chunk), i = cut.first(chunk), columns = cut.length(chunk);
    if (block.data != nullptr) WeightGradient<Acc>::write(block, b, i, r, columns, scale, from);
    if (general.data != nullptr) WeightGradient<Acc>::write(general, b, i, h, columns, scale, from + r * kChunk);
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
