// SPDX-License-Identifier: Apache-2.0
#include "explain_bindings.h"

#include <pybind11/stl.h>

#include <map>
#include <string>

#include "cpu/plan.h"
#include "cuda/plan.h"

namespace gralora {
namespace {

using pybind11::dict;

// An unknown word is an IndexError: the command line asks before.
DType dtype_named(const std::string& word) {
  static const std::map<std::string, DType> kNamed = {
      {"float32", DType::f32}, {"bfloat16", DType::bf16}, {"float16", DType::f16}, {"float64", DType::f64}};
  return kNamed.at(word);
}

template <class Enum>
Enum enum_named(const std::string& word, std::initializer_list<Enum> all) {
  std::map<std::string, Enum> named;
  for (const Enum value : all) named[cpu::name(value)] = value;
  return named.at(word);
}

cpu::Machine machine_with(const dict& changes) {
  using cpu::Capability, cpu::Vendor;
  cpu::Machine machine = cpu::machine();
  for (const auto& [key, value] : changes) {
    const auto word = key.cast<std::string>();
    if (word == "capability")
      machine.capability =
          enum_named(value.cast<std::string>(), {Capability::Default, Capability::Avx2, Capability::Avx512});
    else if (word == "vendor")
      machine.vendor = enum_named(value.cast<std::string>(), {Vendor::Amd, Vendor::Intel, Vendor::Other});
    else if (word == "bf16_instructions")
      machine.bf16_instructions = value.cast<bool>();
    else if (word == "amx")
      machine.amx = value.cast<bool>();
    else
      throw pybind11::key_error(word);
  }
  return machine;
}

// ------------------------------------------------------------------ the params of a pass

// Where a plan asks whether a tensor is there, and how it is aligned: never read.
alignas(64) char kAligned[64];

struct Case {
  Shape shape;
  DType activations, parameters;
  int threads;
  bool dropout;

  explicit Case(const dict& from)
      : activations(dtype_named(from["activations"].cast<std::string>())),
        parameters(dtype_named(from["parameters"].cast<std::string>())),
        threads(from["threads"].cast<int>()),
        dropout(from["dropout"].cast<bool>()) {
    const auto number = [&](const char* name) { return from[name].cast<int64_t>(); };
    shape = {number("T"), number("N"), number("M"), number("k"), number("r"), number("h")};
  }

  bool f64() const { return activations == DType::f64 || parameters == DType::f64; }
  bool u_bf16() const { return activations == DType::bf16 && parameters == DType::bf16; }
  Activation activation(int64_t width) const {
    Activation x;
    x.data = kAligned, x.dtype = activations, x.leading_dims = 1, x.sizes[0] = shape.T, x.strides[0] = width;
    return x;
  }
  Param param(int64_t rows, int64_t columns, bool there = true) const {
    return there ? Param{kAligned, parameters, rows * columns, columns, 1} : Param{};
  }
  Adapter adapter() const {
    const Shape& s = shape;
    return {param(s.N / s.k, s.r), param(s.r, s.M / s.k), param(s.h, s.N, s.h > 0), param(s.M, s.h, s.h > 0)};
  }

