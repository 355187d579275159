// Checks of CUDA calls below the torch boundary: failures are exceptions, which the dispatcher turns into RuntimeError.
#pragma once
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#define FS_STRINGIFY_(...) #__VA_ARGS__
#define FS_STRINGIFY(...) FS_STRINGIFY_(__VA_ARGS__)

#define FS_CUDA_CHECK(expr)                                                        \
  do {                                                                             \
    const cudaError_t fs_error = (expr);                                           \
    if (fs_error != cudaSuccess) ::fastshard::throw_cuda_error(fs_error, #expr);   \
  } while (0)

namespace fastshard {

constexpr int kCudaMajor = CUDART_VERSION / 1000;  // of the static runtime in the wheel
static_assert(kCudaMajor == 12 || kCudaMajor == 13, "kMinDriver knows CUDA 12 and 13");
constexpr int kMinDriver = kCudaMajor == 12 ? 525 : 580;  // CUDA release notes, minor version compatibility

// The error says what to do where the wheel holds no code for the device, or the driver is too old for its runtime.
[[noreturn]] inline void throw_cuda_error(cudaError_t error, const char* call) {
  (void)cudaGetLastError();  // leave no sticky error behind for the next launch
  std::string message = std::string("fastshard: ") + cudaGetErrorString(error) + " (" + call + ")";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
    int device = 0;
    cudaDeviceProp prop{};
    if (cudaGetDevice(&device) == cudaSuccess && cudaGetDeviceProperties(&prop, device) == cudaSuccess) {
      message = std::string("fastshard: no kernel for ") + prop.name + " (compute capability " +
                std::to_string(prop.major) + "." + std::to_string(prop.minor) + "); this build is compiled for " +
                FS_STRINGIFY(FASTSHARD_CUDA_ARCHS) + ". Install a wheel for this GPU, or build one with TORCH_CUDA_ARCH_LIST=\"" +
                std::to_string(prop.major) + "." + std::to_string(prop.minor) + "\"";
    }
  } else if (error == cudaErrorInsufficientDriver) {
    message += ": CUDA " + std::to_string(kCudaMajor) + " needs an NVIDIA driver of version " +
               std::to_string(kMinDriver) + " or newer";
  }
  throw std::runtime_error(message);
}

}  // namespace fastshard
