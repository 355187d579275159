// Launcher of the RMSNorm kernel.
#include "norm/rms_norm.cuh"

namespace fastshard {

template <typename T>
void rms_norm(const RmsNormParams& p, RowVariant variant, cudaStream_t stream) {
  with_row_config<T>("rms_norm", p.rows, variant, [&](auto config) {
    using Config = decltype(config);
    const auto kernel = p.rows.residual ? rms_norm_kernel<T, Config, true> : rms_norm_kernel<T, Config, false>;
    launch_kernel<RowSharedStorage<Config>>(kernel, row_grid<Config>(p.rows), Config::kThreads, stream, p);
  });
}

template void rms_norm<float>(const RmsNormParams&, RowVariant, cudaStream_t);
template void rms_norm<__half>(const RmsNormParams&, RowVariant, cudaStream_t);
template void rms_norm<__nv_bfloat16>(const RmsNormParams&, RowVariant, cudaStream_t);

}  // namespace fastshard
