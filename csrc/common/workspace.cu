// Workspaces by user, device, graph capture and stream.
#include "common/workspace.h"

#include <algorithm>
#include <bit>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "common/check.h"

namespace fastshard {
namespace workspace_detail {

constexpr int64_t kMinBytes = 1 << 20;

struct Block {
  WorkspaceUser user;
  int device;
  int64_t bytes;
  void* data;
};

using Key = std::tuple<WorkspaceUser, int, unsigned long long, cudaStream_t>;  // device, capture (0: none), stream

struct Pool {
  std::mutex mutex;
  std::map<Key, Block> in_use;
  std::vector<Block> free;  // of graphs that are gone
};

// Never destroyed: graphs may be, after the static objects.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

// Allocating is no part of a capture that may be under way.
struct RelaxedCapture {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  RelaxedCapture() { FS_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode)); }
  ~RelaxedCapture() { (void)cudaThreadExchangeStreamCaptureMode(&mode); }
};

Block allocate(WorkspaceUser user, int device, int64_t bytes) {
  const RelaxedCapture relaxed;
  Block block{user, device, bytes, nullptr};
  FS_CUDA_CHECK(cudaMalloc(&block.data, size_t(bytes)));
  cudaStream_t stream = nullptr;
  FS_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  FS_CUDA_CHECK(cudaMemsetAsync(block.data, 0xff, size_t(bytes), stream));
  FS_CUDA_CHECK(cudaStreamSynchronize(stream));
  FS_CUDA_CHECK(cudaStreamDestroy(stream));
  return block;
}

// What a graph holds of a block.
struct Loan {
  Key key;
  Block block;

  // Called by CUDA when the last executable of the graph is gone; may call nothing of CUDA.
  static void CUDART_CB end(void* loan) {
    Pool& all = pool();
    const std::lock_guard lock(all.mutex);
    const Loan* const self = static_cast<Loan*>(loan);
    all.free.push_back(self->block);
    const auto found = all.in_use.find(self->key);
    if (found != all.in_use.end() && found->second.data == self->block.data) all.in_use.erase(found);
    delete self;
  }
};

void lend(cudaGraph_t graph, const Key& key, const Block& block) {
  cudaUserObject_t object = nullptr;
  FS_CUDA_CHECK(cudaUserObjectCreate(&object, new Loan{key, block}, Loan::end, 1, cudaUserObjectNoDestructorSync));
  FS_CUDA_CHECK(cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove));
}

}  // namespace workspace_detail

Workspace workspace(WorkspaceUser user, int64_t bytes, cudaStream_t stream) {
  using namespace workspace_detail;
  int device = 0;
  FS_CUDA_CHECK(cudaGetDevice(&device));
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  cudaGraph_t graph = nullptr;
  FS_CUDA_CHECK(cudaStreamGetCaptureInfo(stream, &status, &capture, &graph));
  if (status != cudaStreamCaptureStatusActive) capture = 0;

  Pool& all = pool();
  const std::lock_guard lock(all.mutex);
  const Key key{user, device, capture, stream};
  const auto found = all.in_use.find(key);
  if (found != all.in_use.end() && found->second.bytes >= bytes) return {found->second.data, found->second.bytes};
  // One that has become too small stays: launches that use it may be pending.
  const int64_t size = int64_t(std::bit_ceil(uint64_t(std::max(bytes, kMinBytes))));
  const auto fits = [&](const Block& block) {
    return block.user == user && block.device == device && block.bytes >= size;
  };
  const auto reusable = std::find_if(all.free.begin(), all.free.end(), fits);
  Block block{};
  if (reusable != all.free.end()) {
    block = *reusable;
    all.free.erase(reusable);
  } else {
    block = allocate(user, device, size);
  }
  if (capture != 0) lend(graph, key, block);
  all.in_use.insert_or_assign(key, block);
  return {block.data, block.bytes};
}

}  // namespace fastshard
