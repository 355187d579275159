// The one way to launch a kernel, and the one way to reach its shared memory.
//
// A kernel's shared memory is one struct, SharedStorage, in dynamic shared memory. launch_kernel takes that struct as a
// template argument (void for none), so that the 99 KB of a compute capability 8.6 block are checked when compiling.
// tests/emulator holds a twin of this file that runs the same kernels on a CPU.
#pragma once

#include "common/check.h"

// Inside a kernel: `name` is the block's SharedStorage. The constant is there to be read from the compiled code: see
// fastshard/bench/machine_code.py.
#define FS_SHARED_STORAGE(SharedStorage, name)                                                \
  __attribute__((used)) static __device__ const int fs_storage_bytes = sizeof(SharedStorage); \
  extern __shared__ __align__(128) unsigned char fs_shared_bytes[];                           \
  SharedStorage& name = *reinterpret_cast<SharedStorage*>(fs_shared_bytes)

// Records the extra_bytes of a kernel's launches in the same way.
#define FS_EXTRA_SHARED_BYTES(bytes) __attribute__((used)) static __device__ const int fs_extra_bytes = bytes

namespace fastshard {

constexpr int kMaxSharedBytes = 101376;  // a block on compute capability 8.6 (CUDA C++ Programming Guide, table 21)

template <typename SharedStorage>
constexpr int shared_bytes() {
  if constexpr (std::is_void_v<SharedStorage>) {
    return 0;
  } else {
    static_assert(sizeof(SharedStorage) <= kMaxSharedBytes, "more shared memory than a block of compute capability 8.6");
    return static_cast<int>(sizeof(SharedStorage));
  }
}

namespace launch_detail {

// False where a cooperative launch does not fit what the device has left for it.
template <typename SharedStorage, typename... KernelArgs>
bool launch(void (*kernel)(KernelArgs...), dim3 grid, int threads, int extra_bytes, cudaStream_t stream,
            bool cooperative, const std::type_identity_t<KernelArgs>&... args) {
  const int bytes = shared_bytes<SharedStorage>() + extra_bytes;
  if (bytes > 48 * 1024) {
    FS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, args...);
  if (cooperative && status == cudaErrorCooperativeLaunchTooLarge) {
    cudaGetLastError();  // it is dealt with
    return false;
  }
  FS_CUDA_CHECK(status);
  return true;
}

}  // namespace launch_detail

template <typename SharedStorage, typename... KernelArgs>
void launch_kernel(void (*kernel)(KernelArgs...), dim3 grid, int threads, cudaStream_t stream,
                   const std::type_identity_t<KernelArgs>&... args) {
  launch_detail::launch<SharedStorage>(kernel, grid, threads, 0, stream, false, args...);
}

// All blocks resident at once, so that they may wait for each other; take the grid from max_resident_blocks. False, and
// nothing launched, where they cannot be.
// extra_bytes: of shared memory behind the storage; the two together are at most kMaxSharedBytes.
template <typename SharedStorage, typename... KernelArgs>
bool launch_cooperative_kernel(void (*kernel)(KernelArgs...), dim3 grid, int threads, int extra_bytes,
                               cudaStream_t stream, const std::type_identity_t<KernelArgs>&... args) {
  return launch_detail::launch<SharedStorage>(kernel, grid, threads, extra_bytes, stream, true, args...);
}

// Blocks of this kernel that fit on the current device together.
template <typename SharedStorage, typename... KernelArgs>
int max_resident_blocks(void (*kernel)(KernelArgs...), int threads, int extra_bytes = 0) {
  const int bytes = shared_bytes<SharedStorage>() + extra_bytes;
  int device = 0, num_sms = 0, blocks_per_sm = 0;
  FS_CUDA_CHECK(cudaGetDevice(&device));
  FS_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  if (bytes > 48 * 1024) {
    FS_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  }
  FS_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, threads, bytes));
  return num_sms * blocks_per_sm;
}

// Whether the current device takes cooperative launches.
inline bool supports_cooperative_launch() {
  int device = 0, supported = 0;
  FS_CUDA_CHECK(cudaGetDevice(&device));
  FS_CUDA_CHECK(cudaDeviceGetAttribute(&supported, cudaDevAttrCooperativeLaunch, device));
  return supported != 0;
}

}  // namespace fastshard
