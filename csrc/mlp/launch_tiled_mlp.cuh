// Launches the two products of the gated MLP by tiles.
#pragma once
#include "gemm/launch_gemm.cuh"
#include "mlp/tiled_mlp.cuh"
#include "mlp/tiled_mlp.h"

namespace fastshard {

// Calls launch(product) for gate and up, then for down.
template <typename T, typename Launch>
void for_each_product(const TiledMlpParams& p, Launch launch) {
  launch(GemmParams<T, StoreHidden<T>>{
      {static_cast<const T*>(p.x), p.x_stride, p.num_tokens},
      {static_cast<const T*>(p.gate_up_weight), p.gate_up_stride, 2 * p.intermediate_size},
      p.hidden_size,
      {static_cast<T*>(p.hidden), p.intermediate_size, p.activation}});
  launch(GemmParams<T, StoreOutput<T>>{
      {static_cast<const T*>(p.hidden), p.intermediate_size, p.num_tokens},
      {static_cast<const T*>(p.down_weight), p.down_stride, p.hidden_size},
      p.intermediate_size,
      {static_cast<T*>(p.out), static_cast<const T*>(p.residual), p.hidden_size, p.residual_stride}});
}

// By one tile, of the menu or not, whatever p.tile is.
template <typename T, typename Config>
void launch_tiled_mlp(const TiledMlpParams& p, cudaStream_t stream) {
  for_each_product<T>(p, [&](const auto& product) { launch_gemm_config<Config>(product, stream); });
}

}  // namespace fastshard
