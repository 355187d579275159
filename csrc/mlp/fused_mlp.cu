// Launcher of the small-row gated MLP kernel: one cooperative launch, or one plain launch a phase.
#include "mlp/fused_mlp.cuh"

namespace fastshard {
namespace fused_mlp_detail {

template <typename T, typename Config>
void launch(FusedMlpParams p, cudaStream_t stream) {
  using Storage = GemvSharedStorage<Config>;
  const auto kernel = fused_mlp_kernel<T, Config>;
  const int resident = max_resident_blocks<Storage>(kernel, Config::kThreads);
  const int gate_up_grid = gemv_grid<Config>(2 * int64_t(p.intermediate_size), resident);
  const int down_grid = gemv_grid<Config>(p.hidden_size, resident);
  if (supports_cooperative_launch()) {
    const int grid = std::max(gate_up_grid, down_grid);
    if (launch_cooperative_kernel<Storage>(kernel, dim3(grid), Config::kThreads, 0, stream, p)) return;
  }
  p.phase = MlpPhase::kGateUp;
  launch_kernel<Storage>(kernel, dim3(gate_up_grid), Config::kThreads, stream, p);
  p.phase = MlpPhase::kDown;
  launch_kernel<Storage>(kernel, dim3(down_grid), Config::kThreads, stream, p);
}

}  // namespace fused_mlp_detail

template <typename T>
void fused_mlp(const FusedMlpParams& p, cudaStream_t stream) {
  using namespace fused_mlp_detail;
  if (p.num_tokens == 0) return;
  if (p.num_tokens <= GemvNarrow::kMaxTokens) return launch<T, GemvNarrow>(p, stream);
  if (p.num_tokens <= GemvWide::kMaxTokens) return launch<T, GemvWide>(p, stream);
  throw std::runtime_error("fused_mlp: at most " + std::to_string(kFusedMlpMaxTokens) + " rows, got " +
                           std::to_string(p.num_tokens));
}
static_assert(kFusedMlpMaxTokens == GemvWide::kMaxTokens);

template void fused_mlp<__half>(const FusedMlpParams&, cudaStream_t);
template void fused_mlp<__nv_bfloat16>(const FusedMlpParams&, cudaStream_t);

}  // namespace fastshard
