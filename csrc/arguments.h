// Tensors as Python hands them to a compiled module: addresses, sizes and strides.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <tuple>

#include "points.h"

namespace sdcore {

using Address = uintptr_t;  // 0 for an absent tensor
// (address, format, [batch, count, dim], strides in elements)
using PointsArgument =
    std::tuple<Address, std::string, std::array<int64_t, 3>, std::array<int64_t, 3>>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

inline Format to_format(const std::string& name) {
  if (name == "float32") return Format::float32;
  if (name == "float64") return Format::float64;
  if (name == "float16") return Format::float16;
  if (name == "bfloat16") return Format::bfloat16;
  throw pybind11::value_error("unknown format " + name);
}

inline Points to_points(const PointsArgument& argument) {
  const auto& [address, format, shape, stride] = argument;
  return {at<void>(address), to_format(format), shape[0],
          shape[1],          shape[2],          {stride[0], stride[1], stride[2]}};
}

}  // namespace sdcore
