// Host interface of the LayerNorm kernel: no torch, no device code.
#pragma once
#include "norm/row.h"

namespace fastshard {

struct LayerNormParams {
  NormRows rows;
  const void* weight;  // [hidden_size], dtype of x, contiguous, 16-byte aligned; null for ones
  const void* bias;    // as weight; null for zeros
  float eps;
};

// T: float, __half, __nv_bfloat16. Throws std::runtime_error for rows above kMaxRowBytes, or that the variant does
// not hold.
template <typename T>
void layer_norm(const LayerNormParams& params, RowVariant variant, cudaStream_t stream);

}  // namespace fastshard
