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
#include "weight_rows.h"

namespace gralora::cpu::GRALORA_ISA {
namespace {

template <class Acc, class Y>
class Coded {
  using U = typename BitsOf<Y>::type;

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
    lists_ = scratch.take<List>(plan_.threads);
    for (int i = 0; i < plan_.threads; i++) lists_[i] = {0, 0};
    *p_.result = {0, 0, 0, p_.count};
    failed_ = 0;
    parallel_items(items_, plan_.threads, [&](int64_t item, int thread) {
      finished[item] = int32_t(merge_tile(tile(item), buffers.of(thread), lists_[thread]));
    });
    close_lists();
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
    p_.result->before = 0;
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
    Y *weights, *merged;  // a row of a tile
    int8_t* codes;
  };
  // The places of the list that a thread has taken and not filled yet
  struct List {
    int64_t at, end;
  };

  Tile tile(int64_t item) const {
    const int64_t row = item / tiles_ * plan_.rows, column = item % tiles_ * plan_.columns;
    return {row, smaller(plan_.rows, from_.rows - row), column, smaller(plan_.columns, from_.columns - column)};
  }

  // The buffers of a row are as long as one of Acc, than which Y is no larger.
  int64_t tile_size() const { return plan_.rows * plan_.columns; }
  int64_t buffers_size() const {
    int64_t packed = 0;
    for (int64_t i = 0; i < p_.count; i++) packed = larger(packed, adapter(i).buffers_size());
    return p_.count * tile_size() + round_up(packed, 16) + 3 * plan_.columns;
  }
  Buffers buffers(Acc* own) const {
    Acc* packed = own + p_.count * tile_size();
    Acc* rows = own + (buffers_size() - 3 * plan_.columns);
    const auto row = [&](int i) { return reinterpret_cast<void*>(rows + i * plan_.columns); };
    return {own, packed, static_cast<Y*>(row(0)), static_cast<Y*>(row(1)), static_cast<int8_t*>(row(2))};
  }

  Merge<Acc> adapter(int64_t i) const {
    const MergedAdapter& a = p_.adapters[i];
    return merge_of<Acc>(a.shape, a.adapter, a.scaling, plan_.adapters[i]);
  }

  // dW of each adapter in a tile, cut at the bounds of its blocks
  void add_up(const Tile& t, const Buffers& own) const {
    for (int64_t i = 0; i < p_.count; i++) {
      const IntoWeights<Acc, Acc> sums{own.sums + i * tile_size(), plan_.columns, 1, false, false};
      const Merge<Acc> merge = adapter(i);
      for (int64_t row = t.row, rows = 0; row < t.row + t.rows; row += rows) {
        const int64_t a = row / merge.H, first = row - a * merge.H;
        rows = smaller(merge.H - first, t.row + t.rows - row);
        for (int64_t column = t.column, columns = 0; column < t.column + t.columns; column += columns) {
          const int64_t b = column / merge.V, from = column - b * merge.V;
          columns = smaller(merge.V - from, t.column + t.columns - column);
          merge.merge_block(a, b, first, rows, from, from + columns, sums.at(row - t.row, column - t.column),
                            merge.buffers(own.packed));
        }
      }
      const int64_t beyond = round_up(t.columns, kNR<Acc>) - t.columns;
      for (int64_t m = 0; beyond > 0 && m < t.rows; m++)
        memset(sums.to + m * plan_.columns + t.columns, 0, size_t(beyond) * sizeof(Acc));
    }
  }

  int8_t* codes(int64_t row, int64_t column) const { return p_.codes + row * from_.columns + column; }
  CodedRow<Acc, Y> row_of(const Buffers& own, int64_t m) const {
    return {own.sums + m * plan_.columns, tile_size(), p_.count};
  }
  // A row of a tile where it is read, where it is written and where its codes are: in place, or
  // where it does not consist of whole micro-tiles of contiguous weights, in buffers
  struct Row {
    const Y* from;
    Y* to;
    int8_t* codes;
    bool in_place;
    // What is prefetched lies so far from them: rows below, or in a buffer nothing else.
    int64_t below = 0, codes_below = 0;

    inline __attribute__((always_inline)) void prefetch_below(int64_t c) const {
      prefetch<1>(address(from, below + c));
      if (sizeof(Y) * kNR<Acc> > 64) prefetch<1>(address(from, below + c + kWidth<Acc>));
      prefetch<1>(address(codes, codes_below + c));
    }
  };
  Row open(const Tile& t, int64_t row, const Buffers& own) const {
    const int64_t n = t.columns;
    if (n % kNR<Acc> == 0 && from_.W.column_stride == 1)
      return {from_.at(row, t.column),     to_.at(row, t.column), codes(row, t.column), true,
              kAhead * from_.W.row_stride, kAhead * from_.columns};
    const Y* weights = from_.read(row, t.column, n, own.weights);
    if (weights != own.weights) memcpy(own.weights, weights, size_t(n) * sizeof(Y));
    memset(own.weights + n, 0, size_t(round_up(n, kNR<Acc>) - n) * sizeof(Y));
    memcpy(own.codes, codes(row, t.column), size_t(n));
    return {own.weights, own.merged, own.codes, false};
  }

