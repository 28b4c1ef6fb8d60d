// SPDX-License-Identifier: Apache-2.0
// Merging with a way back to the bits of before:
//
//   W' = round(... round(round(W + dW_1) + dW_2) ...)        the bits of one merge after the other
//   V  = round(W' - (dW_1 + dW_2 + ...))                     the rounded way back
//
// and for each weight a code of one byte, how far V is from it (codes.h). V follows from W', the
// adapters and these kernels alone, so that taking the adapters off is to compute V again and to
// add the code to its position.
//
// An item is a tile of W, along its contiguous rows. The sums of each adapter in the tile are in
// L2; what follows is done row by row, in L1. A row is written after its codes and its exceptions
// have found their place, so that what is not finished can be undone.
#include "codes.h"
#include "merge_blocks.h"

namespace gralora::cpu::GRALORA_ISA {
namespace {

// ---------------------------------------------------------------- the matrix

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
  uint64_t word(int64_t row, int64_t column) const {
    return uint64_t(row * ceil_div(columns * int64_t(sizeof(Y)), 8) + column * int64_t(sizeof(Y)) / 8);
  }
};

template <class Y>
Matrix<Y> matrix_of(const CodedParams& p, const Param& weight, bool along_N) {
  return along_N ? Matrix<Y>{transposed(weight), p.N, p.M} : Matrix<Y>{weight, p.M, p.N};
}

template <class Y>
uint64_t matrix_checksum(const Matrix<Y>& matrix, const CodedPlan& plan) {
  Scratch scratch;
  const PerThread<Y> buffers(scratch, plan.threads, plan.columns);
  uint64_t sum = 0;
  parallel_items(ceil_div(matrix.rows, plan.rows), plan.threads, [&](int64_t item, int thread) {
    uint64_t own = 0;
    const int64_t first = item * plan.rows, last = smaller(matrix.rows, first + plan.rows);
    for (int64_t row = first; row < last; row++)
      for (int64_t c = 0; c < matrix.columns; c += plan.columns) {
        const int64_t n = smaller(plan.columns, matrix.columns - c);
        own += row_checksum(matrix.read(row, c, n, buffers.of(thread)), n * int64_t(sizeof(Y)), matrix.word(row, c));
      }
    __atomic_fetch_add(&sum, own, __ATOMIC_RELAXED);
  });
  return sum;
}

// ---------------------------------------------------------------- the passes

template <class Acc, class Y>
class Coded {
 public:
  Coded(const CodedParams& p, const CodedPlan& plan)
      : p_(p),
        plan_(plan),
        from_(matrix_of<Y>(p, p.weight, plan.along_N)),
        to_(matrix_of<Y>(p, p.to, plan.along_N)),
        tiles_(ceil_div(from_.columns, plan.columns)),
        items_(ceil_div(from_.rows, plan.rows) * tiles_) {}

  void merge() {
    Scratch scratch;
    const PerThread<Acc> buffers(scratch, plan_.threads, buffers_size());
    int32_t* finished = scratch.take<int32_t>(items_);  // rows of each tile
    *p_.result = {0, 0, 0, p_.count};
    failed_ = 0;
    parallel_items(items_, plan_.threads, [&](int64_t item, int thread) {
      finished[item] = int32_t(merge_tile(tile(item), buffers.of(thread)));
    });
    if (failed_ == 0) return;
    if (p_.to.data == p_.weight.data) {
      parallel_items(items_, plan_.threads, [&](int64_t item, int thread) {
        Tile done = tile(item);
        done.rows = finished[item];
        unmerge_tile(done, buffers.of(thread));
      });
      write_listed(p_.result->listed);
    }
    p_.result->listed = -1;
  }

  void unmerge() {
    Scratch scratch;
    const PerThread<Acc> buffers(scratch, plan_.threads, buffers_size());
    parallel_items(items_, plan_.threads,
                   [&](int64_t item, int thread) { unmerge_tile(tile(item), buffers.of(thread)); });
    write_listed(p_.result->listed);
  }

