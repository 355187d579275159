// Device memory that outlives a launch, for kernels whose blocks tell each other things.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastshard {

// At least `bytes` bytes, each 0xff, 256-byte aligned, on the current device. The kernel must leave every byte 0xff.
//
// Launches that may run at the same time never share it: each stream has its own, and each stream of each graph
// capture, which goes back when the graph and its executables are destroyed.
void* workspace(int64_t bytes, cudaStream_t stream);

}  // namespace fastshard
