#include "sort.h"

#include <cub/device/device_radix_sort.cuh>
#include <limits>
#include <stdexcept>
#include <string>

#include "launch.cuh"

namespace sdcore {
namespace {

// With a null workspace, CUB writes to `bytes` what it needs and does nothing else.
template <typename Key>
int sort(const SortBuffers& buffers, int bits, void* workspace, size_t& bytes,
         cudaStream_t stream) {
  if (buffers.count > std::numeric_limits<int>::max()) {
    throw std::invalid_argument("sorting takes up to 2^31 - 1 elements; got " +
                                std::to_string(buffers.count));
  }
  const int count = static_cast<int>(buffers.count);
  cub::DoubleBuffer<Key> keys(static_cast<Key*>(buffers.keys[0]),
                              static_cast<Key*>(buffers.keys[1]));
  if (!buffers.payload[0]) {
    check(cub::DeviceRadixSort::SortKeys(workspace, bytes, keys, count, 0, bits, stream),
          "cub::DeviceRadixSort::SortKeys");
    return keys.selector;
  }
  cub::DoubleBuffer<uint32_t> payload(static_cast<uint32_t*>(buffers.payload[0]),
                                      static_cast<uint32_t*>(buffers.payload[1]));
  check(cub::DeviceRadixSort::SortPairs(workspace, bytes, keys, payload, count, 0, bits, stream),
        "cub::DeviceRadixSort::SortPairs");
  return keys.selector;  // the payload's is the same
}

}  // namespace

size_t radix_sort_workspace(int64_t count, int key_bytes, bool with_payload, int bits,
                            int device) {
  const DeviceGuard guard(device);
  size_t bytes = 0;
  char any = 0;  // an address that is not null, for CUB to see that there is a payload
  void* payload = with_payload ? &any : nullptr;
  const SortBuffers buffers = {{nullptr, nullptr}, {payload, payload}, key_bytes, count};
  if (key_bytes == 8) {
    sort<unsigned long long>(buffers, bits, nullptr, bytes, nullptr);
  } else {
    sort<uint32_t>(buffers, bits, nullptr, bytes, nullptr);
  }
  return bytes;
}

int radix_sort(const SortBuffers& buffers, int bits, void* workspace, size_t bytes, Place place) {
  const DeviceGuard guard(place.device);
  if (buffers.key_bytes == 8) {
    return sort<unsigned long long>(buffers, bits, workspace, bytes, stream_of(place));
  }
  return sort<uint32_t>(buffers, bits, workspace, bytes, stream_of(place));
}

}  // namespace sdcore
