// SPDX-License-Identifier: Apache-2.0
// The two products by AMX: of bfloat16 with bfloat16 (Latent is bf16), and of bfloat16 activations
// with parameters of other dtypes and latents in float, both of which are split into pieces
// (Latent is float).
#pragma once

#include "amx.h"
#include "split_bf16.h"

namespace gralora::cpu::GRALORA_ISA {

#if defined(__AVX512F__) && defined(GRALORA_HAVE_AMX)

template <class LatentType>
struct Amx : PairedRows<int(kSteps)> {
  using Latent = LatentType;
  using Scope = AmxScope;
  static constexpr int kRows = 32;
  static constexpr bool kSplits = sizeof(Latent) == sizeof(float);

  template <class Group, int NV>
  using Sums = AmxSums<NV>;
  template <class F>
  static void for_row_groups(int64_t rows, F&& f) {
    for (int64_t m = 0; m < rows; m += kRows) f(AtMost<kRows>{int(smaller(kRows, rows - m))}, m);
  }
  template <class Group>
  static Source<float> left(Group, const Source<float>& rows) {
    return rows;
  }

  static int64_t panel_size(DType dtype, int64_t rows, int64_t columns) {
    return pieces_of(dtype) * GRALORA_ISA::panel_size<float>(steps(rows), columns);
  }
  static Panel<float> read_panel(Packing packing, const BlockOf& block, int pieces, float* scratch) {
    if (packing == Packing::Paired) return pack_pairs(block, int(kSteps), scratch);
    return pack_pieces(block, int(smaller(pieces_of(block.param.dtype), pieces)), scratch);
  }

  // For each token a row of pairs for each piece: the latents of the block, then the general ones.
  // Two pieces suffice for y and dx, which are rounded to bf16.
  static constexpr int kPieces = kSplits ? 2 : 1;
  static int64_t latents_size(const Shape& s, int64_t tokens) { return tokens * kPieces * (steps(s.r) + steps(s.h)); }
  static Latents<float> read_latents(const Shape& s, const Latent* u, int64_t block, int64_t tokens, float* to) {
    const int64_t general = steps(s.r), piece = general + steps(s.h), token = kPieces * piece;
    for (int64_t m = 0; m < tokens; m++, u += s.k * s.r + s.h) {
      split_row(u + block * s.r, s.r, kPieces, to + m * token, piece);
      split_row(u + s.k * s.r, s.h, kPieces, to + m * token + general, piece);
    }
    return {{to, token, piece, kPieces}, {to + general, token, piece, kPieces}};
  }

  // Packs latents with a row for each rank, since AMX takes the left factor by rows. Element t of
  // that row is the pair of tokens 2t, 2t + 1: to[(c*pieces + piece)*steps(tokens) + t].
  static constexpr int kPackedPieces = kSplits ? kMostPieces : 1;
  static int64_t packed_latents_size(int64_t ranks, int64_t tokens) { return ranks * kPackedPieces * steps(tokens); }
  static void pack_latents(const Latent* v, int64_t ld, int64_t ranks, int64_t tokens, float* to) {
    for (int64_t c = 0; c < ranks; c += kWidth<float>)
      for (int64_t t = 0; t < steps(tokens); t += kSteps)
        split_transposed(v + 2 * t * ld + c, ld, tokens - 2 * t, smaller(kWidth<float>, ranks - c), kPackedPieces,
                         to + c * kPackedPieces * steps(tokens) + t, steps(tokens));
  }
  template <class Group>
  static Source<float> packed(Group, const float* latents, int64_t tokens, int64_t c, int64_t first) {
    const int64_t ld = kPackedPieces * steps(tokens);
    return {latents + c * ld + first / 2, ld, steps(tokens), kPackedPieces};
  }
};

#endif

}  // namespace gralora::cpu::GRALORA_ISA
