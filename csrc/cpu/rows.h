// Reading activations and parameters into the accumulation type: in place where the memory already has it, else converted
// panel by panel into scratch that stays in L1/L2.
#pragma once

#include <type_traits>

#include "../gralora.h"
#include "microkernel.h"
#include "philox.h"

namespace gralora::cpu::GRALORA_ISA {

template <class Acc>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::f32;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::f64;
};

// Calls f with a null pointer of the element type. Where a tensor is float64, sums are too: never float64 beside float.
template <class Acc, class F>
inline void for_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::f32: return f(static_cast<float*>(nullptr));
    case DType::bf16: return f(static_cast<bf16*>(nullptr));
    case DType::f16: return f(static_cast<f16*>(nullptr));
    case DType::f64:
      if constexpr (sizeof(Acc) == sizeof(double)) return f(static_cast<double*>(nullptr));
  }
}

inline int64_t row_offset(const Rows& rows, int64_t t) {
  int64_t offset = 0;
  for (int d = rows.leading_dims - 1; d > 0; d--) {
    offset += t % rows.sizes[d] * rows.strides[d];
    t /= rows.sizes[d];
  }
  return rows.leading_dims > 0 ? offset + t * rows.strides[0] : 0;
}

template <class Acc, class T>
inline void convert_row(const T* from, int64_t stride, int64_t count, Acc* to) {
  int64_t i = 0;
  if (stride == 1)
    for (; i + kWidth<Acc> <= count; i += kWidth<Acc>) store<Acc>(to + i, load<Acc>(from + i));
  for (; i < count; i++) to[i] = to_acc<Acc>(from[i * stride]);
}

template <class Acc>
inline void drop_row(Acc* row, const Acc* factor, int64_t count) {
  int64_t i = 0;
  for (; i + kWidth<Acc> <= count; i += kWidth<Acc>)
    store<Acc>(row + i, drop<Acc>(load<Acc>(row + i), load<Acc>(factor + i)));
  for (; i < count; i++) row[i] = drop<Acc>(row[i], factor[i]);
}

template <class Acc>
struct Panel {
  const Acc* data;
  int64_t ld;
};

// x[t0 .. t0+count, i0 .. i0+width) with dropout applied, `scratch` of count * width elements, `factor` of width.
// `logical_width` is the width of the whole row of x, which numbers the elements for the mask. Rows that lie a multiple of
// kConflict bytes apart are copied too: they would share the same few sets of L1.
template <class Acc>
Panel<Acc> read_rows(const Rows& x, int64_t t0, int64_t count, int64_t i0, int64_t width, int64_t logical_width,
                     const Mask& mask, Acc* scratch, Acc* factor) {
  constexpr int64_t kConflict = 1024;
  if (x.dtype == DTypeOf<Acc>::value && x.column_stride == 1 && x.leading_dims <= 1 && !mask.on) {
    const int64_t ld = x.leading_dims == 1 ? x.strides[0] : 0;
    if (count == 1 || ld * int64_t(sizeof(Acc)) % kConflict != 0)
      return {static_cast<const Acc*>(x.data) + t0 * ld + i0, ld};
  }
  for_dtype<Acc>(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t m = 0; m < count; m++) {
      const T* row = static_cast<const T*>(x.data) + row_offset(x, t0 + m) + i0 * x.column_stride;
      convert_row<Acc>(row, x.column_stride, width, scratch + m * width);
      if (!mask.on) continue;
      mask.factors(uint64_t((t0 + m) * logical_width + i0), width, factor);
      drop_row(scratch + m * width, factor, width);
    }
  });
  return {scratch, width};
}

// The same, cut into tiles: to[(i / kTile) * count * kTile + t * kTile + i % kTile], padded with zeros.
template <class Acc>
void read_tiles(const Rows& x, int64_t t0, int64_t count, int64_t i0, int64_t width, int64_t logical_width,
                const Mask& mask, Acc* to, Acc* factor) {
  for_dtype<Acc>(x.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (int64_t t = 0; t < count; t++) {
      const T* row = static_cast<const T*>(x.data) + row_offset(x, t0 + t) + i0 * x.column_stride;
      if (mask.on) mask.factors(uint64_t((t0 + t) * logical_width + i0), width, factor);
      for (int64_t c = 0; c < width; c += kTile<Acc>) {
        const int64_t columns = smaller(kTile<Acc>, width - c);
        Acc* tile = to + c * count + t * kTile<Acc>;
        convert_row<Acc>(row + c * x.column_stride, x.column_stride, columns, tile);
        if (mask.on) drop_row(tile, factor + c, columns);
        for (int64_t i = columns; i < kTile<Acc>; i++) tile[i] = Acc(0);
      }
    }
  });
}

}  // namespace gralora::cpu::GRALORA_ISA
