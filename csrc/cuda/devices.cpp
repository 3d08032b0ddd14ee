#include "devices.h"

#include "runtime.h"

namespace sdcore {
namespace {

int device_count() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaErrorInsufficientDriver) {
    // Said of a driver that is too old, which is an error, and of none at all (version 0).
    int driver = 0;
    if (cudaDriverGetVersion(&driver) == cudaSuccess && driver == 0) return 0;
  }
  if (status == cudaErrorNoDevice) return 0;
  check(status, "cudaGetDeviceCount");
  return count;
}

}  // namespace

std::vector<Device> devices() {
  std::vector<Device> found;
  for (int index = 0, count = device_count(); index < count; ++index) {
    cudaDeviceProp properties;
    SDCORE_CUDA(cudaGetDeviceProperties(&properties, index));
    found.push_back({properties.name, properties.major, properties.minor,
                     properties.multiProcessorCount, properties.sharedMemPerBlockOptin,
                     static_cast<std::size_t>(properties.l2CacheSize), properties.totalGlobalMem});
  }
  return found;
}

}  // namespace sdcore
