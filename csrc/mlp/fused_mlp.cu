// Launcher of the small-row gated MLP kernel: one cooperative launch, or one plain launch a phase.
#include "mlp/fused_mlp.cuh"

#include <algorithm>
#include <stdexcept>
#include <string>

#include "common/workspace.h"

namespace fastshard {
namespace fused_mlp_detail {

// Of the down product. With few rows a block reads all of hidden, most of it while others still write the rest; with
// more that would be as many bytes from L2 as half of the weights.
inline int down_parts(const FusedMlpParams& p, int grid) {
  const int slices = (num_chunks(p.intermediate_size) + kSliceChunks - 1) / kSliceChunks;
  return p.num_tokens > 8 && grid >= 2 * slices ? slices : 1;
}

template <typename T, int kTokens>
void launch(FusedMlpParams p, cudaStream_t stream) {
  using Storage = FusedMlpStorage<T, kTokens>;
  const auto kernel = fused_mlp_kernel<T, kTokens>;
  const int resident = max_resident_blocks<Storage>(kernel, kStreamThreads);
  const dim3 grid(std::min(resident, std::max(num_tiles(2 * p.intermediate_size), num_tiles(p.hidden_size))));
  p.parts = down_parts(p, int(grid.x));
  const int64_t words = kMlpTurnsWords + 2 * (mlp_place_words(p) + 3);
  const Workspace memory = workspace(WorkspaceUser::kFusedMlp, words * int64_t(sizeof(uint32_t)), stream);
  p.workspace = static_cast<uint32_t*>(memory.data);
  p.half_words = (memory.bytes / 4 - kMlpTurnsWords) / 8 * 4;  // whole 16 bytes
  if (supports_cooperative_launch() &&
      launch_cooperative_kernel<Storage>(kernel, grid, kStreamThreads, 0, stream, p)) {
    return;
  }
  for (const MlpPhase phase : {MlpPhase::kGateUp, MlpPhase::kDown, MlpPhase::kAdd}) {
    if (phase == MlpPhase::kAdd && p.parts == 1) break;
    p.phase = phase;
    launch_kernel<Storage>(kernel, grid, kStreamThreads, stream, p);
  }
}

}  // namespace fused_mlp_detail

template <typename T>
void fused_mlp(const FusedMlpParams& p, cudaStream_t stream) {
  using namespace fused_mlp_detail;
  if (p.num_tokens == 0) return;
  if (p.num_tokens <= 8) return launch<T, 8>(p, stream);
  if (p.num_tokens <= 16) return launch<T, 16>(p, stream);
  throw std::runtime_error("fused_mlp: at most " + std::to_string(kFusedMlpMaxTokens) + " rows, got " +
                           std::to_string(p.num_tokens));
}
static_assert(kFusedMlpMaxTokens == 16);

template void fused_mlp<__half>(const FusedMlpParams&, cudaStream_t);
template void fused_mlp<__nv_bfloat16>(const FusedMlpParams&, cudaStream_t);

}  // namespace fastshard
