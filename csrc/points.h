// Point sets as callers hold them: any strides, any format.
#pragma once

#include <cstdint>

namespace sdcore {

enum class Format { float32, float64, float16, bfloat16 };

// [batch, count, dim] with strides in elements.
struct Points {
  void* data;
  Format format;
  int64_t batch, count, dim;
  int64_t stride[3];
};

}  // namespace sdcore
