// What every file of sdcore._cuda needs of the CUDA runtime: checked calls and a device guard.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace sdcore {

// A failed call becomes a RuntimeError in Python that says what CUDA said.
inline void check(cudaError_t status, const char* call) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // Or the next checked launch would report this error as its own.
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ") from " + call);
}

#define SDCORE_CUDA(call) ::sdcore::check((call), #call)

// Makes a device current, and the previous one again at the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    SDCORE_CUDA(cudaGetDevice(&previous_));
    if (previous_ != device_) SDCORE_CUDA(cudaSetDevice(device_));
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int previous_ = 0;
};

}  // namespace sdcore
