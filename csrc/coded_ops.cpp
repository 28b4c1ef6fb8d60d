// SPDX-License-Identifier: Apache-2.0
// Merging several adapters with codes that lead back, and taking them off by these: on the CPU.
//
// All memory is the caller's, and a merge has no result, so that a caller who is interrupted after
// the call has lost nothing: facts tells whether it was carried out.
#include <vector>

#include "checks.h"
#include "ops.h"
#include "params.h"
#include "result_memory.h"
#include "run.h"

namespace gralora {
namespace {

enum Fact : int64_t { kDone, kBefore, kAfter, kListed, kFirstNotFinite, kFacts };

void check_flat(const at::Tensor& t, const char* name, int64_t n, at::ScalarType type) {
  TORCH_CHECK_VALUE(t.is_cpu() && t.scalar_type() == type && t.dim() == 1 && t.numel() == n && t.is_contiguous(),
                    "gralora_ext: ", name, " must be contiguous [", n, "] of ", type, " on the CPU, but is ",
                    t.is_contiguous() ? "" : "not contiguous, ", t.sizes(), " of ", t.scalar_type(), " on ",
                    t.device());
}

void check_codes(const at::Tensor& weight, const at::Tensor& codes, const at::Tensor& places,
                 const at::Tensor& values) {
  TORCH_CHECK_VALUE(weight.is_cpu(), "gralora_ext: a merge with codes is for the CPU, but weight is on ",
                    weight.device());
  TORCH_CHECK_VALUE(weight.numel() <= INT32_MAX, "gralora_ext: weight must have at most 2^31 - 1 elements, but has ",
                    weight.numel());
  check_flat(codes, "codes", weight.numel(), at::kChar);
  check_flat(places, "places", places.numel(), at::kInt);
  check_flat(values, "values", places.numel(), weight.scalar_type());
}

struct Coded {
  std::vector<MergedAdapter> adapters;
  CodedResult result;
  CodedParams p;
};

// `to` is the tensor that is written
void fill(Coded& coded, const at::Tensor& weight, const at::Tensor& to, const c10::List<OptionalTensor>& adapters,
          at::ArrayRef<double> scalings, bool fan_in_fan_out, const at::Tensor& codes, const at::Tensor& places,
          const at::Tensor& values) {
  TORCH_CHECK_VALUE(
      !scalings.empty() && adapters.size() == 4 * scalings.size(),
      "gralora_ext: adapters must be A, B, A_general and B_general of each, one scaling for four, but are ",
      adapters.size(), " tensors and ", scalings.size(), " scalings");
  for (size_t i = 0; i < scalings.size(); i++) {
    const OptionalTensor A = adapters.get(4 * i), B = adapters.get(4 * i + 1);
    const OptionalTensor A_general = adapters.get(4 * i + 2), B_general = adapters.get(4 * i + 3);
    TORCH_CHECK_TYPE(A.has_value() && B.has_value(), "gralora_ext: A and B must be tensors, but one is None");
    const Shape shape = check_merge(to, *A, *B, A_general, B_general, scalings[i], fan_in_fan_out);
    TORCH_CHECK_TYPE(A->scalar_type() != at::kDouble || weight.scalar_type() == at::kDouble,
                     "gralora_ext: with codes A must not be float64 beside a weight of another dtype, which is ",
                     weight.scalar_type());
    coded.adapters.push_back({shape, adapter_of(*A, *B, A_general, B_general), scalings[i]});
  }
  check_codes(weight, codes, places, values);
  TORCH_CHECK_VALUE(
      weight.sizes() == to.sizes() && weight.strides() == to.strides() && weight.scalar_type() == to.scalar_type(),
      "gralora_ext: to must be like weight, but has shape ", to.sizes(), " and strides ", to.strides(), " where ",
      weight.sizes(), " and ", weight.strides(), " were expected");
  const bool in_place = to.const_data_ptr() == weight.const_data_ptr();
  if (!in_place) check_apart(to, "to", weight, "weight");
  CodedParams& p = coded.p;
  p.N = coded.adapters[0].shape.N, p.M = coded.adapters[0].shape.M;
  p.adapters = coded.adapters.data(), p.count = int64_t(coded.adapters.size());
  p.weight = param_of(fan_in_fan_out ? weight.t() : weight), p.to = param_of(fan_in_fan_out ? to.t() : to);
  p.codes = codes.mutable_data_ptr<int8_t>(), p.places = places.mutable_data_ptr<int32_t>();
  p.values = values.mutable_data_ptr(), p.capacity = places.numel();
  p.finds_broken = !in_place;
  p.result = &coded.result;
}

}  // namespace

void merge_coded_kernel(const at::Tensor& weight, at::Tensor to, const c10::List<OptionalTensor>& adapters,
                        at::ArrayRef<double> scalings, bool fan_in_fan_out, at::Tensor codes, at::Tensor places,
                        at::Tensor values, at::Tensor facts) {
  Coded coded;
  fill(coded, weight, to, adapters, scalings, fan_in_fan_out, codes, places, values);
  check_flat(facts, "facts", kFacts, at::kLong);
  run_merge_coded(coded.p);
  auto* fact = facts.mutable_data_ptr<int64_t>();
  fact[kBefore] = int64_t(coded.result.before), fact[kAfter] = int64_t(coded.result.after);
  fact[kListed] = coded.result.listed, fact[kFirstNotFinite] = coded.result.first_not_finite;
  fact[kDone] = coded.result.listed >= 0;
  bump_version(to);
}

int64_t unmerge_coded_kernel(at::Tensor weight, const c10::List<OptionalTensor>& adapters,
                             at::ArrayRef<double> scalings, bool fan_in_fan_out, const at::Tensor& codes,
                             const at::Tensor& places, const at::Tensor& values) {
  Coded coded;
  fill(coded, weight, weight, adapters, scalings, fan_in_fan_out, codes, places, values);
  coded.result.listed = places.numel();
  for (int64_t i = 0; i < places.numel(); i++)
    TORCH_CHECK_VALUE(coded.p.places[i] >= 0 && coded.p.places[i] < weight.numel(),
                      "gralora_ext: places must be below ", weight.numel(), ", but one is ", coded.p.places[i]);
  run_unmerge_coded(coded.p);
  bump_version(weight);
  return int64_t(coded.result.before);
}

std::tuple<int64_t, int64_t> checksums_kernel(const at::Tensor& weight, bool fan_in_fan_out) {
  check_tensor(weight, "weight", weight.device());
  TORCH_CHECK_VALUE(weight.dim() == 2, "gralora_ext: weight must be a matrix, but has shape ", weight.sizes());
  if (weight.numel() == 0) return {0, 0};
  CodedResult result;
  CodedParams p;
  p.M = weight.size(fan_in_fan_out ? 1 : 0), p.N = weight.size(fan_in_fan_out ? 0 : 1);
  p.weight = param_of(fan_in_fan_out ? weight.t() : weight);
  p.result = &result;
  run_checksums(p);
  return {int64_t(result.before), int64_t(result.after)};
}

at::Tensor empty_codes_kernel(const at::Tensor& weight) { return empty_result({weight.numel()}, weight, at::kChar); }

}  // namespace gralora
