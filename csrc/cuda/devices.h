// The NVIDIA GPUs that the CUDA runtime sees.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace sdcore {

struct Device {
  std::string name;
  int major, minor;
  int multiprocessors;
  std::size_t shared_memory_per_block;  // The most that a kernel can opt in to.
  std::size_t l2_bytes;
  std::size_t memory_bytes;
};

// Empty where there is no GPU or no driver; throws where there is one that can't be used.
std::vector<Device> devices();

}  // namespace sdcore
