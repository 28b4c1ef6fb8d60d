// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <Python.h>

namespace gralora {

// Methods of the Python module that a layer calls at each forward, with an empty one at their end
extern PyMethodDef eager_methods[];

}  // namespace gralora
