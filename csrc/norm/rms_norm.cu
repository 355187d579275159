// The RMSNorm kernel, with every variant of the menu.
#include "norm/rms_norm.cuh"

namespace fastshard {

template <typename T>
void rms_norm(const RmsNormParams& p, RowVariant variant, cudaStream_t stream) {
  launch_rms_norm<T, WholeRowMenu>(p, variant, stream);
}

template void rms_norm<float>(const RmsNormParams&, RowVariant, cudaStream_t);
template void rms_norm<__half>(const RmsNormParams&, RowVariant, cudaStream_t);
template void rms_norm<__nv_bfloat16>(const RmsNormParams&, RowVariant, cudaStream_t);

}  // namespace fastshard
