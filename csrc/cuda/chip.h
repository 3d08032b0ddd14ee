// What launches must know of a GPU and of the machine code that it runs.
#pragma once

namespace sdcore {

struct Chip {
  int multiprocessors;
  int shared_per_block;  // bytes, the most that a kernel can opt in to
  // Whether kernels were compiled for Hopper or later, and so have what async.cuh is about. A newer
  // GPU may run older code.
  bool has_copy_engine;
};

// Asked once per device.
Chip chip(int device);

}  // namespace sdcore