  ForwardParams forward() const {
    ForwardParams p;
    p.shape = shape, p.adapter = adapter();
    p.x = activation(shape.N), p.base = p.y = activation(shape.M);
    p.u = kAligned, p.u_bf16 = u_bf16(), p.accumulate_f64 = f64(), p.threads = threads;
    p.dropout.p = dropout ? 0.1 : 0.0;
    return p;
  }
  BackwardParams backward() const {
    BackwardParams p;
    p.shape = shape, p.adapter = p.grad = adapter();
    p.x = p.grad_x = activation(shape.N), p.grad_y = activation(shape.M);
    p.u = kAligned, p.u_bf16 = u_bf16(), p.accumulate_f64 = f64(), p.threads = threads;
    p.dropout.p = dropout ? 0.1 : 0.0;
    return p;
  }
  // fan_in_fan_out: the weight lies as [N, M], as a Conv1D's
  MergeParams merge(bool fan_in_fan_out) const {
    MergeParams p;
    p.shape = shape, p.adapter = adapter();
    p.weight = {kAligned, activations, 0, fan_in_fan_out ? 1 : shape.N, fan_in_fan_out ? shape.M : 1};
    p.accumulate_f64 = f64(), p.threads = threads;
    return p;
  }
  LinearParams linear() const {
    LinearParams p;
    p.shape = shape, p.adapter = adapter();
    p.in = activation(shape.N), p.out = activation(shape.M);
    p.weight = {kAligned, activations, 0, shape.N, 1};
    p.accumulate_f64 = f64(), p.threads = threads;
    return p;
  }
};

// ------------------------------------------------------------------ plans as dicts

// In the order of the enumerators
const char* name(cpu::Product product) {
  constexpr const char* kNames[] = {"float32", "float64", "bfloat16 pairs", "bfloat16 by AMX", "split bfloat16 by AMX"};
  return kNames[int(product)];
}
const char* name(cpu::Schedule schedule) {
  constexpr const char* kNames[] = {"few tokens", "by tokens", "by columns"};
  return kNames[int(schedule)];
}
const char* name(cpu::Reading reading) {
  constexpr const char* kNames[] = {"in place", "copied", "copied with dropout"};
  return kNames[int(reading)];
}
const char* name(cpu::Packing packing) {
  constexpr const char* kNames[] = {"absent", "in place", "packed", "packed as pairs", "packed in pieces"};
  return kNames[int(packing)];
}

dict of(const cpu::Machine& m) {
  dict to;
  to["vendor"] = cpu::name(m.vendor), to["capability"] = cpu::name(m.capability);
  to["bf16_instructions"] = m.bf16_instructions, to["amx"] = m.amx;
  to["l1_bytes"] = m.l1.bytes, to["l1_ways"] = m.l1.ways, to["l2_bytes"] = m.l2.bytes, to["l2_ways"] = m.l2.ways;
  return to;
}

dict of(const cpu::ForwardPlan& plan) {
  dict to;
  to["product"] = name(plan.product), to["schedule"] = name(plan.schedule), to["threads"] = plan.threads;
  to["x"] = name(plan.x), to["A"] = name(plan.A), to["B"] = name(plan.B);
  to["A_general"] = name(plan.A_general), to["B_general"] = name(plan.B_general);
  to["chunk"] = plan.chunks.columns, to["chunks"] = plan.chunks.count;
  to["segment"] = plan.segment, to["strip"] = plan.strip;
  to["blocks_per_strip"] = plan.blocks_per_strip, to["whole_blocks"] = plan.whole_blocks;
  return to;
}

dict of(const cpu::BackwardPlan& plan) {
  dict to;
  to["product"] = name(plan.product), to["schedule"] = name(plan.schedule), to["threads"] = plan.threads;
  to["g"] = name(plan.g), to["x"] = name(plan.x), to["A"] = name(plan.A), to["B"] = name(plan.B);
  to["A_general"] = name(plan.A_general), to["B_general"] = name(plan.B_general);
  to["remakes_U"] = plan.remakes_U, to["A_for_U"] = name(plan.A_for_U);
  to["A_general_for_U"] = name(plan.A_general_for_U);
  to["chunk_of_g"] = plan.chunks_of_g.columns, to["chunks_of_g"] = plan.chunks_of_g.count;
  to["chunk_of_x"] = plan.chunks_of_x.columns, to["chunks_of_x"] = plan.chunks_of_x.count;
  to["segment"] = plan.segment, to["segments"] = plan.segments, to["wave"] = plan.wave;
  to["whole_blocks"] = plan.whole_blocks;
  return to;
}

dict of(const cpu::MergePlan& plan) {
  dict to;
  to["threads"] = plan.threads, to["along_N"] = plan.along_N, to["rows"] = plan.rows, to["strip"] = plan.strip;
  to["prefetches"] = plan.prefetches, to["left"] = name(plan.left), to["right"] = name(plan.right);
  to["left_general"] = name(plan.left_general), to["right_general"] = name(plan.right_general);
  return to;
}

dict of(const cpu::LinearPlan& plan) {
  dict to;
  to["threads"] = plan.threads, to["in"] = name(plan.in);
  to["left"] = name(plan.left), to["left_general"] = name(plan.left_general);
  to["chunk"] = plan.chunks.columns, to["chunks"] = plan.chunks.count;
  to["chunks_per_panel"] = plan.chunks_per_panel, to["strip"] = plan.strip, to["segment"] = plan.segment;
  to["tokens_together"] = plan.tokens_together;
  return to;
}

}  // namespace

dict explain(const dict& case_, const dict& machine) {
  const Case c(case_);
  const cpu::Machine m = machine_with(machine);
  BackwardParams without_U = c.backward();
  without_U.u = nullptr;
  dict to;
  to["machine"] = of(m), to["forward"] = of(cpu::plan(c.forward(), m)), to["backward"] = of(cpu::plan(c.backward(), m));
  to["backward_without_U"] = of(cpu::plan(without_U, m));
  to["merge"] = of(cpu::plan(c.merge(false), m)), to["merge_fan_in_fan_out"] = of(cpu::plan(c.merge(true), m));
  to["linear"] = of(cpu::plan(c.linear(), m));
  const BackwardParams pass = c.backward();
  dict on_cuda;
  on_cuda["from compute capability 8.0 on"] =
      cuda::has_tensor_core_kernels(pass.x.dtype, pass.adapter.A.dtype) ? "tensor cores" : "plain kernels";
  on_cuda["before"] = "plain kernels";
  to["cuda"] = on_cuda;
  return to;
}

}  // namespace gralora