  // The columns of a row that are merged: all, unless the list is full.
  template <bool one_adapter>
  int64_t merge_row(const CodedRow<Acc, Y> coded, const Row at, int64_t n, int64_t place, List& list, Checksums& sums) {
    const CodeConstants<Y> constants;
    Checksums own = sums;
    for (int64_t c = 0; c < n; c += kNR<Acc>) {
      uint32_t any = 0;
      at.prefetch_below(c);
      const auto merged = coded.template merge<one_adapter>(at.from + c, c, constants, at.codes + c, any);
      if (__builtin_expect(any != 0, 0) && !write_list(at.from + c, any, n - c, place + c, list)) return c;
      for (int i = 0; i < kNR<Acc>; i += kVectorBytes / int(sizeof(Y))) {
        const Words words = merged.template bits<Words>(i);
        own.add(load_bits<Words>(at.from + c + i), words);
        memcpy(at.to + c + i, &words, sizeof words);
      }
    }
    sums = own;
    return n;
  }

  // Returns how many rows are finished: all, unless the list is full.
  int64_t merge_tile(const Tile& t, Acc* scratch, List& list) {
    if (__atomic_load_n(&failed_, __ATOMIC_RELAXED) != 0) return 0;
    const Buffers own = buffers(scratch);
    add_up(t, own);
    Checksums sums;
    int64_t bad = p_.count, m = 0;
    for (; m < t.rows; m++) {
      const CodedRow<Acc, Y> coded = row_of(own, m);
      const int64_t row = t.row + m, word = from_.word(row, t.column), place = row * from_.columns + t.column;
      const Row at = open(t, row, own);
      if (p_.finds_broken)
        for (int64_t c = 0; c < t.columns; c += kNR<Acc>) bad = coded.first_not_finite(at.from + c, c, bad);
      Checksums of_row = sums;
      of_row.begin(word);
      const int64_t done = p_.count == 1 ? merge_row<true>(coded, at, t.columns, place, list, of_row)
                                         : merge_row<false>(coded, at, t.columns, place, list, of_row);
      if (done < t.columns) {
        for (int64_t c = 0; c < done; c += kNR<Acc>) coded.unmerge(at.to + c, c, {}, at.codes + c, at.to + c);
        break;
      }
      if (at.in_place) {
        sums = of_row;
      } else {
        sums.add_row(at.from, at.to, t.columns * int64_t(sizeof(Y)), word);
        memcpy(codes(row, t.column), at.codes, size_t(t.columns));
        to_.write(row, t.column, t.columns, at.to);
      }
    }
    sums.add_to(p_.result->before, p_.result->after);
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
    const CodeConstants<Y> constants;
    Checksums sums;
    for (int64_t m = 0; m < t.rows; m++) {
      const CodedRow<Acc, Y> coded = row_of(own, m);
      const Row at = open(t, t.row + m, own);
      for (int64_t c = 0; c < t.columns; c += kNR<Acc>) {
        at.prefetch_below(c);
        coded.unmerge(at.from + c, c, constants, at.codes + c, at.to + c);
      }
      sums.add_row_before(at.to, t.columns * int64_t(sizeof(Y)));
      if (!at.in_place) to_.write(t.row + m, t.column, t.columns, at.to);
    }
    sums.add_to(p_.result->before, p_.result->after);
  }

  // Lists those of the first n weights whose bits in `listed` are set; false: there is no room.
  __attribute__((noinline)) bool write_list(const Y* weights, uint32_t listed, int64_t n, int64_t place, List& list) {
    const int64_t share = smaller(kShare, larger(1, p_.capacity / kShare));
    for (; listed != 0; listed &= listed - 1) {
      const int c = __builtin_ctz(listed);
      if (c >= n) break;
      if (list.at == list.end) {
        int64_t at = __atomic_load_n(&p_.result->listed, __ATOMIC_RELAXED);
        do {
          if (at + share > p_.capacity) {
            __atomic_store_n(&failed_, 1, __ATOMIC_RELAXED);
            return false;
          }
        } while (!__atomic_compare_exchange_n(&p_.result->listed, &at, at + share, true, __ATOMIC_RELAXED,
                                              __ATOMIC_RELAXED));
        list = {at, at + share};
      }
      p_.places[list.at] = int32_t(place + c);
      static_cast<Y*>(p_.values)[list.at++] = weights[c];
    }
    return true;
  }

  // Moves what the threads have listed together.
  void close_lists() {
    for (int i = 0; i < plan_.threads; i++)
      for (int64_t at = lists_[i].at; at < lists_[i].end; at++) p_.places[at] = -1;
    int64_t count = 0;
    auto* values = static_cast<Y*>(p_.values);
    for (int64_t i = 0; i < p_.result->listed; i++)
      if (p_.places[i] >= 0) p_.places[count] = p_.places[i], values[count++] = values[i];
    p_.result->listed = count;
  }

  // Writes the weights of the list, and corrects `before` by them.
  void write_listed(int64_t count) const {
    for (int64_t i = 0; i < count; i++) {
      const int64_t row = p_.places[i] / to_.columns, column = p_.places[i] % to_.columns;
      Y &weight = *to_.at(row, column), value = static_cast<const Y*>(p_.values)[i];
      const auto in_word = [&](Y y) { return uint64_t(bit_cast<U>(y)) << column * int64_t(sizeof(Y)) % 8 * 8; };
      p_.result->before += in_word(value) - in_word(weight);
      weight = value;
    }
  }

  // What a thread takes of the list at a time; rows that are prefetched ahead
  static constexpr int64_t kShare = 64, kAhead = 2;

  const CodedParams& p_;
  const CodedPlan& plan_;
  const Matrix<Y> from_, to_;
  const int64_t tiles_, items_;
  List* lists_ = nullptr;
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

void checksums(const CodedParams& p, const CodedPlan& plan) {
  for_weights(p.weight.dtype, [&](auto, auto* type) {
    add_checksums(matrix_of<std::remove_pointer_t<decltype(type)>>(p, p.weight, plan.along_N), plan, *p.result);
  });
}

}  // namespace gralora::cpu::GRALORA_ISA
