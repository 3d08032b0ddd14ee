// Hopper's copy engine, barriers that it signals, and launches that overlap: on sm_90 and later. For
// earlier chips SDCORE_COPY_ENGINE is 0 and kernels copy by themselves.
#pragma once

#include <cstdint>
#include <utility>

#include "chip.h"
#include "launch.cuh"

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define SDCORE_COPY_ENGINE 1
#else
#define SDCORE_COPY_ENGINE 0
#endif

namespace sdcore {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// One element to shared memory, by the thread; waited for by `cp.async`'s own groups or a barrier.
template <typename T>
__device__ __forceinline__ void copy_1(T* to, const T* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(shared_address(to)), "l"(from),
               "n"(sizeof(T))
               : "memory");
}

// Threads of some warps wait for each other, by a barrier other than that of __syncthreads.
__device__ __forceinline__ void sync_some(int threads) {
  asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory");
}

// A kernel that is launched early may start while the one before it on the stream runs. It
// must not touch what that one, or any earlier one, reads or writes until this returns.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if SDCORE_COPY_ENGINE
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// From here on, the next kernel may take what room there is.
__device__ __forceinline__ void let_next_kernel_start() {
#if SDCORE_COPY_ENGINE
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#if SDCORE_COPY_ENGINE
__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// Between the last barrier_init and the __syncthreads after it.
__device__ __forceinline__ void barriers_made() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and has the barrier wait for so many bytes.
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}
// Arrives when the thread's own copies so far have.
__device__ __forceinline__ void barrier_arrive_with_copies(uint64_t* barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(
                   shared_address(barrier))
               : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// Addresses and bytes are multiples of 16.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, uint32_t bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}
// Out of shared memory, after copy_out_ready() by all who wrote there and a barrier among them; the
// memory may go when copied_out() returns.
__device__ __forceinline__ void copy_out_ready() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void copy_out(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ __forceinline__ void copied_out() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
#endif

// A launch; with `early`, one that need not wait for the end of the kernel before it. That kernel
// must begin with wait_for_earlier_kernels().
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, int64_t bytes,
            Place place, bool early, const char* name, Arguments&&... arguments) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = stream_of(place);
  config.attrs = &attribute;
  config.numAttrs = early && chip(place.device).has_copy_engine ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

}  // namespace sdcore
