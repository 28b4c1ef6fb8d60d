// SPDX-License-Identifier: Apache-2.0
// The loop of the kernels that sum over a long dimension, project and weight_gradient: chunk by
// chunk, while the next ones are on their way.
#pragma once

#include "intrinsics.cuh"

namespace gralora::cuda {

// Multiplies the chunks [first, block.last). Those of x come through a ring of kStages stages, by
// asynchronous copies; those of the operand beside it through two buffers, by way of registers.
// drops: elements of x are dropped once its chunk is there.
template <int kStages, class Block, class Sums>
__device__ __forceinline__ void multiply_chunks(Block& block, int first, bool drops, Sums& total) {
  for (int stage = 0; stage < kStages - 1; stage++) block.load_x(first + stage);
  block.load_operand(first);
  block.store_operand(first);
  for (int chunk = first; chunk < block.last; chunk++) {
    cp_async_wait<kStages - 2>();
    sync_block();  // this chunk has landed for all, and all are done with the one that is filled next
    block.load_x(chunk + kStages - 1);
    block.load_operand(chunk + 1);
    if (drops) {
      block.drop(chunk);
      sync_block();
    }
    block.multiply_chunk(chunk, total);
    block.store_operand(chunk + 1);
  }
}

}  // namespace gralora::cuda
