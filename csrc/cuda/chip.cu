#include "chip.h"

#include <map>
#include <mutex>

#include "runtime.h"

namespace sdcore {
namespace {

// Compiled as all kernels are.
__global__ void probe() {}

Chip ask(int device) {
  const DeviceGuard guard(device);
  Chip found;
  SDCORE_CUDA(cudaDeviceGetAttribute(&found.multiprocessors, cudaDevAttrMultiProcessorCount,
                                     device));
  SDCORE_CUDA(cudaDeviceGetAttribute(&found.shared_per_block,
                                     cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  cudaFuncAttributes code;
  SDCORE_CUDA(cudaFuncGetAttributes(&code, probe));
  found.has_copy_engine = code.ptxVersion >= 90;
  return found;
}

}  // namespace

Chip chip(int device) {
  static std::mutex mutex;
  static std::map<int, Chip> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto at = known.find(device);
  return at != known.end() ? at->second : known.emplace(device, ask(device)).first->second;
}

}  // namespace sdcore
