// The parts of the Python module, a file each.
#pragma once

#include <nanobind/nanobind.h>

namespace resilient_train {

// The CUDA device, and its errors.
void bind_device(nanobind::module_& m);

}  // namespace resilient_train
