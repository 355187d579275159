// The LayerNorm kernel, with every variant of the menu.
#include "norm/layer_norm.cuh"

namespace fastshard {

template <typename T>
void layer_norm(const LayerNormParams& p, RowVariant variant, cudaStream_t stream) {
  // Of more rows than run at once one hides the latencies of another: fewer threads, with less to tell each other.
  constexpr int64_t kManyRows = 1024;
  const int64_t row_bytes = int64_t(p.rows.hidden_size) * int64_t(sizeof(T));
  if (variant.is_auto() && p.rows.num_tokens >= kManyRows && row_bytes > 4096 && row_bytes <= 8192) variant = {128, 4};
  launch_layer_norm<T, WholeRowMenu>(p, variant, stream);
}

template void layer_norm<float>(const LayerNormParams&, RowVariant, cudaStream_t);
template void layer_norm<__half>(const LayerNormParams&, RowVariant, cudaStream_t);
template void layer_norm<__nv_bfloat16>(const LayerNormParams&, RowVariant, cudaStream_t);

}  // namespace fastshard
