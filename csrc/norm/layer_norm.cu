// Launcher of the LayerNorm kernel.
#include "norm/layer_norm.cuh"

namespace fastshard {

template <typename T>
void layer_norm(const LayerNormParams& p, cudaStream_t stream) {
  constexpr int64_t kManyRows = 1024;  // more than run at once: rows wait for rows, not for their own latencies
  const auto launch = [&](auto config) {
    using Config = decltype(config);
    const auto kernel = p.rows.residual ? layer_norm_kernel<T, Config, true> : layer_norm_kernel<T, Config, false>;
    launch_kernel<RowSharedStorage<Config>>(kernel, row_grid<Config>(p.rows), Config::kThreads, stream, p);
  };
  if (p.rows.num_tokens < kManyRows) return with_row_config<T>("layer_norm", p.rows, launch);
  with_row_config<T, row_detail::Narrow>("layer_norm", p.rows, launch);
}

template void layer_norm<float>(const LayerNormParams&, cudaStream_t);
template void layer_norm<__half>(const LayerNormParams&, cudaStream_t);
template void layer_norm<__nv_bfloat16>(const LayerNormParams&, cudaStream_t);

}  // namespace fastshard
