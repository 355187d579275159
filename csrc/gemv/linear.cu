// Launcher of the small-row linear kernels: picks the one that holds the rows.
#include <algorithm>

#include "gemv/linear.cuh"

namespace fastshard {
namespace linear_detail {

// Blocks stride over tiles: as many as are resident together, one an SM.
template <typename T>
void launch(const LinearParams& p, cudaStream_t stream) {
  using Storage = LinearStorage<T>;
  const auto kernel = linear_kernel<T>;
  const int resident = max_resident_blocks<Storage>(kernel, kStreamThreads);
  launch_kernel<Storage>(kernel, dim3(std::min(resident, num_tiles(p.out_features))), kStreamThreads, stream, p);
}

template <typename T, typename Config>
void launch_wide(const LinearParams& p, cudaStream_t stream) {
  using Storage = GemvSharedStorage<Config>;
  const auto kernel = wide_linear_kernel<T, Config>;
  const int resident = max_resident_blocks<Storage>(kernel, Config::kThreads);
  launch_kernel<Storage>(kernel, dim3(gemv_grid<Config>(p.out_features, resident)), Config::kThreads, stream, p);
}

}  // namespace linear_detail

template <typename T>
void linear(const LinearParams& p, cudaStream_t stream) {
  using namespace linear_detail;
  if (p.num_tokens == 0 || p.out_features == 0) return;  // an empty grid is a launch error
  if (p.num_tokens <= kProductTokens) return launch<T>(p, stream);
  if (p.num_tokens <= GemvWide::kMaxTokens) return launch_wide<T, GemvWide>(p, stream);
  throw std::runtime_error("linear: at most " + std::to_string(kLinearMaxTokens) + " rows, got " +
                           std::to_string(p.num_tokens));
}
static_assert(kLinearMaxTokens == GemvWide::kMaxTokens && kLinearMaxStride == kStreamMaxStride);

template void linear<__half>(const LinearParams&, cudaStream_t);
template void linear<__nv_bfloat16>(const LinearParams&, cudaStream_t);

}  // namespace fastshard
