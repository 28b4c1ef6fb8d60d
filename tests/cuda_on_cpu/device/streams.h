// SPDX-License-Identifier: Apache-2.0
// This thread's current device and stream, as a launch finds them.
#pragma once

#include <c10/core/Stream.h>

namespace gralora::device {

constexpr c10::StreamId kStreams = 256;  // of a device; 0 is its default stream

void* handle_of(c10::DeviceIndex device, c10::StreamId stream);
void* current_handle();
c10::DeviceIndex current_index();

}  // namespace gralora::device
