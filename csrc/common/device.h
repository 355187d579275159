// What the current device is.
#pragma once
#include "common/check.h"

namespace fastshard {

// Major version times 10 plus minor: 86 for 8.6.
inline int compute_capability() {
  int device = 0, major = 0, minor = 0;
  FS_CUDA_CHECK(cudaGetDevice(&device));
  FS_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  FS_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  return major * 10 + minor;
}

}  // namespace fastshard
