// Launcher of the gated MLP by tiles: gate and up, then down.
#include "mlp/tiled_mlp.cuh"

#include "gemm/launch_gemm.cuh"
#include "mlp/tiled_mlp.h"

namespace fastshard {

template <typename T>
void tiled_mlp(const TiledMlpParams& p, cudaStream_t stream) {
  const GemmParams<T, StoreHidden<T>> gate_up{
      {static_cast<const T*>(p.x), p.x_stride, p.num_tokens},
      {static_cast<const T*>(p.gate_up_weight), p.gate_up_stride, 2 * p.intermediate_size},
      p.hidden_size,
      {static_cast<T*>(p.hidden), p.intermediate_size, p.activation}};
  const GemmParams<T, StoreOutput<T>> down{
      {static_cast<const T*>(p.hidden), p.intermediate_size, p.num_tokens},
      {static_cast<const T*>(p.down_weight), p.down_stride, p.hidden_size},
      p.intermediate_size,
      {static_cast<T*>(p.out), static_cast<const T*>(p.residual), p.hidden_size, p.residual_stride}};
  launch_gemm(gate_up, p.tile, stream);
  launch_gemm(down, p.tile, stream);
}

template void tiled_mlp<__half>(const TiledMlpParams&, cudaStream_t);
template void tiled_mlp<__nv_bfloat16>(const TiledMlpParams&, cudaStream_t);

}  // namespace fastshard
