// Launcher of the small-row linear kernel: picks the configuration that holds the rows.
#include "gemv/linear.cuh"

namespace fastshard {
namespace linear_detail {

template <typename T, typename Config>
void launch(const LinearParams& p, cudaStream_t stream) {
  using Storage = GemvSharedStorage<Config>;
  const auto kernel = linear_kernel<T, Config>;
  const int resident = max_resident_blocks<Storage>(kernel, Config::kThreads);
  launch_kernel<Storage>(kernel, dim3(gemv_grid<Config>(p.out_features, resident)), Config::kThreads, stream, p);
}

}  // namespace linear_detail

template <typename T>
void linear(const LinearParams& p, cudaStream_t stream) {
  using namespace linear_detail;
  if (p.num_tokens == 0 || p.out_features == 0) return;  // an empty grid is a launch error
  if (p.num_tokens <= GemvNarrow::kMaxTokens) return launch<T, GemvNarrow>(p, stream);
  if (p.num_tokens <= GemvWide::kMaxTokens) return launch<T, GemvWide>(p, stream);
  throw std::runtime_error("linear: at most " + std::to_string(kLinearMaxTokens) + " rows, got " +
                           std::to_string(p.num_tokens));
}
static_assert(kLinearMaxTokens == GemvWide::kMaxTokens);

template void linear<__half>(const LinearParams&, cudaStream_t);
template void linear<__nv_bfloat16>(const LinearParams&, cudaStream_t);

}  // namespace fastshard
