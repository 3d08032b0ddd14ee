#include "ceilings.h"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "runtime.h"

namespace sdcore {
namespace {

constexpr std::int64_t kMost32 = 0xffffffff;

__device__ __forceinline__ std::uint32_t scramble(std::uint32_t x) {  // MurmurHash3's finalizer
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// A pseudo-random sequence of table slots. Bank conflicts, which set the speed, depend on the
// lanes of a warp being independent of one another in each step: the scrambled starting points
// see to that, and a linear congruential generator suffices after them. A step is two integer
// instructions. Shared memory takes 3.5 cycles for a warp of random addresses (the fullest of 32
// banks has 3.5 of them on average), in which a multiprocessor issues 14 instructions or so.
class Slots {
 public:
  __device__ Slots(std::uint64_t seed, std::uint32_t bins) : bins_(bins) {
    const std::uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x;
    const std::uint32_t low = static_cast<std::uint32_t>(seed);
    const std::uint32_t high = static_cast<std::uint32_t>(seed >> 32);
    state_ = scramble(thread ^ scramble(low ^ scramble(high)));
  }
  __device__ __forceinline__ std::uint32_t next() {
    state_ = state_ * 1664525u + 1013904223u;
    return __umulhi(state_, bins_);  // The generator's high bits are its good ones.
  }

 private:
  std::uint32_t state_, bins_;
};

__global__ void __launch_bounds__(1024)
    count_kernel(std::uint32_t* __restrict__ out, std::uint32_t bins, std::uint32_t updates,
                 std::uint64_t seed) {
  extern __shared__ std::uint32_t counts[];
  for (std::uint32_t bin = threadIdx.x; bin < bins; bin += blockDim.x) counts[bin] = 0;
  __syncthreads();
  Slots slots(seed, bins);
#pragma unroll 16
  for (std::uint32_t i = 0; i < updates; ++i) atomicAdd(&counts[slots.next()], 1u);
  __syncthreads();
  for (std::uint32_t bin = threadIdx.x; bin < bins; bin += blockDim.x) {
    if (counts[bin] != 0) atomicAdd(&out[bin], counts[bin]);
  }
}

__global__ void __launch_bounds__(1024)
    gather_kernel(const float* __restrict__ table, std::uint32_t bins, float* __restrict__ out,
                  std::uint32_t reads, std::uint64_t seed) {
  extern __shared__ float entries[];
  for (std::uint32_t bin = threadIdx.x; bin < bins; bin += blockDim.x) entries[bin] = table[bin];
  __syncthreads();
  Slots slots(seed, bins);
  // Four sums, or each addition would wait for the one before it.
  float sums[4] = {};
  std::uint32_t left = reads;
  for (; left >= 16; left -= 16) {
#pragma unroll
    for (int i = 0; i < 16; ++i) sums[i % 4] += entries[slots.next()];
  }
  for (; left > 0; --left) sums[0] += entries[slots.next()];
  const std::int64_t thread = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  out[thread] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

void expect(bool holds, const std::string& name, std::int64_t value, const std::string& what) {
  if (!holds) {
    throw std::invalid_argument(name + " must be " + what + "; got " + std::to_string(value));
  }
}

void expect_range(const std::string& name, std::int64_t value, std::int64_t most) {
  expect(1 <= value && value <= most, name, value, "from 1 to " + std::to_string(most));
}

void expect_pointer(const std::string& name, std::uintptr_t pointer) {
  expect(pointer != 0 && pointer % 4 == 0, name, static_cast<std::int64_t>(pointer),
         "the address of 32-bit elements");
}

// What both kernels ask of their arguments. Returns the bytes of shared memory.
int check_launch(std::int64_t bins, const std::string& count_name, std::int64_t count,
                 std::int64_t blocks, std::int64_t threads, int device) {
  // The product of the three fits in 32 bits: no counter can overflow, and each thread has a
  // number of its own.
  expect_range("threads", threads, 1024);
  expect_range("blocks", blocks, std::min<std::int64_t>(0x7fffffff, kMost32 / threads));
  expect_range(count_name, count, kMost32 / (blocks * threads));
  int devices = 0;
  SDCORE_CUDA(cudaGetDeviceCount(&devices));
  expect(0 <= device && device < devices, "device", device,
         "from 0 to " + std::to_string(devices - 1));
  int shared_bytes = 0;
  SDCORE_CUDA(
      cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  expect_range("bins", bins, shared_bytes / 4);
  return static_cast<int>(4 * bins);
}

template <typename Kernel>
void allow_shared_memory(Kernel kernel, int bytes) {
  // More than 48 KB a block has to be asked for; and as much of the multiprocessor's memory as
  // it can have as shared memory, so that the L1 cache doesn't cost resident blocks.
  SDCORE_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  SDCORE_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                   cudaSharedmemCarveoutMaxShared));
}

}  // namespace

void shared_atomics(std::uintptr_t out, std::int64_t bins, std::int64_t updates_per_thread,
                    std::int64_t blocks, std::int64_t threads, std::uint64_t seed, int device,
                    std::uintptr_t stream) {
  expect_pointer("out", out);
  const int bytes =
      check_launch(bins, "updates_per_thread", updates_per_thread, blocks, threads, device);
  const DeviceGuard guard(device);
  allow_shared_memory(count_kernel, bytes);
  count_kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), bytes,
                 reinterpret_cast<cudaStream_t>(stream)>>>(
      reinterpret_cast<std::uint32_t*>(out), static_cast<std::uint32_t>(bins),
      static_cast<std::uint32_t>(updates_per_thread), seed);
  check(cudaGetLastError(), "the launch of shared_atomics");
}

void shared_gathers(std::uintptr_t table, std::int64_t bins, std::uintptr_t out,
                    std::int64_t reads_per_thread, std::int64_t blocks, std::int64_t threads,
                    std::uint64_t seed, int device, std::uintptr_t stream) {
  expect_pointer("table", table);
  expect_pointer("out", out);
  const int bytes =
      check_launch(bins, "reads_per_thread", reads_per_thread, blocks, threads, device);
  const DeviceGuard guard(device);
  allow_shared_memory(gather_kernel, bytes);
  gather_kernel<<<static_cast<unsigned>(blocks), static_cast<unsigned>(threads), bytes,
                  reinterpret_cast<cudaStream_t>(stream)>>>(
      reinterpret_cast<const float*>(table), static_cast<std::uint32_t>(bins),
      reinterpret_cast<float*>(out), static_cast<std::uint32_t>(reads_per_thread), seed);
  check(cudaGetLastError(), "the launch of shared_gathers");
}

}  // namespace sdcore
