#pragma once

#include <cstdint>

namespace sdcore {

// Where a launch goes.
struct Place {
  int device;
  uintptr_t stream;
};

}  // namespace sdcore
