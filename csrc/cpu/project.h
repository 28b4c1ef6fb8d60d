// project: from a wide activation to the ranks, with the block exchange in the store.
//
//   u[t, j*r + n*rb + q] = s * sum_i x'[t, n*w + i] * P[n][i, j*rb + q]      n, j = 0 .. k-1;  w = width/k
//   u[t, k*r + c]        = s * sum_i x'[t, i] * G[i, c]                      c = 0 .. h-1
//
// x' is x after dropout. Forward: x, A, Ag^T give U. Backward: g, B^T, Bg give dH, since the exchange is its own inverse.
//
// x is read once and u written once. A group of up to kMaxRows tokens walks along a row in chunks of kChunk; a chunk of x
// stays in L1 for all ranks, a chunk of P in L2 for all tokens of a tile. Each chunk is summed by itself, then chunks are
// added in their order: the result depends neither on the tile nor on the thread, and long sums lose less.
#pragma once

#include "panels.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Acc>
struct Project {
  static constexpr int64_t kChunk = 256;
  static constexpr int64_t kTileRows = 4 * kMaxRows;

  int64_t T, width, k, r, h;
  Rows x;
  Mask mask;
  const Panels<Acc>& P;
  const Panels<Acc>& G;
  Acc scale;
  Acc* u;

  int64_t block_width() const { return width / k; }
  int64_t chunks() const { return ceil_div(block_width(), kChunk); }
  int64_t general_start() const { return round_up(r, kWidth<Acc>); }
  int64_t sums() const { return general_start() + round_up(h, kWidth<Acc>); }  // per token: ranks of a block, then h

  void run(int threads) const {
    const int64_t tiles = ceil_div(T, kTileRows);
    if (tiles >= 2 * threads || threads == 1)
      run_by_tokens(tiles, threads);
    else
      run_by_chunks(threads);
  }

 private:
  // sum[m, ...] += one chunk of tokens t0 .. t0+MR
  template <int MR>
  void add_chunk(int64_t t0, int64_t n, int64_t chunk, Acc* sum, Acc* scratch) const {
    const int64_t first = chunk * kChunk, length = smaller(kChunk, block_width() - first);
    const Panel<Acc> xs =
        read_rows<Acc>(x, t0, MR, n * block_width() + first, length, width, mask, scratch, scratch + kMaxRows * kChunk);
    const auto add = [&](const Panels<Acc>& panels, int64_t columns, Acc* to) {
      for_column_tiles<Acc>(round_up(columns, kWidth<Acc>), [&](auto nv, int64_t c) {
        constexpr int NV = decltype(nv)::value;
        Vec<Acc> acc[MR][NV] = {};
        multiply<Acc, MR, NV>(length, xs.data, xs.ld, 1, panels.at(n, first, c), panels.ld(), acc);
        for (int m = 0; m < MR; m++)
          for (int v = 0; v < NV; v++) {
            Acc* at = to + m * sums() + c + v * kWidth<Acc>;
            store<Acc>(at, load<Acc>(at) + acc[m][v]);
          }
      });
    };
    add(P, r, sum);
    if (h > 0) add(G, h, sum + general_start());
  }

  static void clear(Acc* from, int64_t count) {
    for (int64_t i = 0; i < count; i++) from[i] = Acc(0);
  }

  void store_block(int64_t t, int64_t n, const Acc* sum) const {
    const int64_t rb = r / k;
    Acc* row = u + t * (k * r + h) + n * rb;
    for (int64_t j = 0; j < k; j++)
      for (int64_t q = 0; q < rb; q++) row[j * r + q] = scale * sum[j * rb + q];
  }

  void store_general(int64_t t, const Acc* sum) const {
    Acc* row = u + t * (k * r + h) + k * r;
    for (int64_t c = 0; c < h; c++) row[c] = scale * sum[general_start() + c];
  }

  static constexpr int64_t scratch_size() { return kMaxRows * kChunk + kChunk; }

  void run_by_tokens(int64_t tiles, int threads) const {
    const ThreadBuffers<Acc> buffers(threads, kMaxRows * sums() + scratch_size());
    parallel_items(tiles, threads, [&](int64_t tile, int thread) {
      Acc* sum = buffers.of(thread);
      Acc* scratch = sum + kMaxRows * sums();
      const int64_t first = tile * kTileRows;
      for_row_groups(smaller(kTileRows, T - first), [&](auto mr, int64_t m0) {
        constexpr int MR = decltype(mr)::value;
        const int64_t t0 = first + m0;
        clear(sum, MR * sums());
        for (int64_t n = 0; n < k; n++) {
          for (int m = 0; m < MR; m++) clear(sum + m * sums(), general_start());
          for (int64_t chunk = 0; chunk < chunks(); chunk++) add_chunk<MR>(t0, n, chunk, sum, scratch);
          for (int m = 0; m < MR; m++) store_block(t0 + m, n, sum + m * sums());
        }
        for (int m = 0; m < MR; m++) store_general(t0 + m, sum + m * sums());
      });
    });
  }

  // Few tokens: each chunk of each row is an item of its own; the same sums are then added in the same order.
  void run_by_chunks(int threads) const {
    const int64_t segments = k * chunks(), tiles = ceil_div(T, kMaxRows);
    Buffer<Acc> partial(segments * T * sums());
    const ThreadBuffers<Acc> buffers(threads, larger(scratch_size(), sums()));
    parallel_items(segments * tiles, threads, [&](int64_t item, int thread) {
      const int64_t segment = item / tiles, first = item % tiles * kMaxRows;
      for_row_groups(smaller(kMaxRows, T - first), [&](auto mr, int64_t m0) {
        constexpr int MR = decltype(mr)::value;
        Acc* sum = partial.get() + (segment * T + first + m0) * sums();
        clear(sum, MR * sums());
        add_chunk<MR>(first + m0, segment / chunks(), segment % chunks(), sum, buffers.of(thread));
      });
    });
    parallel_items(T, threads, [&](int64_t t, int thread) {
      Acc* sum = buffers.of(thread);
      clear(sum, sums());
      for (int64_t n = 0; n < k; n++) {
        clear(sum, general_start());
        for (int64_t chunk = 0; chunk < chunks(); chunk++) {
          const Acc* from = partial.get() + ((n * chunks() + chunk) * T + t) * sums();
          for (int64_t c = 0; c < sums(); c++) sum[c] += from[c];
        }
        store_block(t, n, sum);
      }
      store_general(t, sum);
    });
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
