// SPDX-License-Identifier: Apache-2.0
// How a pass is carried out: every choice that the kernels follow, made once, before the first
// product, from the parameters of the pass and the machine. A plan is a plain struct: it can be
// printed (`gralora-ext info --explain`), compared, and made for another machine than this one.
//
// The words of these files, of which those before the gap are BLIS's:
//   micro-kernel  multiplies MR rows of the left factor by NR columns of the right, in registers
//   micro-tile    the MR x NR sums of one call of the micro-kernel
//   group         the rows of a micro-tile: MR of them, or fewer at the end of a loop
//   epilogue      what is done to a micro-tile before it is stored: scaling, dropout, adding base
//   pack          to copy a factor into contiguous memory, in the order in which it is multiplied
//   micro-panel   NR columns of the right factor, packed row by row; a left micro-panel: MR rows
//                 of the left factor, packed column by column
//   panel         a block of a parameter, or a part of it, as a sequence of micro-panels
//   chunk (KC)    columns of a block of x or g that are summed together; chunks are added in order
//   strip (NC)    columns of a block of the output that are computed together
//   segment (MC)  tokens that share packed parameters
//
//   pass          forward, backward, merge or linear; "a pass over g" is one reading of g
//   block         one of the k matrices of a parameter, or its columns of x, g, y or dx
//   latent        an activation of rank width, [T, k*r + h]: U in forward, dH in backward
//   rank          the index of one column of a latent
//   general       of the plain LoRA of rank h beside the blocks
//   slice         tokens whose products are summed in registers, where a sum goes over tokens
//   wave          segments that backward works on at the same time
//   item          what a thread takes at a time from a parallel loop
//   pair          two bfloat16 numbers in the 32 bits of a float, multiplied in one step
//   piece         one of the bfloat16 numbers whose sum is a float (split-bf16)
#pragma once

#include "../gralora.h"
#include "machine.h"

