// Searching what is sorted, from a place that is mostly near.
#pragma once

#include <cstdint>

namespace sdcore {

// Of `low`, for which `is` fails, and `high`, for which it holds, as from some place between them on:
// the first for which it holds.
template <typename Is>
__device__ __forceinline__ uint32_t first_between(uint32_t low, uint32_t high, Is&& is) {
  while (high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    if (is(middle)) {
      high = middle;
    } else {
      low = middle;
    }
  }
  return high;
}

// The smallest i from `start` to `end` for which `is` holds, `end` if none: `is` holds from some i
// on. Steps double.
template <typename Is>
__device__ __forceinline__ uint32_t first_where(uint32_t start, uint32_t end, Is&& is) {
  if (start >= end || is(start)) return start;
  uint32_t low = start, step = 1;
  while (step < end - low && !is(low + step)) {
    low += step;
    step *= 2;
  }
  return first_between(low, step < end - low ? low + step : end, is);
}

// The smallest i from which on, up to `start`, `is` holds, as it does at `start`.
template <typename Is>
__device__ __forceinline__ uint32_t last_run(uint32_t start, Is&& is) {
  uint32_t high = start, step = 1;
  while (step <= high && is(high - step)) {
    high -= step;
    step *= 2;
  }
  if (step > high && (high == 0 || is(0))) return 0;
  return first_between(step > high ? 0 : high - step, high, is);
}

}  // namespace sdcore
