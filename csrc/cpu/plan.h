// SPDX-License-Identifier: Apache-2.0
// How a pass is carried out: every choice that the kernels follow, made once, before the first
// product, from the parameters of the pass and the machine. A plan is a plain struct: it can be
// printed (`gralora-ext info --explain`), compared, and made for another machine than this one.
//
// Words, as in BLIS:
//   micro-kernel  multiplies MR rows of the left factor by NR columns of the right one, in registers
//   chunk (KC)    columns of x or g that are summed together; chunks are then added in their order
//   strip (NC)    columns of a block of the output that are made together
//   segment (MC)  tokens that share the packed parameters
//   panel         a packed part of a parameter: a chunk's, or a strip's
// A latent activation has a token's ranks as its columns, k*r + h of them: U in forward, dH in
// backward.
#pragma once

#include "../gralora.h"
#include "machine.h"

namespace gralora::cpu {

// How numbers are multiplied. Sums are taken in float, or in double with Float64.
enum class Product : int8_t {
  Float32,    // both factors as float
  Float64,    // both as double: for gradient checks, by the portable kernels
  Bf16Pairs,  // both are bfloat16: AVX512-BF16 multiplies two terms of a sum in one step
  Bf16Amx,    // both are bfloat16: AMX
  SplitAmx,   // activations are bfloat16; parameters and latents are split into bfloat16 pieces: AMX
};

// How threads share a pass.
enum class Schedule : int8_t {
  FewTokens,  // kernels of their own, which read the parameters where they lie
  ByTokens,   // a thread takes its tokens through the whole pass
  ByColumns,  // threads share the columns of the same tokens
};

// How rows of an activation become a factor of the micro-kernel.
enum class Reading : int8_t {
  InPlace,  // as they lie
  Copied,   // copied into L1 first, as numbers of the product
  Dropped,  // the same, with dropout
};

// How a block of a parameter becomes the right factor of the micro-kernel.
enum class Packing : int8_t {
  Absent,   // there is no such parameter
  InPlace,  // as it lies
  Packed,   // copied into a panel first, as numbers of the accumulation type
  Paired,   // as pairs of bfloat16: two rows, interleaved
  Split,    // as pairs of bfloat16 pieces
};

// The columns of an activation of k blocks, cut into chunks. Chunks do not cross blocks; they are of
// nearly equal size.
struct Chunks {
  int64_t block_width = 0;  // columns of a block
  int64_t columns = 1;      // of a chunk, but the last one of a block may have fewer
  int64_t per_block = 0, count = 0;

  int64_t block(int64_t chunk) const { return chunk / per_block; }
  int64_t first(int64_t chunk) const { return chunk % per_block * columns; }  // within the block
  int64_t column(int64_t chunk) const { return block(chunk) * block_width + first(chunk); }
  int64_t length(int64_t chunk) const { return ends_block(chunk) ? block_width - first(chunk) : columns; }
  bool ends_block(int64_t chunk) const { return chunk % per_block == per_block - 1; }
};

struct ForwardPlan {
  Product product = Product::Float32;
  Schedule schedule = Schedule::FewTokens;
  int threads = 1;
  Reading x = Reading::InPlace;
  Packing A = Packing::InPlace, B = Packing::InPlace;
  Packing A_general = Packing::Absent, B_general = Packing::Absent;
  Chunks chunks;                 // of x
  int64_t segment = 0;           // tokens
  int64_t strip = 0;             // columns of a block of y
  int64_t blocks_per_strip = 1;  // narrow blocks are written together, in longer runs along y
  bool whole_blocks = false;     // by columns: a thread takes all chunks of a block of x, and sums them itself
};

struct BackwardPlan {
  Product product = Product::Float32;
  Schedule schedule = Schedule::FewTokens;
  int threads = 1;
  Reading g = Reading::InPlace, x = Reading::InPlace;
  Packing A = Packing::InPlace, B = Packing::InPlace;  // for dx, for dH
  Packing A_general = Packing::Absent, B_general = Packing::Absent;
  Packing A_for_U = Packing::Absent, A_general_for_U = Packing::Absent;
  bool remakes_U = false;  // forward did not keep it
  Chunks chunks_of_g, chunks_of_x;
  int64_t segment = 0, segments = 0;  // tokens of one, and how many there are; they do not depend on the threads
  int64_t wave = 0;                   // segments that are worked on at a time
  bool whole_blocks = false;          // by columns: as in forward
};

struct MergePlan {
  int threads = 1;
  bool along_N = false;  // W is taken as its transpose, whose columns lie side by side
  int64_t rows = 0;      // of W that share a panel
  int64_t strip = 0;     // columns of a block of W
  Packing left = Packing::InPlace, right = Packing::InPlace;
  Packing left_general = Packing::Absent, right_general = Packing::Absent;
};

struct LinearPlan {
  int threads = 1;
  Reading in = Reading::InPlace;
  Packing left = Packing::InPlace, left_general = Packing::Absent;  // of the factors of dW
  Chunks chunks;                                                    // of `in`
  int64_t chunks_per_panel = 1;                                     // of W + dW
  int64_t strip = 0, segment = 0;
  int64_t tokens_together = 0;  // that walk along `in` and share a chunk of the panel in L1
};

ForwardPlan plan(const ForwardParams& p, const Machine& machine);
BackwardPlan plan(const BackwardParams& p, const Machine& machine);
MergePlan plan(const MergeParams& p, const Machine& machine);
LinearPlan plan(const LinearParams& p, const Machine& machine);

// A frozen layer and its adapter as one operation: from how many tokens on, and whether linear's one
// product with W + dW is then quicker, for float32, than torch's product and the adapter's path.
int64_t tokens_for_one_operation();
bool one_product_is_quicker(const Machine& machine);

const char* name(Product product);
const char* name(Schedule schedule);
const char* name(Reading reading);
const char* name(Packing packing);

// Whether threads that share as many items have much the same to do.
inline bool shared_evenly(int64_t items, int threads) { return items % threads == 0 || items >= 4 * threads; }

}  // namespace gralora::cpu
