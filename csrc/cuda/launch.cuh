// From run-time arguments to launches: sizes of grids, and template arguments.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "place.h"
#include "runtime.h"

namespace sdcore {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline unsigned grid(int64_t blocks) {
  if (blocks > std::numeric_limits<int>::max()) {
    throw std::invalid_argument("a launch of " + std::to_string(blocks) +
                                " blocks: batch and points are too many for one call");
  }
  return static_cast<unsigned>(blocks);
}

template <typename Kernel>
void allow_shared_memory(Kernel kernel, int64_t bytes) {
  SDCORE_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(bytes)));
}

// Calls `body` with the number of coordinates as a constant.
template <typename Body>
void with_dim(int64_t dim, Body&& body) {
  switch (dim) {
    case 1:
      return body(std::integral_constant<int, 1>());
    case 2:
      return body(std::integral_constant<int, 2>());
    case 3:
      return body(std::integral_constant<int, 3>());
    case 4:
      return body(std::integral_constant<int, 4>());
  }
  throw std::invalid_argument("points must have 1 to 4 coordinates; got " + std::to_string(dim));
}

// Calls `body` with a value of the type that arithmetic is in.
template <typename Body>
void with_real(bool is_double, Body&& body) {
  if (is_double) {
    body(double());
  } else {
    body(float());
  }
}

inline cudaStream_t stream_of(Place place) { return reinterpret_cast<cudaStream_t>(place.stream); }

}  // namespace sdcore