 private:
  struct Tile {
    int64_t row, rows, column, columns;
  };
  struct Buffers {
    Acc *sums, *packed;
    Y *weights, *merged, *backs;
  };

  Tile tile(int64_t item) const {
    const int64_t row = item / tiles_ * plan_.rows, column = item % tiles_ * plan_.columns;
    return {row, smaller(plan_.rows, from_.rows - row), column, smaller(plan_.columns, from_.columns - column)};
  }

  int64_t tile_size() const { return plan_.rows * plan_.columns; }
  int64_t buffers_size() const {
    int64_t packed = 0;
    for (int64_t i = 0; i < p_.count; i++) packed = larger(packed, adapter(i, nullptr).buffers_size());
    return p_.count * tile_size() + round_up(packed, 16) + 3 * plan_.columns;  // Y is no larger than Acc
  }
  Buffers buffers(Acc* own) const {
    Acc* packed = own + p_.count * tile_size();
    Acc* rows = own + (buffers_size() - 3 * plan_.columns);
    const auto row = [&](int i) { return reinterpret_cast<Y*>(rows + i * plan_.columns); };
    return {own, packed, row(0), row(1), row(2)};
  }

  // Adapter i, its sums written into a tile
  Merge<Acc> adapter(int64_t i, Acc* to) const {
    const MergedAdapter& a = p_.adapters[i];
    Param target;
    target.data = to;
    target.row_stride = plan_.along_N ? 1 : plan_.columns, target.column_stride = plan_.along_N ? plan_.columns : 1;
    return merge_of<Acc>(a.shape, a.adapter, a.scaling, plan_.adapters[i], target, false);
  }

  // dW of each adapter in a tile, cut at the bounds of its blocks
  void add_up(const Tile& t, const Buffers& own) const {
    for (int64_t i = 0; i < p_.count; i++) {
      Acc* sums = own.sums + i * tile_size();
      const Merge<Acc> merge = adapter(i, sums);
      for (int64_t row = t.row, rows = 0; row < t.row + t.rows; row += rows) {
        const int64_t a = row / merge.H, first = row - a * merge.H;
        rows = smaller(merge.H - first, t.row + t.rows - row);
        for (int64_t column = t.column, columns = 0; column < t.column + t.columns; column += columns) {
          const int64_t b = column / merge.V, from = column - b * merge.V;
          columns = smaller(merge.V - from, t.column + t.columns - column);
          Acc* to = sums + (row - t.row) * plan_.columns + column - t.column;
          merge.template merge_block<Acc>(a, b, first, rows, from, from + columns, to, merge.buffers(own.packed));
        }
      }
    }
  }

  int8_t* codes(int64_t row, int64_t column) const { return p_.codes + row * from_.columns + column; }

