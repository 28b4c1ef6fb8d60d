// SPDX-License-Identifier: Apache-2.0
// forward for one to four tokens, without a general part. Reading the parameters is nearly all of
// the work, so they are neither packed nor transposed. The rows of the parameters must be
// contiguous.
//
//   an item of the pass over A, a chunk of columns of x:
//     its part of H_n[t, c] = sum_i x'_n[t, i] A_n[i, c]
//   an item of the pass over B, a strip of columns of y:
//     y_j[t, o] = base_j[t, o] + s sum_c U_j[t, c] B_j[c, o]
//
// The lanes of a vector are columns of A or B. The sums of a token depend neither on the other
// tokens nor on the number of threads.
#pragma once

#include "few_tokens.h"
#include "project.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Acc>
struct ForwardFew {
  const ForwardParams& p;
  const ForwardPlan& plan;
  const Shape& s = p.shape;
  const int64_t row = s.k * s.r, w_out = s.M / s.k, strip = plan.strip;
  const Project<Fp32<Acc>> project = project_x<Fp32<Acc>>(p, plan.A, plan.A_general, plan.x, plan.chunks);

  void run() const {
    const int64_t chunks = plan.chunks.count, sums = project.sums_row(), strips = ceil_div(w_out, strip);
    Scratch scratch;
    const PerThread<Acc> buffers(scratch, plan.threads, larger(RowBuffer<Acc>::size(kFewTokens), kFewTokens * strip));
    Acc* partial = scratch.take<Acc>(chunks * s.T * sums);
    Acc* sum = scratch.take<Acc>(sums);
    Acc* u = p.u_bf16 ? scratch.take<Acc>(s.T * row) : static_cast<Acc*>(p.u);
    for_dtype<Acc>(p.adapter.A.dtype, [&](auto* type) {
      using P = std::remove_pointer_t<decltype(type)>;
      for_few_tokens(s.T, [&](auto tokens) {
        parallel_items(chunks, plan.threads, [&](int64_t chunk, int thread) {
          pass_A<tokens.value, P>(chunk, buffers.of(thread), partial + chunk * s.T * sums);
        });
        for (int64_t t = 0; t < s.T; t++) project.reduce(partial, s.T, t, sum, u + t * row);
        parallel_items(s.k * strips, plan.threads, [&](int64_t item, int thread) {
          const int64_t first = item % strips * strip;
          pass_B<tokens.value, P>(item / strips, first, smaller(strip, w_out - first), u, buffers.of(thread));
        });
      });
    });
    if (p.u_bf16) round_row<Acc>(u, s.T * row, static_cast<bf16*>(p.u));
  }

 private:
  template <int T, class P>
  void pass_A(int64_t chunk, Acc* buffer, Acc* to) const {
    constexpr int64_t W = kWidth<Acc>;
    constexpr int kWide = T == 4 ? 1 : 4 / T;
    const Part part = project.part(chunk, 0, s.T);
    const int64_t length = part.columns, sums = project.sums_row();
    const Source<Acc> x = read_rows<Acc>(plan.x, part, {buffer, kFewTokens});
    const Param& A = p.adapter.A;
    const P* a = static_cast<const P*>(A.data) + plan.chunks.block(chunk) * A.block_stride +
                 plan.chunks.first(chunk) * A.row_stride;
    const Acc* rows[T];
    rows_of(x.data, x.ld, s.T, rows);
    const int64_t stride = A.row_stride, ahead = kAhead * stride;
    int64_t c = 0;
    for (; c + kWide * W <= s.r; c += kWide * W)
      sum_rows<kWide, kSumsOfRows>(rows, s.T, length, a + c, stride, ahead, to + c, sums);
    for (; c < s.r; c += W) sum_rows<1, kSumsOfRows>(rows, s.T, length, a + c, stride, ahead, to + c, sums, s.r - c);
  }

  // Columns [first, first + columns) of the output block j
  template <int T, class P>
  void pass_B(int64_t j, int64_t first, int64_t columns, const Acc* u, Acc* sum) const {
    constexpr int64_t W = kWidth<Acc>;
    constexpr int kWide = kVectorRegisters == 32 ? (T == 1 ? 8 : 4) : (T == 4 ? 2 : 4);
    const Param& B = p.adapter.B;
    const P* b = static_cast<const P*>(B.data) + j * B.block_stride + first;
    const Acc* rows[T];
    rows_of(u + j * s.r, row, s.T, rows);
    const int64_t stride = B.row_stride;
    int64_t o = 0;
    for (; o + kWide * W <= columns; o += kWide * W)
      sum_rows<kWide, 1>(rows, s.T, s.r, b + o, stride, kWide * W, sum + o, strip);
    for (; o < columns; o += W) sum_rows<1, 1>(rows, s.T, s.r, b + o, stride, W, sum + o, strip, columns - o);
    const int64_t column = j * w_out + first;
    for_dtype<Acc>(p.y.dtype, [&](auto* type) {
      using Y = std::remove_pointer_t<decltype(type)>;
      for (int64_t t = 0; t < s.T; t++) store_y<Y>(t, column, columns, sum + t * strip);
    });
  }

  template <class Y>
  void store_y(int64_t t, int64_t column, int64_t columns, const Acc* sum) const {
    constexpr int64_t W = kWidth<Acc>;
    const Acc scale = Acc(p.scaling);
    const Y* from = static_cast<const Y*>(p.base.data) + row_offset(p.base, t) + column;
    Y* to = static_cast<Y*>(p.y.data) + row_offset(p.y, t) + column;
    int64_t o = 0;
    for (; o + 2 * W <= columns; o += 2 * W) {
      Vec<Acc> y[2];
#pragma GCC unroll 2
      for (int v = 0; v < 2; v++) y[v] = scale * load<Acc>(sum + o + v * W) + load<Acc>(from + o + v * W);
      store_row<Acc, Y, 2>(to + o, y);
    }
    for (; o < columns; o++) to[o] = from_acc<Y>(scale * sum[o] + to_acc<Acc>(from[o]));
  }
};

}  // namespace gralora::cpu::GRALORA_ISA
