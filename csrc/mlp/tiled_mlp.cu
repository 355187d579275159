// The gated MLP by tiles, with every tile of the menu.
#include "mlp/launch_tiled_mlp.cuh"

namespace fastshard {

template <typename T>
void tiled_mlp(const TiledMlpParams& p, cudaStream_t stream) {
  for_each_product<T>(p, [&](const auto& product) { launch_gemm(product, p.tile, stream); });
}

template void tiled_mlp<__half>(const TiledMlpParams&, cudaStream_t);
template void tiled_mlp<__nv_bfloat16>(const TiledMlpParams&, cudaStream_t);

}  // namespace fastshard
