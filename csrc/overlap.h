// SPDX-License-Identifier: Apache-2.0
// Which memory tensors take, by their addresses, sizes and strides: what may be written without
// harm.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace gralora {

// Whether two elements of a tensor are one place in memory. Answered by the strides alone wherever
// each dimension steps over all that the dimensions of smaller strides reach, which is so in
// practice; else each element is looked up.
inline bool overlaps_itself(const at::Tensor& tensor) {
  if (tensor.is_non_overlapping_and_dense() || tensor.numel() == 0) return false;
  c10::SmallVector<std::pair<int64_t, int64_t>, 8> dims;  // strides and sizes
  for (int64_t d = 0; d < tensor.dim(); d++)
    if (tensor.size(d) > 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t last = 0;  // the furthest element
  bool nested = true;
  for (const auto& [stride, size] : dims) {
    nested = nested && stride > last;
    last += (size - 1) * stride;
  }
  if (nested) return false;
  if (tensor.numel() > last + 1) return true;
  std::vector<bool> taken(last + 1);
  for (int64_t i = 0; i < tensor.numel(); i++) {
    int64_t place = 0, rest = i;
    for (const auto& [stride, size] : dims) place += rest % size * stride, rest /= size;
    if (taken[place]) return true;
    taken[place] = true;
  }
  return false;
}

// From a tensor's first byte to beyond its last one
inline std::pair<uintptr_t, uintptr_t> memory_range(const at::Tensor& tensor) {
  int64_t last = 0;
  for (int64_t d = 0; d < tensor.dim(); d++) last += (tensor.size(d) - 1) * tensor.stride(d);
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return {begin, begin + uintptr_t(last + 1) * tensor.element_size()};
}

// Whether the ranges of two tensors have memory in common. Parts of one storage that follow each
// other, as engines cut parameters from a flat buffer, are apart; those that are woven into each
// other, such as columns of one matrix, are not.
inline bool share_memory(const at::Tensor& a, const at::Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto [a_begin, a_end] = memory_range(a);
  const auto [b_begin, b_end] = memory_range(b);
  return a_begin < b_end && b_begin < a_end;
}

}  // namespace gralora
