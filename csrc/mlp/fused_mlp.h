// Host interface of the small-row gated MLP kernel: no torch, no device code.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "activation/activation.h"

namespace fastshard {

constexpr int kFusedMlpMaxTokens = 16;

// Of one launch: all of it, or one step of what follows each other.
enum class MlpPhase { kAll, kGateUp, kDown, kAdd };

struct FusedMlpParams {
  const void* x;               // [num_tokens, hidden_size], unit-stride 16-byte aligned rows
  const void* gate_up_weight;  // [2 * intermediate_size, hidden_size], rows g0, u0, g1, u1, ..., as x
  const void* down_weight;     // [hidden_size, intermediate_size], as x
  const void* residual;        // [num_tokens, hidden_size] or null, unit-stride rows
  void* out;                   // [num_tokens, hidden_size], contiguous
  int64_t x_stride;            // between rows, in elements, a multiple of 8
  int64_t gate_up_stride;      // a multiple of 8, at most kStreamMaxStride
  int64_t down_stride;         // as gate_up_stride
  int64_t residual_stride;
  int num_tokens;              // at most kFusedMlpMaxTokens
  int hidden_size;             // a multiple of 8
  int intermediate_size;       // a multiple of 8
  Activation activation;

  // The launcher's business.
  MlpPhase phase = MlpPhase::kAll;
  int parts = 0;  // of the down product
  uint32_t* workspace = nullptr;
  int64_t half_words = 0;
};

// T: __half, __nv_bfloat16. One cooperative launch; plain ones, of the same numbers, where the device cannot hold a
// cooperative one. Throws std::runtime_error for more rows than kFusedMlpMaxTokens.
template <typename T>
void fused_mlp(const FusedMlpParams& params, cudaStream_t stream);

}  // namespace fastshard
