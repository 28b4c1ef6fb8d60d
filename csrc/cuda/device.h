// SPDX-License-Identifier: Apache-2.0
// What a pass must know of the device that it runs on.
#pragma once

namespace gralora::cuda {

struct Device {
  int capability;  // 80 for 8.0; 0 where there is none
  int multiprocessors;
};

}  // namespace gralora::cuda
