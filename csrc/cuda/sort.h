// Radix sort of unsigned integers, alone or with 32-bit payload: CUB's, which a CUDA graph can hold.
#pragma once

#include <cstddef>
#include <cstdint>

#include "place.h"

namespace sdcore {

// Both buffers hold `count` elements; the first of each what is to be sorted.
struct SortBuffers {
  void* keys[2];
  void* payload[2];  // null: none
  int key_bytes;     // 4 or 8
  int64_t count;
};

// Bytes of work memory that sorting by the lowest `bits` bits takes.
size_t radix_sort_workspace(int64_t count, int key_bytes, bool with_payload, int bits, int device);

// Sorts by the lowest `bits` bits, stably, and returns which of the buffers holds the result.
int radix_sort(const SortBuffers& buffers, int bits, void* workspace, size_t bytes, Place place);

}  // namespace sdcore
