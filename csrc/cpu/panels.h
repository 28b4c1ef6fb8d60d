// Parameters as panels: blocks of [rows, columns] with unit column stride in the accumulation type, each row padded to
// whole vectors. A parameter that already lies so is used where it is; another is packed once per call.
#pragma once

#include "rows.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Acc>
class Panels {
 public:
  Panels() = default;

  // `param` gives [blocks, rows, columns]; columns become the unit-stride dimension.
  void prepare(const Param& param, int64_t blocks, int64_t rows, int64_t columns, int threads) {
    const bool in_place = param.dtype == DTypeOf<Acc>::value && param.column_stride == 1 && columns % kWidth<Acc> == 0;
    if (in_place) {
      data_ = static_cast<const Acc*>(param.data), block_stride_ = param.block_stride, ld_ = param.row_stride;
      return;
    }
    ld_ = round_up(columns, kWidth<Acc>);
    block_stride_ = rows * ld_;
    packed_.reserve(blocks * block_stride_);
    data_ = packed_.get();
    const int64_t strips = ceil_div(rows, kStrip);
    parallel_items(blocks * strips, threads, [&](int64_t item, int) {
      const int64_t block = item / strips, row0 = item % strips * kStrip;
      pack_strip(param, block, row0, smaller(kStrip, rows - row0), columns);
    });
  }

  const Acc* row(int64_t block, int64_t row) const { return data_ + block * block_stride_ + row * ld_; }
  int64_t ld() const { return ld_; }

 private:
  static constexpr int64_t kStrip = 16;  // rows: a strip of a transposed parameter is read by whole cache lines

  void pack_strip(const Param& param, int64_t block, int64_t row0, int64_t rows, int64_t columns) {
    Acc* to = packed_.get() + block * block_stride_ + row0 * ld_;
    for_dtype(param.dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      const T* from = static_cast<const T*>(param.data) + block * param.block_stride + row0 * param.row_stride;
      if (param.column_stride == 1) {
        for (int64_t i = 0; i < rows; i++) convert_row<Acc>(from + i * param.row_stride, 1, columns, to + i * ld_);
      } else {
        for (int64_t c = 0; c < columns; c++)
          for (int64_t i = 0; i < rows; i++)
            to[i * ld_ + c] = to_acc<Acc>(from[i * param.row_stride + c * param.column_stride]);
      }
    });
    for (int64_t i = 0; i < rows; i++)
      for (int64_t c = columns; c < ld_; c++) to[i * ld_ + c] = Acc(0);
  }

  const Acc* data_ = nullptr;
  int64_t block_stride_ = 0, ld_ = 0;
  Buffer<Acc> packed_;
};

// The general part's parameter seen as k blocks along its wide dimension, and any parameter transposed.
inline Param blocks_of_rows(Param p, int64_t rows_per_block) {
  p.block_stride = rows_per_block * p.row_stride;
  return p;
}
inline Param blocks_of_columns(Param p, int64_t columns_per_block) {
  p.block_stride = columns_per_block * p.column_stride;
  return p;
}
inline Param transposed(Param p) {
  const int64_t row_stride = p.row_stride;
  p.row_stride = p.column_stride, p.column_stride = row_stride;
  return p;
}

}  // namespace gralora::cpu::GRALORA_ISA