namespace gralora::cpu {

// The thresholds that the kernels use too. All others are where the plans are made.
//
// At most so many tokens have kernels of their own: reading the parameters is then nearly all of
// the work. An adapter with a general part has no such kernels: with them it took 60 % of the
// time, but that saved only 1 % of the time of a layer.
constexpr int64_t kFewTokens = 4;
// KC, the most columns of a chunk: a micro-panel of so many rows fills two thirds of L1, and
// longer sums in float lose more digits.
constexpr int64_t kMostColumns = 256;
// At most so many narrow blocks of y are written together.
constexpr int64_t kMostBlocks = 8;

// How numbers are multiplied. Sums are taken in float, or in double with Float64.
enum class Product : int8_t {
  Float32,    // both factors as float
  Float64,    // both as double, for gradient checks; only the portable kernels have it
  Bf16Pairs,  // both as bfloat16, two terms of a sum in one step of AVX512-BF16
  Bf16Amx,    // both as bfloat16, by AMX
  SplitAmx,   // by AMX: activations as bfloat16, parameters and latents as sums of bfloat16 pieces
};

// How threads share a pass.
enum class Schedule : int8_t {
  FewTokens,  // kernels of their own, which read the parameters in place
  ByTokens,   // each thread takes tokens of its own through the whole pass
  ByColumns,  // all threads work on the same tokens and share their columns
};

// How rows of an activation are read as a factor of the micro-kernel.
enum class Reading : int8_t {
  InPlace,  // from the activation itself; pairs in a sum over tokens from an interleaved copy
  Copied,   // from a copy in L1, converted to the accumulation type
  Dropped,  // from a copy in L1 to which dropout was applied
};

// How a block of a parameter is read as the right factor of the micro-kernel.
enum class Packing : int8_t {
  Absent,   // there is no such parameter
  InPlace,  // from the parameter itself
  Packed,   // from a panel of numbers of the accumulation type
  Paired,   // from a panel of pairs: two rows of bfloat16, interleaved
  Split,    // from a panel of pairs for each bfloat16 piece
};

// The columns of an activation of k blocks, cut into chunks of nearly equal width. A chunk never
// crosses from one block to the next.
struct Chunks {
  int64_t block_width = 0;  // columns of a block
  int64_t columns = 1;      // columns of a chunk; the last one of a block may have fewer
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
  Chunks chunks;        // of x
  int64_t segment = 0;  // tokens of a segment
  int64_t strip = 0;    // columns of a strip of a block of y
  // Narrow blocks are written together: longer contiguous stores along a row of y
  int64_t blocks_per_strip = 1;
  // By columns: an item is all chunks of a block of x, not a single chunk
  bool whole_blocks = false;
};

struct BackwardPlan {
  Product product = Product::Float32;
  Schedule schedule = Schedule::FewTokens;
  int threads = 1;
  Reading g = Reading::InPlace, x = Reading::InPlace;
  Packing A = Packing::InPlace, B = Packing::InPlace;  // A for dx, B for dH
  Packing A_general = Packing::Absent, B_general = Packing::Absent;
  Packing A_for_U = Packing::Absent, A_general_for_U = Packing::Absent;
  bool remakes_U = false;  // U is needed, but forward did not save it
  Chunks chunks_of_g, chunks_of_x;
  // Tokens of a segment, and the number of segments, for any number of threads
  int64_t segment = 0, segments = 0;
  int64_t wave = 0;           // segments of a wave
  bool whole_blocks = false;  // by columns: an item is all chunks of a block of g or x
};

struct MergePlan {
  int threads = 1;
  bool along_N = false;     // W is taken as its transpose, because that one has contiguous rows
  int64_t rows = 0;         // rows of W that share a panel
  int64_t strip = 0;        // columns of a strip of a block of W
  bool prefetches = false;  // the weights of the next micro-tile, beside the arithmetic
  Packing left = Packing::InPlace, right = Packing::InPlace;
  Packing left_general = Packing::Absent, right_general = Packing::Absent;
};

// A merge with codes, tile by tile of W; W is taken as its transpose where along_N.
struct CodedPlan {
  int threads = 1;
  bool along_N = false;
  int64_t rows = 0, columns = 0;        // of a tile
  const MergePlan* adapters = nullptr;  // of each adapter, within a tile
};

struct LinearPlan {
  int threads = 1;
  Reading in = Reading::InPlace;
  Packing left = Packing::InPlace, left_general = Packing::Absent;  // the left factors of dW
  Chunks chunks;                                                    // of `in`
  // Chunks of W + dW that are in L2 together
  int64_t chunks_per_panel = 1;
  // Columns of a strip, tokens of a segment
  int64_t strip = 0, segment = 0;
  int64_t tokens_together = 0;  // tokens that are multiplied by one chunk while it is in L1
};

ForwardPlan plan(const ForwardParams& p, const Machine& machine);
BackwardPlan plan(const BackwardParams& p, const Machine& machine);
MergePlan plan(const MergeParams& p, const Machine& machine);
LinearPlan plan(const LinearParams& p, const Machine& machine);
CodedPlan plan(const CodedParams& p, const Machine& machine);  // but for `adapters`, which are these:
MergePlan plan_in_tile(const CodedParams& p, const MergedAdapter& adapter, const CodedPlan& tile,
                       const Machine& machine);

// A frozen layer and its adapter can be one operation, by linear's one product with W + dW. These
// tell from how many tokens on that is worth while, and whether it is then quicker, for float32,
// than torch's product followed by the adapter's forward.
int64_t tokens_for_one_operation();
bool one_product_is_quicker(const Machine& machine);

// Whether the shares of the threads are equal, or nearly so, when they share this many items.
inline bool shared_evenly(int64_t items, int threads) { return items % threads == 0 || items >= 4 * threads; }

}  // namespace gralora::cpu
