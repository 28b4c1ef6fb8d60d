// SPDX-License-Identifier: Apache-2.0
// Runs one kernel of defects.cu in a process of its own, as the sanitizers need it. Each buffer is a heap block of its
// exact size. Arguments: name, order, seed, copies. Exits with 0, 3 (the launch failed) or 4 (the result is wrong).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>

#include "intrinsics.cuh"

extern "C" int launch_defect(const char* name, const float* x, float* result, int blocks);

int main(int argc, char** argv) {
  if (argc != 5) return 2;
  constexpr int kBlocks = 3, kLength = 64;
  const std::unique_ptr<float[]> x(new float[kBlocks * kLength]), result(new float[kBlocks * kLength]);
  for (int i = 0; i < kBlocks * kLength; i++) x[i] = float(i), result[i] = NAN;
  if (gralora_emulator_configure(atoi(argv[2]), strtoull(argv[3], nullptr, 10), atoi(argv[4])) != 0 ||
      launch_defect(argv[1], x.get(), result.get(), kBlocks) != 0) {
    fprintf(stderr, "%s\n", gralora_emulator_error());
    return 3;
  }
  for (int i = 0; i < kBlocks * kLength; i++)
    if (result[i] != x[i / kLength * kLength + (i + 1) % kLength]) {
      fprintf(stderr, "result[%d] is %g\n", i, double(result[i]));
      return 4;
    }
  return 0;
}
