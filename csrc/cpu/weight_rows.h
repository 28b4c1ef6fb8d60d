// SPDX-License-Identifier: Apache-2.0
// A weight as a matrix of contiguous rows, read and written row by row, and its checksums.
#pragma once

#include "codes.h"
#include "rows.h"

namespace gralora::cpu::GRALORA_ISA {

// W in the orientation of its rows, and rows of it by pointers to contiguous elements
template <class Y>
struct Matrix {
  Param W;
  int64_t rows, columns;

  Y* at(int64_t row, int64_t column) const {
    return static_cast<Y*>(W.data) + row * W.row_stride + column * W.column_stride;
  }
  // In place, or copied into `buffer`
  const Y* read(int64_t row, int64_t column, int64_t n, Y* buffer) const {
    const Y* from = at(row, column);
    if (W.column_stride == 1) return from;
    for (int64_t c = 0; c < n; c++) buffer[c] = from[c * W.column_stride];
    return buffer;
  }
  void write(int64_t row, int64_t column, int64_t n, const Y* values) const {
    Y* to = at(row, column);
    if (W.column_stride == 1) {
      memcpy(to, values, size_t(n) * sizeof(Y));
      return;
    }
    for (int64_t c = 0; c < n; c++) to[c * W.column_stride] = values[c];
  }
  int64_t word(int64_t row, int64_t column) const {
    return row * ceil_div(columns * int64_t(sizeof(Y)), 8) + column * int64_t(sizeof(Y)) / 8;
  }
};

template <class Y>
Matrix<Y> matrix_of(const CodedParams& p, const Param& weight, bool along_N) {
  return along_N ? Matrix<Y>{transposed(weight), p.N, p.M} : Matrix<Y>{weight, p.M, p.N};
}

template <class Y>
void add_checksums(const Matrix<Y>& matrix, const CodedPlan& plan, CodedResult& result) {
  Scratch scratch;
  const PerThread<Y> buffers(scratch, plan.threads, plan.columns);
  parallel_items(ceil_div(matrix.rows, plan.rows), plan.threads, [&](int64_t item, int thread) {
    Checksums sums;
    const int64_t first = item * plan.rows, last = smaller(matrix.rows, first + plan.rows);
    for (int64_t row = first; row < last; row++)
      for (int64_t c = 0; c < matrix.columns; c += plan.columns) {
        const int64_t n = smaller(plan.columns, matrix.columns - c);
        const Y* part = matrix.read(row, c, n, buffers.of(thread));
        sums.add_row(part, part, n * int64_t(sizeof(Y)), matrix.word(row, c));
      }
    sums.add_to(result.before, result.after);
  });
}

}  // namespace gralora::cpu::GRALORA_ISA
