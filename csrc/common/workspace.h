// Device memory that outlives a launch, for kernels whose blocks tell each other things.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastshard {

// Every word of a new workspace: a NaN that no arithmetic gives. A value that takes its place says by itself that it is
// there.
constexpr uint32_t kUnwritten = 0xffffffff;

// Whose launches share a workspace, one after another.
enum class WorkspaceUser { kDecodeAttention, kFusedMlp };

struct Workspace {
  void* data;
  int64_t bytes;
};

// At least `bytes` bytes, 256-byte aligned, on the current device: kUnwritten words at first, then as the last launch
// of this user left it. All calls for the same memory get the same number of bytes.
//
// Launches that may run at the same time never share it: each stream has its own, and each stream of each graph
// capture, which goes back when the graph and its executables are destroyed.
Workspace workspace(WorkspaceUser user, int64_t bytes, cudaStream_t stream);

}  // namespace fastshard