  // Returns how many rows are finished: all, unless the list is full.
  int64_t merge_tile(const Tile& t, Acc* scratch) {
    if (__atomic_load_n(&failed_, __ATOMIC_RELAXED) != 0) return 0;
    const Buffers own = buffers(scratch);
    add_up(t, own);
    uint64_t before = 0, after = 0;
    int64_t bad = p_.count, m = 0;
    for (; m < t.rows; m++) {
      const int64_t row = t.row + m;
      const Y* weights = from_.read(row, t.column, t.columns, own.weights);
      Acc* total = own.sums + m * plan_.columns;
      add_row<Acc>(weights, total, own.merged, t.columns);
      if (bad > 0 && !is_finite(own.merged, t.columns)) bad = 0;
      for (int64_t i = 1; i < p_.count; i++) {
        const Acc* delta = total + i * tile_size();
        add_row<Acc>(own.merged, delta, own.merged, t.columns);
        if (bad > i && !is_finite(own.merged, t.columns)) bad = i;
        add_to_total(total, delta, t.columns);
      }
      subtract_row<Acc>(own.merged, total, own.backs, t.columns);
      int8_t* row_codes = codes(row, t.column);
      encode_row(weights, own.backs, row_codes, t.columns);
      if (!list(weights, row_codes, t.columns, row * from_.columns + t.column)) break;
      before += row_checksum(weights, t.columns * int64_t(sizeof(Y)), from_.word(row, t.column));
      after += row_checksum(own.merged, t.columns * int64_t(sizeof(Y)), from_.word(row, t.column));
      to_.write(row, t.column, t.columns, own.merged);
    }
    __atomic_fetch_add(&p_.result->before, before, __ATOMIC_RELAXED);
    __atomic_fetch_add(&p_.result->after, after, __ATOMIC_RELAXED);
    int64_t least = __atomic_load_n(&p_.result->first_not_finite, __ATOMIC_RELAXED);
    while (bad < least && !__atomic_compare_exchange_n(&p_.result->first_not_finite, &least, bad, true,
                                                       __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return m;
  }

  void unmerge_tile(const Tile& t, Acc* scratch) const {
    if (t.rows == 0) return;
    const Buffers own = buffers(scratch);
    add_up(t, own);
    for (int64_t m = 0; m < t.rows; m++) {
      const Y* merged = from_.read(t.row + m, t.column, t.columns, own.merged);
      Acc* total = own.sums + m * plan_.columns;
      for (int64_t i = 1; i < p_.count; i++) add_to_total(total, total + i * tile_size(), t.columns);
      subtract_row<Acc>(merged, total, own.backs, t.columns);
      decode_row(own.backs, codes(t.row + m, t.column), t.columns);
      to_.write(t.row + m, t.column, t.columns, own.backs);
    }
  }

  // Lists the weights of a row whose codes say so; false: there is no room for them.
  bool list(const Y* weights, const int8_t* codes, int64_t n, int64_t place) {
    int64_t count = 0;
    for_listed(codes, n, [&](int64_t) { count++; });
    if (count == 0) return true;
    int64_t at = __atomic_load_n(&p_.result->listed, __ATOMIC_RELAXED);
    do {
      if (at + count > p_.capacity) {
        __atomic_store_n(&failed_, 1, __ATOMIC_RELAXED);
        return false;
      }
    } while (
        !__atomic_compare_exchange_n(&p_.result->listed, &at, at + count, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    for_listed(codes, n, [&](int64_t c) {
      p_.places[at] = int32_t(place + c);
      static_cast<Y*>(p_.values)[at++] = weights[c];
    });
    return true;
  }

  void write_listed(int64_t count) const {
    for (int64_t i = 0; i < count; i++)
      *to_.at(p_.places[i] / to_.columns, p_.places[i] % to_.columns) = static_cast<const Y*>(p_.values)[i];
  }

  const CodedParams& p_;
  const CodedPlan& plan_;
  const Matrix<Y> from_, to_;
  const int64_t tiles_, items_;
  int failed_ = 0;
};

// Calls f with the types of the sums and of the weights, where these kernels have them.
template <class F>
void for_weights(DType dtype, F&& f) {
  if constexpr (kHasFloat64) {
    if (dtype == DType::f64) return f(0.0, static_cast<double*>(nullptr));
  }
  for_dtype<float>(dtype, [&](auto* type) { f(0.0f, type); });
}

}  // namespace

void merge_coded(const CodedParams& p, const CodedPlan& plan) {
  for_weights(p.weight.dtype, [&](auto acc, auto* type) {
    Coded<decltype(acc), std::remove_pointer_t<decltype(type)>>(p, plan).merge();
  });
}

void unmerge_coded(const CodedParams& p, const CodedPlan& plan) {
  for_weights(p.weight.dtype, [&](auto acc, auto* type) {
    Coded<decltype(acc), std::remove_pointer_t<decltype(type)>>(p, plan).unmerge();
  });
}

uint64_t checksum(const CodedParams& p, const CodedPlan& plan) {
  uint64_t sum = 0;
  for_weights(p.weight.dtype, [&](auto, auto* type) {
    sum = matrix_checksum(matrix_of<std::remove_pointer_t<decltype(type)>>(p, p.weight, plan.along_N), plan);
  });
  return sum;
}

}  // namespace gralora::cpu::GRALORA_ISA
