// SPDX-License-Identifier: Apache-2.0
// What the plans of several passes share: thresholds, the micro-kernel's sizes, and how operands
// are read. Here, in plan.cpp and in plan_merge.cpp, every threshold has its reason beside it.
// Where a comment says "measured", the figures are in benchmarks/results/NOTES.md.
#pragma once

#include <algorithm>

#include "plan.h"

namespace gralora::cpu {

// ------------------------------------------------------------------ thresholds

// Below so many multiply-adds, waking the other threads takes longer than they save.
constexpr int64_t kSerialWork = 1 << 18;

// A panel in float takes at most half of L2, since activations share it, and at most so many
// bytes.
constexpr int64_t kMostPanelBytes = 1 << 19;
inline int64_t panel_elements(const Machine& machine) {
  return (machine.l2.bytes > 0 ? std::min(kMostPanelBytes, machine.l2.bytes / 2) : kMostPanelBytes) / 4;
}
// From so many groups of MR tokens on, packing a block of a parameter pays. Fewer tokens read it
// in place, if its layout and dtype allow that.
constexpr int64_t kGroupsWorthPacking = 3;

// ------------------------------------------------------------------ the micro-kernel

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// W, MR and NR of microkernel.h, in elements of the accumulation type.
struct MicroKernel {
  DType accumulated;
  int64_t W, MR, NR;

  MicroKernel(const Machine& machine, bool f64)
      : accumulated(f64 ? DType::f64 : DType::f32),
        W((f64 ? 16 : machine.vector_bytes()) / (f64 ? 8 : 4)),
        MR(!f64 && machine.capability == Capability::Avx512 ? 12 : 6),
        NR(2 * W) {}
};

inline Product plain(bool f64) { return f64 ? Product::Float64 : Product::Float32; }

// A chunk begins at a multiple of NR, so that micro-panels stay whole, and at a multiple of 8
// columns, so that it begins with a whole byte of the dropout mask.
inline Chunks chunks(int64_t width, int64_t k, const MicroKernel& kernel) {
  Chunks cut;
  cut.block_width = width / k;
  const int64_t wanted = std::max<int64_t>(1, ceil_div(cut.block_width, kMostColumns));
  cut.columns = round_up(ceil_div(cut.block_width, wanted), std::max<int64_t>(kernel.NR, 8));
  cut.per_block = ceil_div(cut.block_width, cut.columns);
  cut.count = k * cut.per_block;
  return cut;
}

inline int threads_for(int64_t multiply_adds, int64_t serial, int threads) {
  return multiply_adds < serial ? 1 : threads;
}

// ------------------------------------------------------------------ operands

inline bool even(int64_t n) { return n % 2 == 0; }
inline bool in_rows(const Param& param) { return param.column_stride == 1; }
inline bool evenly_spaced(const Activation& x) { return x.column_stride == 1 && x.leading_dims <= 1; }
inline bool aligned_to_pairs(const void* data) { return reinterpret_cast<uintptr_t>(data) % 4 == 0; }

// Whether pairs of columns of x can be read in place.
inline bool has_pairs(const Activation& x) {
  return x.dtype == DType::bf16 && evenly_spaced(x) && aligned_to_pairs(x.data) &&
         (x.leading_dims == 0 || even(x.strides[0]));
}
// Whether the `rows` rows of each block of a parameter can be packed as pairs.
inline bool has_pairs(const Param& param, int64_t rows) {
  return param.dtype == DType::bf16 && even(rows) &&
         (param.column_stride == 1 || (param.row_stride == 1 && even(param.column_stride) && even(param.block_stride) &&
                                       aligned_to_pairs(param.data)));
}

// gradient_width: the width of a block of x or g whose rows are also the right factor of a weight
// gradient, which reads them in whole vectors; 0 where they are not.
inline Reading reading(const Activation& x, bool dropped, int64_t gradient_width, Product product,
                       const MicroKernel& kernel) {
  if (dropped) return Reading::Dropped;
  // product_of() asked has_pairs()
  if (product != plain(kernel.accumulated == DType::f64)) return Reading::InPlace;
  const bool usable = x.dtype == kernel.accumulated && evenly_spaced(x) && gradient_width % kernel.W == 0;
  return usable ? Reading::InPlace : Reading::Copied;
}

// How blocks of `rows` rows are read. columns: those of a block, or, where a block is cut into
// several panels, of a panel; tokens: how many are multiplied by the packed block, 0 where it is
// packed only if it must be.
inline Packing packing(const Param& param, int64_t rows, int64_t columns, int64_t tokens, Product product,
                       const MicroKernel& kernel) {
  if (param.data == nullptr) return Packing::Absent;
  if (product == Product::Bf16Pairs) return Packing::Paired;
  if (product == Product::Bf16Amx || product == Product::SplitAmx)
    return has_pairs(param, rows) ? Packing::Paired : Packing::Split;
  const bool usable = param.dtype == kernel.accumulated && in_rows(param) && columns % kernel.W == 0;
  const bool is_micro_panel = columns <= kernel.NR && param.row_stride == columns;
  const bool few = tokens < kGroupsWorthPacking * kernel.MR;
  return usable && (few || is_micro_panel) ? Packing::InPlace : Packing::Packed;
}

}  // namespace gralora::cpu
