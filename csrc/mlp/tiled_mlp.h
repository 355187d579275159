// Host interface of the gated MLP by tiles on tensor cores, for many rows: no torch, no device code.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "activation/activation.h"
#include "gemm/choose_tile.h"

namespace fastshard {

struct TiledMlpParams {
  const void* x;               // [num_tokens, hidden_size], unit-stride 16-byte aligned rows
  const void* gate_up_weight;  // [2 * intermediate_size, hidden_size], rows g0, u0, g1, u1, ..., as x
  const void* down_weight;     // [hidden_size, intermediate_size], as x
  const void* residual;        // [num_tokens, hidden_size] or null, as x
  void* hidden;                // [num_tokens, intermediate_size], contiguous, 16-byte aligned workspace
  void* out;                   // [num_tokens, hidden_size], contiguous, 16-byte aligned
  int64_t x_stride;            // between rows, in elements, a multiple of 8, at most kGemmMaxStride
  int64_t gate_up_stride;      // as x_stride
  int64_t down_stride;         // as x_stride
  int64_t residual_stride;     // a multiple of 8
  int num_tokens;
  int hidden_size;             // a multiple of 8
  int intermediate_size;       // a multiple of 8
  Activation activation;
  GemmTileSize tile = GemmTileSize::kAuto;  // of both products
};

// T: __half, __nv_bfloat16. Two launches.
template <typename T>
void tiled_mlp(const TiledMlpParams& params, cudaStream_t stream);

}  // namespace fastshard
